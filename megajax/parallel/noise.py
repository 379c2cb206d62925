"""Random numbers of a replica: its part of those that are drawn for all samples and tokens together."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from megajax.ops.threefry import bits_of_rows, threshold, words_of
from megajax.parallel.replicas import axes_apart, parts_apart

Array = jax.Array


def bernoulli(key: Array, probability: float, shape: tuple[int, ...], *axes: str | None) -> Array:
    """`jax.random.bernoulli` of an array whose part here has this shape. axes: the logical axis, or None, of each dim.

    Where replicas are apart, keys must be JAX's default ones (`threefry.is_default`).
    """
    if not any(axes_apart(axis) for axis in axes if axis):
        return jax.random.bernoulli(key, probability, shape)
    return _bits(key, shape, axes) < threshold(probability)


def uniform(key: Array, shape: tuple[int, ...], *axes: str | None, low: float, high: float) -> Array:
    """`jax.random.uniform`, fp32, likewise."""
    if not any(axes_apart(axis) for axis in axes if axis):
        return jax.random.uniform(key, shape, minval=low, maxval=high)
    span = jnp.float32(high) - jnp.float32(low)
    return jnp.maximum(jnp.float32(low), _bits(key, shape, axes).astype(jnp.float32) / 2**23 * span + jnp.float32(low))


def _bits(key: Array, shape: tuple[int, ...], axes: Sequence[str | None]) -> Array:
    """Of what is here, by its place in the whole array."""
    places, row = jnp.ix_(*(_places(size, axis) for size, axis in zip(shape, axes, strict=True))), jnp.int32(0)
    sizes = [size * (parts_apart(axis) if axis else 1) for size, axis in zip(shape, axes, strict=True)]
    for size, place in zip(sizes[:-1], places[:-1], strict=True):
        row = row * size + place
    return bits_of_rows(words_of(jax.random.key_data(key)), row, sizes[-1], places[-1])


def _places(size: int, axis: str | None) -> Array:
    names = axes_apart(axis) if axis else ()
    return (jax.lax.axis_index(names) * size if names else 0) + jnp.arange(size, dtype=jnp.int32)
