"""Between a training state in memory and the logical tree on disk: names, shapes, and the unpadded vocabulary.

On disk every leaf is known by its path (`params/decoder/layers/mlp/linear_fc1/kernel`, `opt_state/0/mu/...`) and by
its logical shape. NamedTuples, dataclasses and dicts all become dicts, so that a state is compared by names alone.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from megajax.checkpoint.files import CheckpointError

Axes = tuple[str | None, ...]
VOCAB = "vocab"
NONE = "none"
"""The dtype recorded for a leaf that is None."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What `tree.json` says about one leaf: its logical shape, dtype name, and logical axes where known."""

    shape: tuple[int, ...]
    dtype: str
    axes: Axes | None = None

    def __str__(self) -> str:
        return "None" if self.dtype == NONE else f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bytes(self) -> int:
        """Size of the values, uncompressed."""
        return 0 if self.dtype == NONE else int(np.prod(self.shape, dtype=np.int64)) * jnp.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        axes = None if self.axes is None else list(self.axes)
        return {"shape": list(self.shape), "dtype": self.dtype, "axes": axes}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Leaf:
        """Inverse of `to_json`."""
        axes = None if entry["axes"] is None else tuple(entry["axes"])
        return cls(tuple(entry["shape"]), entry["dtype"], axes)


def flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in tree order; None counts as a leaf, empty containers have none.

    Raises:
      ValueError: two leaves have the same path (a key that contains "/").
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of the state have the same path; keys must not contain '/'")
    return named


def unflatten(target: Any, named: Mapping[str, Any]) -> Any:
    """A tree like `target` with the leaves of `named`, which has `flatten(target)`'s keys."""
    structure = jax.tree.structure(target, is_leaf=lambda x: x is None)
    return jax.tree.unflatten(structure, [named[name] for name in flatten(target)])


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def flatten_axes(logical_axes: Any) -> dict[str, Axes]:
    """Path -> axis names, of a tree whose leaves are tuples of names, PartitionSpecs, or None (dropped)."""

    def is_axes(node: Any) -> bool:
        plain = type(node) is tuple and all(entry is None or isinstance(entry, str) for entry in node)
        return node is None or plain or isinstance(node, PartitionSpec)

    pairs, _ = jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=is_axes)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    return {name: tuple(axes) for name, axes in named.items() if axes is not None}


def describe(named: Mapping[str, Any], axes: Mapping[str, Axes], vocab_size: int | None) -> dict[str, Leaf]:
    """The logical `Leaf` of every leaf: arrays, ShapeDtypeStructs, numpy or Python scalars, None.

    Raises:
      CheckpointError: a leaf is something else, its axes do not fit its shape, or it is smaller than the vocabulary.
    """
    leaves = {}
    for name, value in named.items():
        if value is None:
            leaves[name] = Leaf((), NONE)
            continue
        value = np.asarray(value) if isinstance(value, bool | int | float | complex) else value
        if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            raise CheckpointError(f"{name} is a {type(value).__name__}; a state to checkpoint holds arrays and scalars")
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"{name} is a typed PRNG key; keep its data, jax.random.key_data(key), in the state")
        of_leaf = axes.get(name)
        if of_leaf is not None and len(of_leaf) != len(value.shape):
            raise CheckpointError(f"{name}: the logical axes {of_leaf} do not fit its shape {tuple(value.shape)}")
        shape = _logical_shape(name, tuple(value.shape), of_leaf, vocab_size)
        leaves[name] = Leaf(shape, jnp.dtype(value.dtype).name, of_leaf)
    return leaves


def _logical_shape(name: str, shape: tuple[int, ...], axes: Axes | None, vocab_size: int | None) -> tuple[int, ...]:
    if axes is None or vocab_size is None or VOCAB not in axes:
        return shape
    dim = axes.index(VOCAB)
    if shape[dim] < vocab_size:
        raise CheckpointError(f"{name} has {shape[dim]} rows, fewer than vocab_size={vocab_size}; lower vocab_size")
    return (*shape[:dim], vocab_size, *shape[dim + 1 :])


def unpad(value: Any, leaf: Leaf) -> Any:
    """`value` cut to the logical shape of its leaf, and still sharded where `spread_evenly` finds a dim for it."""
    if value is None or isinstance(value, bool | int | float | complex):
        return None if value is None else np.asarray(value)
    if tuple(value.shape) == leaf.shape:
        return value
    if not isinstance(value, jax.Array):
        return value[tuple(slice(size) for size in leaf.shape)]
    sharding = value.sharding
    spread = spread_evenly(sharding, leaf.shape) if isinstance(sharding, NamedSharding) else None
    return _cut(value, leaf.shape, spread)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(value: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    value = jax.lax.slice(value, (0,) * len(shape), shape)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


def spread_evenly(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding with each mesh axis that does not divide its dim moved to one that it divides, else dropped.

    XLA would replicate the whole cut table on every device instead, which for a large vocabulary does not fit.
    """
    mesh = sharding.mesh
    spec = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    wanted = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    placed: list[list[str]] = [[] for _ in shape]
    homeless = []

    def fits(dim: int, axis: str) -> bool:
        return shape[dim] % int(np.prod([mesh.shape[a] for a in (*placed[dim], axis)])) == 0

    for dim, names in enumerate(wanted):
        for name in names:
            if fits(dim, name):
                placed[dim].append(name)
            else:
                homeless.append(name)
    for name in homeless:
        dim = next((dim for dim in range(len(shape)) if fits(dim, name)), None)
        if dim is not None:
            placed[dim].append(name)
    return NamedSharding(mesh, PartitionSpec(*(tuple(names) or None for names in placed)))


def same_kind(one: str, other: str) -> bool:
    """Whether a leaf stored with one dtype may be restored with the other: float to float, integer to integer."""
    if one == other:
        return True
    if NONE in (one, other):
        return False
    return any(jnp.issubdtype(one, kind) and jnp.issubdtype(other, kind) for kind in (jnp.floating, jnp.integer))


def first_difference(here: Mapping[str, Leaf], there: Mapping[str, Leaf]) -> tuple[str, str] | None:
    """The first leaf (parameters before the rest) that a restore cannot take over, and how it differs."""

    def parameters_first(name: str) -> bool:
        return name.split("/")[0] != "params"

    for name in sorted([*here, *(name for name in there if name not in here)], key=parameters_first):
        mine, stored = here.get(name), there.get(name)
        if mine is None or stored is None:
            return name, f"is {stored or 'absent'} there and {mine or 'absent'} here"
        if mine.shape != stored.shape or not same_kind(mine.dtype, stored.dtype):
            return name, f"is {stored} there and {mine} here"
    return None
