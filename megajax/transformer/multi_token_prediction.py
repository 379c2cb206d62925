"""Multi-token prediction: modules behind a decoder, each for one token further (arXiv:2412.19437, 2.2)."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.parallel.replicas import across
from megajax.parallel.sharding import constrain
from megajax.spec import Builder

Array = jax.Array


def roll_left(x_BS: Array, segment_ids_BS: Array | None = None) -> Array:
    """Each place takes the value of the next one; the last of a sequence, or of a packed document, takes 0."""

    def next_ones(x_BS: Array) -> Array:
        return jnp.concatenate([x_BS[:, 1:], across().of_next(x_BS[:, :1])], axis=1)

    rolled = next_ones(x_BS)
    if segment_ids_BS is None:
        return rolled
    return jnp.where(next_ones(segment_ids_BS) == segment_ids_BS, rolled, 0)


def rolled_weights(weights_BS: Array, segment_ids_BS: Array | None = None) -> Array:
    """Weights of the losses one token further, which sum to as much as before."""
    rolled = roll_left(weights_BS, segment_ids_BS)
    before, total = across().tokens(jnp.stack([jnp.sum(weights_BS), jnp.sum(rolled)]))
    return rolled * (before / jnp.where(total == 0, 1.0, total))


class MultiTokenPredictionLayer(nn.Module):
    """`norm(layer(eh_proj([norm(embedding), norm(hidden)])))`: hidden states of the next depth, [B, S, D].

    depth: from 0. Megatron: `transformer/multi_token_prediction.py`.
    """

    config: TransformerConfig
    layer_spec: Builder
    layer_norm: Builder
    linear: Builder
    depth: int = 0

    def setup(self) -> None:
        cfg = self.config
        self.enorm, self.hnorm = self.layer_norm(config=cfg), self.layer_norm(config=cfg)
        self.eh_proj = self.linear(config=cfg, features=cfg.hidden_size, axis="mlp", use_bias=False)
        self.transformer_layer = self.layer_spec(config=cfg.for_further_layer(self.depth))
        self.final_layernorm = self.layer_norm(config=cfg)

    def __call__(self, hidden_BSD: Array, embedded_BSD: Array, inputs: dict[str, Any], *, deterministic: bool) -> Array:
        """hidden: of the depth before. embedded: of the tokens that come next. inputs: of the layer."""
        x_BSD = self.before_layer(hidden_BSD, embedded_BSD)
        return self.after_layer(self.transformer_layer(x_BSD, deterministic=deterministic, **inputs))

    def before_layer(self, hidden_BSD: Array, embedded_BSD: Array) -> Array:
        """What the layer reads, [B, S, D]."""
        both = jnp.concatenate([self.enorm(embedded_BSD), self.hnorm(hidden_BSD)], axis=-1)
        both = constrain(both.astype(jnp.dtype(self.config.compute_dtype)), "batch", "residual_seq", "act_embed")
        return constrain(self.eh_proj(both), "batch", "residual_seq", "act_embed")

    def after_layer(self, x_BSD: Array) -> Array:
        """The next hidden states, [B, S, D]."""
        return self.final_layernorm(x_BSD).astype(jnp.dtype(self.config.compute_dtype))
