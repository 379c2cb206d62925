"""Parameters and caches with each layer's arrays by themselves, as a step of decoding reads them fastest.

Training stacks the layers' arrays [L, ...], so that a scan compiles one layer whatever the depth. A step of decoding
does little but read them, and a scan copies each layer's out of the stack, which is three times the bytes. Where every
layer has arrays of its own the products read these, for a program that takes longer to compile: its size grows with L.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from megajax.parallel.sharding import is_box
from megajax.transformer.stack import Segment

Tree = Any


def apart(params: Tree, segments: Mapping[tuple[str, ...], tuple[Segment, ...]]) -> Tree:
    """A tuple of the layers' own trees in the place of each stack; what is not stacked stays as it is.

    Args:
      params: arrays, or their shapes and places.
      segments: the blocks by path, as of `megajax.models.family.Family.layer_segments`.
    """
    for path, of_block in segments.items():
        repeats = {stack.name: stack.repeats for segment in of_block for stack in segment.stacks}
        params = _replaced(params, path, lambda block, repeats=repeats: _split(block, repeats))
    return params


def alike(cache: Tree, params: Tree) -> Tree:
    """The cache, of arrays or their boxes, with the layers apart whose parameters are."""
    if isinstance(params, tuple):
        return tuple(_row_of(cache, index) for index in range(len(params)))
    if isinstance(cache, Mapping) and isinstance(params, Mapping):
        return {name: alike(tree, params.get(name)) for name, tree in cache.items()}
    return cache


def _replaced(tree: Tree, path: tuple[str, ...], change: Callable[[Tree], Tree]) -> Tree:
    if not path:
        return change(tree)
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], change)}


def _split(block: Tree, repeats: Mapping[str, int]) -> Tree:
    stacks = {name: tuple(_row_of(block.get(name, {}), i) for i in range(n)) for name, n in repeats.items()}
    return {**block, **stacks}


def _row_of(stacked: Tree, index: int) -> Tree:
    return jax.tree.map(lambda leaf: _row(leaf, index), stacked, is_leaf=is_box)


def _row(leaf: Any, index: int) -> Any:
    if is_box(leaf):
        return leaf.replace(value=_row(leaf.value, index), names=leaf.names[1:])
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[index]
    place = leaf.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)
