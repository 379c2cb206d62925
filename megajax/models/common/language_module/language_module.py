"""The end of a language model: hidden states to logits, and logits to loss."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, V rows of the vocabulary table
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.attention import soft_cap
from megajax.ops.cross_entropy import (
    CrossEntropyOptions,
    FusedLoss,
    cross_entropy,
    fused_linear_cross_entropy,
)
from megajax.parallel.sharding import constrain, merge_tokens
from megajax.parallel.vocab import loss_computation, rows_here
from megajax.transformer.linear import init_std, normal_init, zeros_init

Array = jax.Array


class OutputLayer(nn.Module):
    """The matrix [D, V] from hidden states to logits, unless it is the embedding's, and the bias [V] if there is one.

    Megatron: `output_layer`.
    """

    config: TransformerConfig
    use_kernel: bool = True
    use_bias: bool = False

    def setup(self) -> None:
        cfg, dtype = self.config, jnp.dtype(self.config.params_dtype)
        rows = rows_here(cfg.padded_vocab_size)
        if self.use_kernel:
            init = normal_init(init_std(cfg), ("embed", "vocab"))
            self.kernel = self.param("kernel", init, (cfg.hidden_size, rows), dtype)
        if self.use_bias:
            self.bias = self.param("bias", zeros_init(("vocab",)), (rows,), dtype)

    def __call__(self) -> Array:
        """The matrix."""
        return self.kernel


def loss_options(config: TransformerConfig) -> CrossEntropyOptions:
    """What the loss of a language model is made of."""
    assert config.vocab_size is not None
    return CrossEntropyOptions(config.vocab_size, config.label_smoothing, config.z_loss_coeff)


def language_model_logits(
    hidden_BSD: Array, kernel_DV: Array, config: TransformerConfig, bias_V: Array | None = None
) -> Array:
    """hidden [B, S, D] -> fp32 logits [B, S, vocab_size]; padding rows of the table are cut off."""
    hidden_BSD = constrain(hidden_BSD, "batch", "seq", "act_embed")
    flat = merge_tokens(hidden_BSD)
    logits = jnp.dot(flat, kernel_DV.astype(flat.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias_V is None else logits + bias_V.astype(jnp.float32)
    logits = soft_cap(logits, config.final_logit_softcapping)
    logits = constrain(logits.reshape(*hidden_BSD.shape[:-1], -1), "batch", "seq", "act_vocab")
    return logits[..., : config.vocab_size]


def language_model_loss(logits: Array, labels: Array, config: TransformerConfig) -> Array:
    """logits [B, S, V], labels int [B, S] -> fp32 loss of each token [B, S].

    Labels outside the vocabulary give a finite number that the caller has to mask (`cross_entropy`).
    """
    return cross_entropy(logits, labels, loss_options(config))


def language_model_loss_sum(
    hidden_BSD: Array,
    kernel_DV: Array,
    labels: Array,
    weights: Array,
    config: TransformerConfig,
    bias_V: Array | None = None,
) -> FusedLoss:
    """The weighted sum of the token losses, without ever holding all logits: what a trainer differentiates."""
    computation = loss_computation(loss_options(config), config.final_logit_softcapping)
    return fused_linear_cross_entropy(hidden_BSD, kernel_DV, labels, weights, computation, bias_V=bias_V)
