"""One transformer layer: norm, attention, add, norm, MLP, add."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T context length, D hidden
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.attention import AttentionMask
from megajax.ops.rope import Rotary
from megajax.parallel.sharding import constrain
from megajax.spec import Builder
from megajax.transformer.dropout import Dropout
from megajax.transformer.recompute import recomputed

Array = jax.Array


class BiasDropoutAdd(nn.Module):
    """`residual + dropout(x)`. The bias of Megatron's bias-dropout-add is already in x: XLA fuses the three."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD: Array, residual_BSD: Array, *, deterministic: bool = True) -> Array:
        x_BSD = Dropout(self.config.hidden_dropout, deterministic=deterministic)(x_BSD)
        return constrain(residual_BSD + x_BSD, "batch", "residual_seq", "act_embed")


class WithContext(NamedTuple):
    """What cross-attention, and so its layer, may return: its output, and what the layers after it read as context."""

    output: Array
    context: Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class TransformerLayerSubmodules:
    """Slots of `TransformerLayer`; a sublayer that is None is left out together with its norms.

    post_self_attn_layernorm, post_mlp_layernorm: norms of what a sublayer gives, before it is added; None for none.
    """

    input_layernorm: Builder | None = None
    self_attention: Builder | None = None
    post_self_attn_layernorm: Builder | None = None
    self_attn_bda: Builder = BiasDropoutAdd
    pre_cross_attn_layernorm: Builder | None = None
    cross_attention: Builder | None = None
    cross_attn_bda: Builder = BiasDropoutAdd
    pre_mlp_layernorm: Builder | None = None
    mlp: Builder | None = None
    post_mlp_layernorm: Builder | None = None
    mlp_bda: Builder = BiasDropoutAdd


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + cross_attention(norm(x), context) if there is one, then x + mlp(norm(x)).

    What a sublayer gives may have a norm of its own, too (`sandwich_norm`).
    With `apply_residual_connection_post_layernorm` the residual is the norm's output instead of its input.
    Megatron: `core/transformer/transformer_layer.py`.
    """

    config: TransformerConfig
    submodules: TransformerLayerSubmodules

    def setup(self) -> None:
        cfg, sub = self.config, self.submodules
        if sub.self_attention is not None:
            self.input_layernorm = _built(sub.input_layernorm, cfg)
            self.self_attention = sub.self_attention(config=cfg)
            self.post_self_attn_layernorm = _built(sub.post_self_attn_layernorm, cfg)
            self.self_attn_bda = sub.self_attn_bda(config=cfg)
        if sub.cross_attention is not None:
            self.pre_cross_attn_layernorm = _built(sub.pre_cross_attn_layernorm, cfg)
            self.cross_attention = sub.cross_attention(config=cfg)
            self.cross_attn_bda = sub.cross_attn_bda(config=cfg)
        if sub.mlp is not None:
            self.pre_mlp_layernorm = _built(sub.pre_mlp_layernorm, cfg)
            self.mlp = sub.mlp(config=cfg)
            self.post_mlp_layernorm = _built(sub.post_mlp_layernorm, cfg)
            self.mlp_bda = sub.mlp_bda(config=cfg)

    def __call__(
        self,
        x_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        context: Array | None = None,
        context_mask: AttentionMask | None = None,
        aux_weight: Array | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array | WithContext:
        """x [B, S, D] -> [B, S, D]; context [B, T, E] feeds the cross-attention, which may make another one of it.

        aux_weight: scalar that the losses of a router are multiplied by; None leaves them out.
        """
        cfg, sub = self.config, self.submodules
        x_BSD, made = self.attend(
            x_BSD, mask=mask, rotary=rotary, context=context, context_mask=context_mask, decode=decode,
            deterministic=deterministic,
        )  # fmt: skip
        if sub.mlp is not None:
            y_BSD, residual_BSD = self.before_mlp(x_BSD)
            mlp = recomputed(self.mlp, "mlp", cfg)
            routed = {"aux_weight": aux_weight, "decode": decode, "deterministic": deterministic}
            y_BSD = mlp(y_BSD, **(routed if cfg.num_moe_experts is not None else {}))
            x_BSD = self.after_mlp(y_BSD, residual_BSD, deterministic=deterministic)
        return x_BSD if made is None else WithContext(x_BSD, made)

    def attend(
        self,
        x_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        context: Array | None = None,
        context_mask: AttentionMask | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None]:
        """(x [B, S, D] after the attention sublayers, a context that the cross-attention made or None)."""
        sub, made = self.submodules, None
        if sub.self_attention is not None:
            y_BSD, residual_BSD = self._norm(self.input_layernorm, x_BSD)
            y_BSD = self.self_attention(y_BSD, mask=mask, rotary=rotary, decode=decode, deterministic=deterministic)
            y_BSD = self._post_norm(self.post_self_attn_layernorm, y_BSD)
            x_BSD = self.self_attn_bda(y_BSD, residual_BSD, deterministic=deterministic)

        if sub.cross_attention is not None:
            y_BSD, residual_BSD = self._norm(self.pre_cross_attn_layernorm, x_BSD)
            context_mask = context_mask or AttentionMask()
            how = {"decode": decode, "deterministic": deterministic}
            y_BSD = self.cross_attention(y_BSD, context, mask=context_mask, **how)
            if isinstance(y_BSD, WithContext):
                y_BSD, made = y_BSD
            x_BSD = self.cross_attn_bda(y_BSD, residual_BSD, deterministic=deterministic)
        return x_BSD, made

    def before_mlp(self, x_BSD: Array) -> tuple[Array, Array]:
        """(input of the MLP, residual), of what `attend` returns."""
        return self._norm(self.pre_mlp_layernorm, x_BSD)

    def after_mlp(self, y_BSD: Array, residual_BSD: Array, *, deterministic: bool) -> Array:
        """The layer's output, of what the MLP gives and the residual."""
        y_BSD = self._post_norm(self.post_mlp_layernorm, y_BSD)
        return self.mlp_bda(y_BSD, residual_BSD, deterministic=deterministic)

    def _post_norm(self, norm: nn.Module | None, y_BSD: Array) -> Array:
        """What a sublayer gives, ready to be added."""
        return y_BSD if norm is None else recomputed(norm, "layernorm", self.config)(y_BSD).astype(y_BSD.dtype)

    def _norm(self, norm: nn.Module | None, x_BSD: Array) -> tuple[Array, Array]:
        """(input of the sublayer in the compute dtype, residual)."""
        cfg = self.config
        y_BSD = x_BSD
        if norm is not None:
            y_BSD = recomputed(norm, "layernorm", cfg)(x_BSD)
            # For the sake of its gradient, which the sublayer hands back whole: it is scattered where it is summed.
            y_BSD = constrain(y_BSD, "batch", "residual_seq", "act_embed")
        residual_BSD = y_BSD if cfg.apply_residual_connection_post_layernorm else x_BSD
        return y_BSD.astype(jnp.dtype(cfg.compute_dtype)), residual_BSD


def _built(build: Builder | None, config: TransformerConfig) -> nn.Module | None:
    return None if build is None else build(config=config)
