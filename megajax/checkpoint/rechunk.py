"""Copies the arrays of a step into other chunks, block by block, so that the host never holds a whole model.

On disk an array is zarr inside OCDBT (Orbax's layout), cut into chunks as the mesh that saved it had cut it into
shards. A restore reads every chunk that one of its shards touches; chunks that equal the shards are read once each.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from jax.sharding import AbstractMesh, NamedSharding

from megajax.checkpoint import files
from megajax.checkpoint.files import CheckpointError
from megajax.checkpoint.tree import NONE, VOCAB, Leaf, spread_evenly
from megajax.parallel.sharding import AxisRules, spec_of

_METADATA = "_METADATA"
_TOGETHER_BYTES = 16 << 20
"""Blocks are committed together up to this size, since every commit writes part of the index anew."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """How a leaf is to be stored. chunk: None keeps the chunks that it has."""

    leaf: Leaf
    chunk: Shape | None


def shard_shape(
    name: str,
    leaf: Leaf,
    rules: AxisRules,
    mesh: AbstractMesh,
    padded_vocab_size: int,
    *,
    params_as_optimizer: bool = False,
) -> Shape:
    """The shape of one device's part of a stored leaf when a run on `mesh` restores it.

    params_as_optimizer: as of `megajax.training.state.state_shardings`.

    Raises:
      ConfigError: a logical axis of the leaf is not in the sharding table.
    """
    if leaf.axes is None:
        return leaf.shape
    table = rules.optimizer_table if params_as_optimizer or name.startswith("opt_state/") else rules.table
    sizes = zip(leaf.axes, leaf.shape, strict=True)
    # A run pads the vocabulary before it divides it, so the last part that is stored may be smaller.
    shape = tuple(padded_vocab_size if axis == VOCAB else size for axis, size in sizes)
    return spread_evenly(NamedSharding(mesh, spec_of(leaf.axes, table, where=name)), shape).shard_shape(shape)


def copy_arrays(
    source: Path, target: Path, wanted: Mapping[str, Target], report: Callable[[str, int], None], *, called: Path
) -> dict[str, Shape]:
    """Writes arrays of the step `source` into the folder `target`, where Orbax finds them.

    Holds about four copies of the block at hand, which is at most its array, and as many of 16 MiB of smaller ones.

    Args:
      wanted: path -> how it is to be stored; leaves that are None are left out.
      report: called with the path and the bytes written after each block.
      called: what messages call the target, which may have a temporary name.

    Returns:
      path -> the chunks that it has now.

    Raises:
      CheckpointError: the source cannot be read, or the target cannot be written.
    """
    chunks = {}
    with _Writer(target, called) as writer:
        for name, how in wanted.items():
            if how.leaf.dtype == NONE:
                continue
            stored, before = _open(source, name, how.leaf.shape)
            chunks[name] = tuple(min(pair) for pair in zip(how.leaf.shape, how.chunk or before, strict=True))
            writer.create(name, how.leaf, chunks[name])
            for block in _blocks(how.leaf.shape, before, chunks[name]):
                with _reading(source, name):
                    value = stored[block].read().result()
                report(name, writer.write(block, value))
    _copy_metadata(source, target, chunks)
    return chunks


class _Writer:
    """Creates arrays and fills them; what has been written counts when the context has ended well."""

    def __init__(self, folder: Path, called: Path):
        import tensorstore

        self._ts: Any = tensorstore
        self._folder, self._called = folder, called
        self._transaction = self._ts.Transaction()
        self._pending = 0
        self._array: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._commit()
        else:
            self._transaction.abort()
            with contextlib.suppress(Exception):  # what is being written now must end before its folder goes away
                self._transaction.future.result()

    def create(self, name: str, leaf: Leaf, chunk: Shape) -> None:
        """Begins an array, to which `write` then writes."""
        with _writing(self._called):
            self._array = self._ts.open(
                # No compressor and no gaps, as in the steps that a run saves.
                _spec(self._folder, name) | {"metadata": {"compressor": None}, "store_data_equal_to_fill_value": True},
                create=True,
                dtype=self._ts.dtype(leaf.dtype),
                shape=leaf.shape,
                chunk_layout=self._ts.ChunkLayout(chunk_shape=[max(size, 1) for size in chunk]),
                transaction=self._transaction,
            ).result()

    def write(self, block: tuple[slice, ...], value: Any) -> int:
        """Writes a block, in the array's dtype; returns its bytes."""
        value = value.astype(self._array.dtype.numpy_dtype, copy=False)
        with _writing(self._called):
            if self._pending and self._pending + value.nbytes > _TOGETHER_BYTES:
                self._commit()
                self._array = self._array.with_transaction(self._transaction)
            self._array[block].write(value).result()
        self._pending += value.nbytes
        return value.nbytes

    def _commit(self) -> None:
        with _writing(self._called):
            self._transaction.commit_sync()
        self._transaction, self._pending = self._ts.Transaction(), 0


def _open(folder: Path, name: str, shape: Shape) -> tuple[Any, Shape]:
    """(the stored array, its chunks)."""
    import tensorstore

    with _reading(folder, name):
        stored: Any = tensorstore.open(_spec(folder, name), open=True).result()
    if stored.shape != shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {stored.shape}, not {shape} as {files.TREE_FILE} says; take another step"
        )
    return stored, tuple(stored.chunk_layout.read_chunk.shape or ())  # None for a scalar


def _spec(folder: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}}


def _blocks(shape: Shape, before: Shape, after: Shape) -> Iterator[tuple[slice, ...]]:
    """Covers an array with blocks of whole chunks, both old and new ones, so that each is read and written once."""
    steps = []
    for size, *chunks in zip(shape, before, after, strict=True):
        small, large = sorted(chunks)
        steps.append(range(0, size, large if small and large % small == 0 else max(size, 1)))
    for starts in itertools.product(*steps):
        yield tuple(slice(start, min(start + s.step, s.stop)) for start, s in zip(starts, steps, strict=True))


def _copy_metadata(source: Path, target: Path, chunks: Mapping[str, Shape]) -> None:
    """Orbax's list of arrays, cut down to those in `chunks`."""
    metadata = files.read_json(source / _METADATA)
    kept = {}
    for key, entry in metadata["tree_metadata"].items():
        name = "/".join(str(part["key"]) for part in entry["key_metadata"])
        if name in chunks:
            kept[key] = entry | {"value_metadata": entry["value_metadata"] | {"write_shape": chunks[name]}}
    files.write_text(target / _METADATA, json.dumps(metadata | {"tree_metadata": kept}))


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({files.reason(error)}); take another step") from error


@contextlib.contextmanager
def _writing(called: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = files.reason(error)
        raise CheckpointError(f"cannot write {called}: {why}; make room there, or give another folder") from error
