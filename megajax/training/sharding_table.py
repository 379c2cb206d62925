"""The table of `--print-sharding`: where every parameter lies, and what it costs each device."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from megajax.config import Config
from megajax.models.family import Family
from megajax.parallel.gradient_sums import number_of_parameters
from megajax.parallel.mesh import describe, fewest_devices, make_abstract_mesh
from megajax.parallel.sharding import spec_of
from megajax.training.blueprint import Blueprint, draw_up

_UNITS = ("B", "KiB", "MiB", "GiB")
_LEGEND = """
Axes and specs have one entry a dim, - for none; mesh axes of size 1 are left out. Gradients are counted in float32.
Every device holds as much, the padding of vocabulary and uneven pipeline stages included. Activations come on top.
"""


class Row(NamedTuple):
    """A parameter. spec, state_spec: of it and of its optimizer state; the sizes are bytes on one device."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    spec: PartitionSpec
    state_spec: PartitionSpec
    parameter: int
    gradient: int
    state: int


def sharding_table(config: Config, family: Family, *, devices: int | None, present: int) -> str:
    """The text for a config whose vocabulary size is known. Compiles nothing and allocates no parameter.

    Args:
      devices: of the mesh, which need not exist; None takes the `present` ones where they make a mesh, else the fewest
        that do.

    Raises:
      ConfigError: the devices, or the model, cannot be divided like that.
    """
    if devices is None:
        fewest = fewest_devices(config.parallel)
        devices = fewest if present % fewest else present
    mesh = make_abstract_mesh(config.parallel, devices)
    drawn = draw_up(config, family, mesh)
    rows, rest = rows_of(drawn)
    stored = drawn.stages.abstract_stored(drawn.abstract_state.params)
    known = "" if devices == present else f"; this machine has {present}"
    head = (
        f"{config.model_family}: {number_of_parameters(stored):,} parameters in {config.model.params_dtype},"
        f" optimizer {config.optimizer.optimizer}, zero={config.parallel.zero}\n"
        f"{devices} device{'s' * (devices > 1)}: {describe(mesh)}{known}\n"
    )
    return f"{head}\n{_format(rows, rest, mesh)}\n{_LEGEND.rstrip()}"


def rows_of(drawn: Blueprint) -> tuple[list[Row], int]:
    """(the parameters, bytes on one device of what else the state holds)."""
    state = drawn.abstract_state
    named = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    axes = {
        _name(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(
            drawn.param_axes, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    kept, rest = dict.fromkeys(named, 0), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.replace(params=None)):
        names = _name(path).split("/")  # optimizers nest whole parameter trees: a suffix of the path is a parameter
        owner = next((name for i in range(len(names)) if (name := "/".join(names[i:])) in named), None)
        if owner is None:
            rest += _bytes(leaf.shape, leaf.dtype, leaf.sharding)
        else:
            kept[owner] += _bytes(leaf.shape, leaf.dtype, leaf.sharding)
    rows = []
    for name, leaf in named.items():
        of_gradient = NamedSharding(drawn.mesh, spec_of(axes[name], drawn.rules.gradient_table))  # type: ignore[arg-type]
        rows.append(
            Row(
                name=name,
                shape=leaf.shape,
                axes=axes[name],
                spec=leaf.sharding.spec,
                state_spec=spec_of(axes[name], drawn.rules.optimizer_table),
                parameter=_bytes(leaf.shape, leaf.dtype, leaf.sharding),
                gradient=_bytes(leaf.shape, np.float32, of_gradient),
                state=kept[name],
            )
        )
    return rows, rest


def _bytes(shape: tuple[int, ...], dtype: Any, place: Any) -> int:
    return math.prod(place.shard_shape(shape)) * np.dtype(dtype).itemsize


def _name(path: Any) -> str:
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(map(str, keys))


def _format(rows: Sequence[Row], rest: int, mesh: Mesh | AbstractMesh) -> str:
    """Aligned columns; parameters of one module stand together, under what their names have in common."""
    totals = [sum(column) for column in zip(*((row.parameter, row.gradient, row.state) for row in rows), strict=True)]
    unit = min(3, max(0, int(math.log(max(sum(totals), 1), 1024) - 0.2)))

    def sizes(*values: int) -> list[str]:
        return [f"{value / 1024**unit:,.2f}" if unit else str(value) for value in values]

    titles = ["parameter", "shape", "logical axes", "spec", "state spec", "param", "grad", f"state {_UNITS[unit]}"]
    table: list[list[str]] = [titles]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        *parents, owner, leaf = row.name.split("/") if "/" in row.name else ("", row.name)
        spec, state_spec = _spec(row.spec, mesh), _spec(row.state_spec, mesh)
        groups.setdefault("/".join(parents), []).append(
            [
                f"{'  ' if parents else ''}{owner}/{leaf}",
                "x".join(map(str, row.shape)),
                ",".join(name or "-" for name in row.axes),
                spec,
                "same" if state_spec == spec else state_spec,
                *sizes(row.parameter, row.gradient, row.state),
            ]
        )
    for group, lines in groups.items():
        table += [[f"{group}/"], *lines] if group else lines
    table.append(["other state", *[""] * 6, *sizes(rest)])
    table.append(["total", *[""] * 4, *sizes(*totals[:2], totals[2] + rest)])
    full = [line for line in table if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    texts = [
        "  ".join(cell.ljust(width) if i < 5 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (zip(line, widths[: len(line)], strict=True) for line in table)
    ]
    [everything] = sizes(sum(totals) + rest)
    return "\n".join([*texts, f"together {everything} {_UNITS[unit]} on each device"])


def _spec(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> str:
    """`pp,-,dp+ep`: the mesh axes above 1 that divide each dim."""
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    return ",".join("+".join(axis for axis in entry if mesh.shape[axis] > 1) or "-" for entry in entries)
