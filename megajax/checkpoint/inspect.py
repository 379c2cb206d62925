"""Looking into a checkpoint folder without reading its arrays: settings, and path, shape and dtype of every leaf."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megajax.checkpoint import files
from megajax.checkpoint.files import CheckpointError
from megajax.checkpoint.tree import Axes, Leaf


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One stored leaf: its step, path, logical shape, dtype name, uncompressed size, and logical axes where known."""

    step: int
    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    axes: Axes | None


def read_config(directory: str | Path, *, step: int | None = None) -> dict[str, Any]:
    """`config.json` of a step (default: the newest): `step`, `family`, `model_config`.

    Raises:
      CheckpointError: no checkpoint there, no such step, or an unreadable file.
    """
    return files.read_json(_folder(Path(directory), step)[1] / files.CONFIG_FILE)


def inspect(directory: str | Path, *, step: int | None = None) -> list[LeafRow]:
    """The leaves of a step (default: the newest), in the order of the state that was saved.

    Raises:
      CheckpointError: no checkpoint there, no such step, or an unreadable file.
    """
    step, folder = _folder(Path(directory), step)
    leaves = {path: Leaf.from_json(entry) for path, entry in files.read_json(folder / files.TREE_FILE).items()}
    return [LeafRow(step, path, leaf.shape, leaf.dtype, leaf.bytes, leaf.axes) for path, leaf in leaves.items()]


def format_rows(rows: list[LeafRow]) -> str:
    """The rows as a table with a line of totals, one leaf a line."""
    width = max((len(row.path) for row in rows), default=0)
    lines = [
        f"{row.path:<{width}}  {Leaf(row.shape, row.dtype)!s:<28} {row.bytes:>14,} bytes"
        + (f"  ({', '.join(axis or '-' for axis in row.axes)})" if row.axes else "")
        for row in rows
    ]
    step = rows[0].step if rows else "-"
    return "\n".join([*lines, f"step {step}: {len(rows)} leaves, {sum(row.bytes for row in rows):,} bytes"])


def _folder(directory: Path, step: int | None) -> tuple[int, Path]:
    steps = files.require_steps(directory)
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory}: has no step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    return step, files.step_folder(directory, step)
