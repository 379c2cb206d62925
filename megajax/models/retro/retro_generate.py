"""Writing with retrieval: whenever a chunk is complete, its neighbours are looked up."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.inference.generate import init_cache
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
    """The prompt's continuation by `num_tokens` tokens.

    choose: (logits fp32 [1, V], which token of the text it is) -> id int [1].
    """
    config = model.resolved_config
    length, span, count = config.retro_chunk_length, config.retro_num_retrieved_chunks, config.retro_num_neighbors

    def neighbors_of(chunks_LM: np.ndarray) -> np.ndarray:
        nothing = [[] for _ in chunks_LM]
        found = database.search(chunks_LM, count, nothing, span=span, align=config.retro_align_neighbors)
        return database.read(found, span * length)

    text = np.array([*prompt, *[0] * num_tokens], np.int32)
    complete, end = len(prompt) // length, len(text)
    context = neighbors_of(text[: complete * length].reshape(-1, length))
    given = {"tokens": jnp.asarray(text[None, : len(prompt)]), "context_tokens": jnp.asarray(context[None])}
    cache = init_cache(model, params, given, length=end)
    logits, cache = _step(model, params, cache, "read", given)
    for place in range(len(prompt), end):
        text[place] = int(choose(logits, place)[0])
        if place + 1 < end:
            last = (place + 1) % length == 0  # of its chunk
            found = neighbors_of(text[None, place + 1 - length : place + 1]) if last else None
            arguments = (text[place : place + 1], jnp.int32(place), found)
            logits, cache = _step(model, params, cache, "read_on", *arguments)
    return text[len(prompt) :].tolist()


@partial(jax.jit, static_argnames=("model", "method"), donate_argnames="cache")
def _step(model: RETROModel, params: Any, cache: Any, method: str, *arguments: Any) -> tuple[Array, Any]:
    """(logits [1, V], cache)."""
    variables = {"params": params, "cache": cache}
    logits, updated = model.apply(variables, *arguments, method=method, mutable=["cache"])
    return logits, updated["cache"]  # type: ignore[return-value]
