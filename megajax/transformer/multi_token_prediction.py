"""Multi-token prediction: modules behind a decoder, each for one token further (arXiv:2412.19437, 2.2)."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.parallel.sharding import constrain
from megajax.spec import Builder

Array = jax.Array


def roll_left(x_BS: Array, segment_ids_BS: Array | None = None) -> Array:
    """Each place takes the value of the next one; the last of a sequence, or of a packed document, takes 0."""
    rolled = jnp.roll(x_BS, -1, axis=1).at[:, -1].set(0)
    if segment_ids_BS is None:
        return rolled
    return jnp.where(jnp.roll(segment_ids_BS, -1, axis=1) == segment_ids_BS, rolled, 0)


def rolled_weights(weights_BS: Array, segment_ids_BS: Array | None = None) -> Array:
    """Weights of the losses one token further, which sum to as much as before."""
    rolled = roll_left(weights_BS, segment_ids_BS)
    total = jnp.sum(rolled)
    return rolled * (jnp.sum(weights_BS) / jnp.where(total == 0, 1.0, total))


class MultiTokenPredictionLayer(nn.Module):
    """`norm(layer(eh_proj([norm(embedding), norm(hidden)])))`: hidden states of the next depth, [B, S, D].

    Megatron: `transformer/multi_token_prediction.py`.
    """

    config: TransformerConfig
    transformer_layer: Builder
    layer_norm: Builder
    linear: Builder

    @nn.compact
    def __call__(self, hidden_BSD: Array, embedded_BSD: Array, inputs: dict[str, Any], *, deterministic: bool) -> Array:
        """hidden: of the depth before. embedded: of the tokens that come next. inputs: of the layer."""
        cfg = self.config
        e_BSD = self.layer_norm(config=cfg, name="enorm")(embedded_BSD)
        h_BSD = self.layer_norm(config=cfg, name="hnorm")(hidden_BSD)
        both = jnp.concatenate([e_BSD, h_BSD], axis=-1).astype(jnp.dtype(cfg.compute_dtype))
        both = constrain(both, "batch", "residual_seq", "act_embed")
        x_BSD = self.linear(config=cfg, features=cfg.hidden_size, axis="mlp", use_bias=False, name="eh_proj")(both)
        x_BSD = constrain(x_BSD, "batch", "residual_seq", "act_embed")
        layer = self.transformer_layer(config=cfg.for_layer(cfg.num_layers - 1), name="transformer_layer")
        x_BSD = layer(x_BSD, deterministic=deterministic, **inputs)
        return self.layer_norm(config=cfg, name="final_layernorm")(x_BSD).astype(jnp.dtype(cfg.compute_dtype))
