"""What stands on top of BERT's encoder: the transform before the output layer, the pooler, the binary head."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.models.bert.bert_config import BertConfig
from megajax.ops.activations import ACTIVATIONS, activate
from megajax.ops.linear import linear
from megajax.parallel.sharding import constrain, gathered
from megajax.spec import Builder
from megajax.transformer.linear import init_std, normal_init, zeros_init

Array = jax.Array


class Dense(nn.Module):
    """`x @ kernel + bias` that tensor parallelism does not divide. x [..., D] -> [..., features]."""

    config: BertConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, dtype, axes = self.config, jnp.dtype(self.config.params_dtype), ("embed", "norm")
        kernel: Array = self.param("kernel", normal_init(init_std(cfg), axes), (x.shape[-1], self.features), dtype)  # type: ignore[assignment]
        bias: Array = self.param("bias", zeros_init(("norm",)), (self.features,), dtype)  # type: ignore[assignment]
        return linear(x, gathered(kernel.astype(x.dtype), *axes), bias)


class BertLMHead(nn.Module):
    """Dense, activation, norm: what the output layer reads. x [B, S, D] -> [B, S, D].

    Its tokens stay divided as sequence parallelism has divided them. Megatron: `core/models/bert/bert_lm_head.py`.
    """

    config: BertConfig
    norm: Builder

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        cfg = self.config
        x_BSD = constrain(x_BSD, "batch", "residual_seq", "act_embed")
        x_BSD = activate(
            Dense(cfg, cfg.hidden_size, name="dense")(x_BSD), activation=ACTIVATIONS[cfg.lm_head_activation]
        )
        y_BSD = self.norm(config=cfg, name="layer_norm")(x_BSD).astype(x_BSD.dtype)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")


class Pooler(nn.Module):
    """The first token's state through a dense layer and tanh. x [B, S, D] -> [B, D]. Megatron: `bert/pooler.py`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        x_BD = constrain(x_BSD[:, 0], "batch", "act_embed")
        return jnp.tanh(Dense(self.config, self.config.hidden_size, name="dense")(x_BD))
