"""Writing with retrieval: whenever a chunk is complete, its neighbours are looked up."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.models.retro.model import RETROModel
from megajax.models.retro.retrieval import ChunkDatabase

Array = jax.Array


def generate(
    model: RETROModel,
    params: Any,
    prompt: list[int],
    database: ChunkDatabase,
    *,
    num_tokens: int,
    choose: Callable[[Array, int], Array],
) -> list[int]:
    """The prompt's continuation by `num_tokens` tokens. All of the text is computed anew for each: for short texts.

    choose: (logits fp32 [1, V], which token of the text it is) -> id int [1].
    """
    config = model.resolved_config
    length, span, count = config.retro_chunk_length, config.retro_num_retrieved_chunks, config.retro_num_neighbors
    chunks = -(-(len(prompt) + num_tokens) // length)
    text = np.zeros(chunks * length, np.int32)
    text[: len(prompt)] = prompt
    context = np.full((chunks, count, span * length), database.pad, np.int32)
    complete = 0
    for end in range(len(prompt), len(prompt) + num_tokens):
        while complete < end // length:
            chunk = text[complete * length : (complete + 1) * length]
            found = database.search(chunk[None], count, [[]], span=span, align=config.retro_align_neighbors)
            context[complete] = database.read(found, span * length)[0]
            complete += 1
        text[end] = int(choose(_next_logits(model, params, text[None], context[None], jnp.int32(end - 1)), end)[0])
    return text[len(prompt) : len(prompt) + num_tokens].tolist()


@partial(jax.jit, static_argnames="model")
def _next_logits(model: RETROModel, params: Any, text: Array, context: Array, last: Array) -> Array:
    logits: Any = model.apply({"params": params}, text, context)
    return jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False)
