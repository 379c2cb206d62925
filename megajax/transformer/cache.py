"""What decoding remembers, of one layer: an array of its own, or its row of the array that equal layers share."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


class CacheRow(NamedTuple):
    """Row `index` of a stack [L, ...] of caches.

    What a layer adds is written to the stack where it lies, and read from there: a row that is taken out and put back
    would be copied twice for each token.
    """

    stack: Array
    index: Array


Cache = Array | CacheRow


def empty(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    """The cache of one layer at the start: zeros that say their logical axes, as parameters do."""
    return nn.LogicallyPartitioned(jnp.zeros(shape, dtype), axes)


def write(cache: Cache, new: Array, start: tuple[Array | int, ...]) -> Cache:
    """The cache with `new` at `start`; both have the dims of one layer's."""
    if isinstance(cache, CacheRow):
        return cache._replace(stack=jax.lax.dynamic_update_slice(cache.stack, new[None], (cache.index, *start)))
    return jax.lax.dynamic_update_slice(cache, new, start)


def read(cache: Cache) -> Array:
    """All of one layer's."""
    if isinstance(cache, CacheRow):
        return jax.lax.dynamic_index_in_dim(cache.stack, cache.index, keepdims=False)
    return cache


def is_cache(node: Any) -> bool:
    """Whether a node of a tree is the cache of one layer."""
    return isinstance(node, CacheRow | Array)
