"""Refuses a mesh on which a large parameter would be copied to devices that it could be divided over.

Nobody notices such a copy before memory runs out: a dim without a logical axis is simply not divided. Copies that are
meant carry an axis that says so, see `AxisRules.whole`.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from megajax.config import ConfigError, ParallelConfig
from megajax.parallel.mesh import ZERO_AXES, stem
from megajax.parallel.sharding import AxisRules, MeshAxes, is_box, spec_of

LARGE_BYTES = 1 << 20
LARGE_SHARE = 0.01
"""Of the model's parameters. What is smaller than either costs no memory that anybody would miss."""


def refuse_accidental_copies(boxed: Any, rules: AxisRules, parallel: ParallelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks every parameter against tensor parallelism, and its optimizer state against ZeRO.

    Args:
      boxed: shapes and logical axes of the parameters, all of which `partition_specs` has accepted.

    Raises:
      ConfigError: a large one is not divided over an axis that the table has names for. The line says which, and the
        fix.
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    total = sum(_bytes(box) for _, box in leaves)
    for path, box in leaves:
        if _bytes(box) < max(LARGE_BYTES, LARGE_SHARE * total) or not rules.whole.isdisjoint(box.names):
            continue
        apart = "experts" in box.names and parallel.expert_tensor_parallel_size is not None
        for what, table, axis in _expected(rules, parallel, mesh):
            if apart and table is rules.table:
                continue  # how experts lie was said by a flag of its own
            if axis not in (mesh_axis for name in box.names if name is not None for mesh_axis in table[name]):
                where = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
                axes = ", ".join(name or "None" for name in box.names)
                names = [name for name in rules.parameters if axis in table[name] and name != "layers"]
                raise ConfigError(
                    f"{where}: {list(box.value.shape)} ({_bytes(box) / total:.0%} of the parameters) has the logical"
                    f" axes ({axes}), so {what} {spec_of(box.names, table)}, repeated over"
                    f" {axis}={mesh.shape[axis]}; name a dim {' or '.join(names)}, or 'whole' if that is meant"
                )


def _expected(
    rules: AxisRules, parallel: ParallelConfig, mesh: Mesh | AbstractMesh
) -> Iterator[tuple[str, Mapping[str, MeshAxes], str]]:
    """(what is divided, by which table, over which axis), for every axis that large parameters must use."""
    divided = [axis for axis, size in mesh.shape.items() if size > 1]
    for axis in divided:
        if stem(axis) == "tp":
            yield "its spec is", rules.table, axis
    if parallel.zero:
        for axis in divided:
            if stem(axis) in ZERO_AXES:
                yield f"with zero={parallel.zero} its optimizer state has the spec", rules.optimizer_table, axis


def _bytes(box: Any) -> int:
    return math.prod(box.value.shape) * box.value.dtype.itemsize
