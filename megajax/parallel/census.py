"""Census of a compiled program: which collectives it runs, over which mesh axes, how often and with how many bytes.

What counts is what XLA made of a program, so this reads the text of the compiled one, `compiled.as_text()`: of a CPU,
or of a GPU, where collectives come as pairs of `-start` and `-done`, wrapped in `async-start`, or inside of fusions.
Nothing has to run, and the devices need not exist: a program for a thousand GPUs can be compiled on a laptop.

The text is of one device's program, which all devices run.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import Literal, get_args

import numpy as np
from jax.sharding import Mesh

from megajax.parallel.hlo import Instruction, Where, bytes_of, dims_of, executed

Kind = Literal[
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      axes: the mesh axes that its groups span, outermost first, those of size 1 left out; of a permute, the axes along
        which something moves. None if the groups are no product of whole axes, as where XLA splits an axis in two.
      group_size: devices that take part together.
      arrays: how many XLA combined into this one collective.
      operand_bytes, result_bytes: of one device and one execution, all arrays together.
      loops: trip counts of the loops around it, outermost first; None where the program does not know.
      conditional: whether it stands in a branch, and may run less often than `times` says.
      op_name: where in the JAX program it comes from, as XLA remembers it: if not of itself, then of its first operand.
      name: of the instruction, to find it in the text.
    """

    kind: Kind
    axes: tuple[str, ...] | None
    group_size: int
    arrays: int
    operand_bytes: int
    result_bytes: int
    loops: tuple[int | None, ...]
    conditional: bool
    op_name: str
    name: str

    @property
    def times(self) -> int:
        """Executions in one run of the program: the product of the trip counts, where unknown ones count as 1.

        Each branch of a conditional counts as if it always ran.
        """
        return math.prod(trips or 1 for trips in self.loops)

    @property
    def bytes_sent(self) -> int:
        """Bytes that one device sends in one execution, if n devices in a ring pass on what they have:

            all-reduce            2 (n - 1) / n operand
            all-gather              (n - 1) / n result
            reduce-scatter          (n - 1) / n operand
            all-to-all              (n - 1) / n operand (ragged: of what both buffers have room for, if all send alike)
            permute, broadcast                  operand

        Trees and hardware that adds in the network send less; how long it takes is another question.
        """
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.operand_bytes if n > 1 else 0
        whole = self.result_bytes if self.kind == "all-gather" else self.operand_bytes
        if self.kind == "ragged-all-to-all":  # one of the buffers is as long as the worst case
            whole = min(self.operand_bytes, self.result_bytes)
        return (2 if self.kind == "all-reduce" else 1) * whole * (n - 1) // n

    def __str__(self) -> str:
        axes = "?" if self.axes is None else ", ".join(self.axes) or "one device"
        often = " x ".join(str(trips or "?") for trips in self.loops) or "1"
        sometimes = " at most" if self.conditional else ""
        sizes = f"{self.operand_bytes:,} -> {self.result_bytes:,} bytes"
        return f"{self.kind} over {axes}, {often} times{sometimes}, {sizes}: {self.op_name or self.name}"


def census(hlo_text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order in which they are written.

    Args:
      hlo_text: `compiled.as_text()`.
      mesh: the mesh that it was compiled for.

    Raises:
      ValueError: the program is for another number of devices, or is not written in a way known here.
    """
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", hlo_text)
    if partitions and int(partitions[1]) != mesh.size:
        raise ValueError(f"a program for {partitions[1]} devices has no census on a mesh of {mesh.size}")
    shape = tuple(mesh.shape.items())
    found = []
    for instruction, where in executed(hlo_text):
        kind = kind_of(instruction)
        if kind is not None:
            found.append(collective_of(kind, instruction, where, shape))
    return tuple(found)


def kind_of(instruction: Instruction) -> Kind | None:
    """Which collective an instruction is, or begins."""
    if instruction.opcode == "send" and "source_target_pairs" in instruction.attributes:
        return "collective-permute"  # cut in two by XLA
    opcode = instruction.opcode.removesuffix("-start")
    return next((kind for kind in get_args(Kind) if kind == opcode), None)


def collective_of(
    kind: Kind, instruction: Instruction, where: Where, mesh_shape: tuple[tuple[str, int], ...]
) -> Collective:
    """What the census says of one instruction. mesh_shape: names and sizes of the mesh's axes."""
    if kind == "collective-permute":
        axes, size = _moved_along(_written(r"source_target_pairs=\"?", instruction), mesh_shape)
    else:
        axes, size = _spanned(_written("replica_groups=", instruction), mesh_shape)
    operands = instruction.operands
    if kind == "ragged-all-to-all" or "slice_sizes=" in instruction.attributes or instruction.opcode == "send":
        operands = operands[:1]  # the others say where things go
    # Not from the shape of the result: that of an asynchronous start holds operands and more.
    operand_bytes = sum(bytes_of(instruction.beside[name].shape) for name in operands)
    factors = {"all-gather": (size, 1), "reduce-scatter": (1, size)}
    multiply, divide = factors.get(kind, (1, 1))
    if kind == "ragged-all-to-all":
        result_bytes = bytes_of(instruction.beside[instruction.operands[1]].shape)
    else:
        result_bytes = operand_bytes * multiply // divide
    return Collective(
        kind=kind,
        axes=axes,
        group_size=size,
        # Of an all-to-all, the parts for each device may be operands of their own.
        arrays=len(operands) // size if kind == "all-to-all" and len(operands) > 1 else len(operands),
        operand_bytes=operand_bytes,
        result_bytes=result_bytes,
        loops=where.loops,
        conditional=where.conditional,
        op_name=instruction.op_name,
        name=instruction.name,
    )


_LISTS = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\(.*?\)+)? \{[^}]*\}"


def _written(key: str, instruction: Instruction) -> str:
    match = re.search(f"{key}({_LISTS}|{_IOTA}|{_MESH})", instruction.attributes)
    if match is None:
        raise ValueError(f"{instruction.name}: no {key} in a form known here: {instruction.attributes[:200]}")
    return match[1]


@functools.lru_cache(maxsize=4096)
def _moved_along(written: str, mesh_shape: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """(axes along which any source and its target differ, devices along them)."""
    sizes = [size for _, size in mesh_shape]
    pairs = np.array(_lists(written), dtype=int).reshape(-1, 2)
    source, target = (np.array(np.unravel_index(ids, sizes)) for ids in pairs.T)
    moved = np.any(source != target, axis=1)
    axes = [axis for axis, differs in zip(mesh_shape, moved, strict=True) if differs]
    return tuple(name for name, _ in axes), math.prod(size for _, size in axes)


@functools.lru_cache(maxsize=4096)
def _spanned(written: str, mesh_shape: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...] | None, int]:
    """(axes whose product the groups are or None, devices in a group)."""
    names, sizes = [name for name, _ in mesh_shape], [size for _, size in mesh_shape]
    groups = _groups(written, math.prod(sizes))
    if len({len(group) for group in groups}) > 1:
        return None, max(len(group) for group in groups)
    groups = np.sort(groups, axis=1)
    coordinates = np.array(np.unravel_index(groups, sizes))
    inside = [dim for dim in range(len(sizes)) if np.any(coordinates[dim] != coordinates[dim, :, :1])]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    expected = np.moveaxis(ids, inside, range(-len(inside), 0)).reshape(-1, math.prod(sizes[dim] for dim in inside))
    whole = groups.shape == expected.shape and np.array_equal(groups[np.argsort(groups[:, 0])], expected)
    return (tuple(names[dim] for dim in inside) if whole else None), groups.shape[1]


def _groups(written: str, devices: int) -> np.ndarray | list[list[int]]:
    """Ids of devices [groups, devices of a group], or lists of unequal length. XLA writes groups in three ways:

    - `{{0,1},{2,3}}`: lists; `{}` for all devices.
    - `[2,4]<=[4,2]T(1,0)`: `arange(8).reshape(4, 2).transpose(1, 0).reshape(2, 4)`.
    - `mesh['a'=2,'b'=8] {'a','b':(2)2}`: along axes of a mesh of its own; of `b`, cut in 2, 2 and 2, the second part.
      The mesh may add its `device_ids=(0,2,1,3)`, or `([4,2]T(1,0))` as above.
    """
    if written.startswith("["):
        return _iota(written)
    if written.startswith("mesh"):
        return _along_axes(written)
    return _lists(written) or [list(range(devices))]


def _lists(written: str) -> list[list[int]]:
    return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", written)]


def _iota(written: str) -> np.ndarray:
    shape, source, order = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", written).groups()  # pyright: ignore
    ids = np.arange(math.prod(dims_of(source))).reshape(dims_of(source))
    return (ids.transpose(dims_of(order)) if order else ids).reshape(dims_of(shape))


def _along_axes(written: str) -> np.ndarray:
    mesh, named = written[:-1].rsplit("{", 1)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if listed := re.search(r"device_ids=\(([\d,]+)\)", mesh):
        ids = np.array(dims_of(listed[1]))
    elif permuted := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", mesh):
        ids = np.arange(ids.size).reshape(dims_of(permuted[1])).transpose(dims_of(permuted[2]))
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(named)]
    shape, inside = [], []
    for axis, length in sizes.items():
        ours = [(before, before * size) for name, before, size in parts if name == axis]
        for start, end in itertools.pairwise(sorted({1, length}.union(*ours))):
            if any(first <= start < last for first, last in ours):
                inside.append(len(shape))
            shape.append(end // start)
    members = math.prod(shape[dim] for dim in inside)
    return np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0)).reshape(-1, members)


_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
