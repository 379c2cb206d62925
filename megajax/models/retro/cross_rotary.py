"""The rotary embedding between a text and its neighbours, which lie over a chunk and what follows it."""

# SPDX-License-Identifier: Apache-2.0
# C chunks, M tokens of a chunk or of those that read its neighbours, K neighbours of a chunk, R tokens of each
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megajax.models.common.embeddings.positions import rotary_embedding
from megajax.models.retro.config import RetroConfig
from megajax.ops.rope import Rotary

Array = jax.Array


class CrossRotary(NamedTuple):
    """Of the tokens of the text, [C or 1, M, ...], and of all neighbours of a chunk in turn, [1, K R, ...]."""

    text: Rotary
    neighbors: Rotary


def rotary_at(config: RetroConfig, places: Array) -> Rotary:
    """places int [C or 1, S] -> their rotary embedding."""
    embedding = rotary_embedding(config)
    assert embedding is not None
    return embedding.rotary(places)


def cross_rotary(config: RetroConfig, places_CM: Array, neighbors: int, length: int) -> CrossRotary | None:
    """For tokens of the text at these places from the start of their chunk; neighbours begin there, too.

    With it, to read on where a neighbour repeats the text is to look one place ahead: arXiv:2112.04426 has relative
    positions for this (B.1). Megatron has none.

    Returns:
      None without `retro_cross_attention_rotary`.
    """
    if not config.retro_cross_attention_rotary:
        return None
    in_neighbors = jnp.tile(jnp.arange(length), neighbors)[None]
    return CrossRotary(rotary_at(config, places_CM), rotary_at(config, in_neighbors))
