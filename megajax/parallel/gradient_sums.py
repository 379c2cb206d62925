"""How the gradients of microbatches, and of replicas, come together: they add up; of magnitudes the largest is kept."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any

FP8_META = "fp8_meta"
"""Name of a parameter whose "gradient" is no gradient: the largest magnitudes of the tensors of a linear layer, which
are not negative, so that zeros change nothing. `megajax.transformer.fp8` makes them, and the next scales of them.
So are called the scales of experts, too, which are made of it."""

INPUT, KERNEL, GRADIENT = range(3)
"""Of the tensors of a linear layer, in it."""


def is_fp8_meta(path: Any) -> bool:
    """Whether a leaf of a tree like the parameters, with this path, is one of those; also for a path of plain names."""
    return bool(path) and path[-1] in (FP8_META, jax.tree_util.DictKey(FP8_META))


def combine(path: Any, total: Any, gradient: Array) -> Array:
    """Two gradients of the parameter with this path as one."""
    return jnp.maximum(total, gradient) if is_fp8_meta(path) else total + gradient


def combined_rows(path: Any, gradients: Array) -> Array:
    """Gradients [n, ...] as one."""
    return jnp.max(gradients, axis=0) if is_fp8_meta(path) else jnp.sum(gradients, axis=0)


def combined_devices(path: Any, gradient: Array, axes: tuple[str, ...]) -> Array:
    """The gradients of the devices along manual mesh axes as one."""
    return jax.lax.pmax(gradient, axes) if is_fp8_meta(path) else jax.lax.psum(gradient, axes)


def whole_in_region(path: Any, leaf: Array, axes: tuple[str, ...]) -> Array:
    """A parameter that devices along manual mesh axes have alike, where their region begins. When it ends, their
    gradients are summed: of magnitudes the first device therefore gives the largest of all, and the others nothing."""
    return _whole(leaf, axes) if axes and is_fp8_meta(path) else leaf


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(leaf: Array, axes: tuple[str, ...]) -> Array:
    return leaf


def _whole_backward(axes: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:
    return (jnp.where(jax.lax.axis_index(axes) == 0, jax.lax.pmax(gradient, axes), 0),)


_whole.defvjp(lambda leaf, axes: (leaf, None), _whole_backward)


def added(totals: Tree, gradients: Tree) -> Tree:
    """fp32 totals with gradients, trees like the parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, total, gradient: combine(path, total, gradient.astype(jnp.float32)), totals, gradients
    )


def number_of_parameters(params: Tree) -> int:
    """Numbers that training learns, in a tree of arrays or shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if not is_fp8_meta(path))


def without_fp8_meta(params: Tree) -> Tree:
    """A tree like the parameters, of nested dicts, without it."""
    if not isinstance(params, dict):
        return params
    return {name: without_fp8_meta(child) for name, child in params.items() if name != FP8_META}


def with_fp8_meta(params: Tree, source: Tree) -> Tree:
    """Inverse of `without_fp8_meta`: with that of another such tree."""
    if not isinstance(params, dict):
        return params
    return {name: child if name == FP8_META else with_fp8_meta(params[name], child) for name, child in source.items()}
