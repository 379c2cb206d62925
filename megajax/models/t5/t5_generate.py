"""Greedy writing with T5."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S tokens that are written
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from megajax.models.t5.t5_model import T5Model

Array = jax.Array


@partial(jax.jit, static_argnames=("model", "start", "length"))
def generate_greedy(
    model: T5Model, params: Any, encoder_input: Array, *, encoder_mask: Array, start: int, length: int
) -> Array:
    """The most probable next token, `length` times. encoder_input int [B, T] -> int32 [B, length].

    All that is written is computed anew for each token: for short texts.

    Args:
      encoder_mask: [B, T], as for the model. start: what the decoder's text begins with.
    """
    variables = {"params": params}
    context = model.apply(variables, encoder_input, encoder_mask=encoder_mask)
    written_BS = jnp.full((encoder_input.shape[0], length + 1), start, jnp.int32)

    def step(i: Array, written_BS: Array) -> Array:
        logits: Any = model.apply(
            variables, encoder_input, written_BS[:, :-1], encoder_mask=encoder_mask, encoder_hidden_states=context
        )
        token_B = jnp.argmax(jax.lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False), axis=-1)
        return jax.lax.dynamic_update_index_in_dim(written_BS, token_B.astype(jnp.int32), i + 1, axis=1)

    return jax.lax.fori_loop(0, length, step, written_BS)[:, 1:]
