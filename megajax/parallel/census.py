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
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
from jax.sharding import Mesh

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
            all-to-all              (n - 1) / n operand (ragged: if all send alike)
            permute, broadcast                  operand

        Trees and hardware that adds in the network send less; how long it takes is another question.
        """
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.operand_bytes if n > 1 else 0
        whole = self.result_bytes if self.kind == "all-gather" else self.operand_bytes
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
    for instruction, where in _executed(hlo_text):
        kind = _kind(instruction)
        if kind is not None:
            found.append(_collective(kind, instruction, where, shape))
    return tuple(found)


def dot_flops(hlo_text: str) -> int:
    """Floating-point operations in the matrix products that one device executes in one run of a compiled program.

    A product of [m, k] and [k, n] is 2 m k n. Those of a loop count once a trip, and those of a conditional's branches
    as if each always ran: in a pipeline's idle ticks, where no loss is due, more than is really done. Counted are
    `dot`s, in fusions too, and cuBLAS calls; not counted are convolutions, fused attention and kernels written by hand.
    """
    total = 0
    for instruction, where in _executed(hlo_text):
        if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
            total += _flops(instruction) * math.prod(trips or 1 for trips in where.loops)
    return total


# --- the text of a program

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s=(]+)[^=]*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([^\s=]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|(?:true|false)_computation|(?:called|branch)_computations)="
    r"(\{[^{}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,<=]*)\]")


class _Instruction(NamedTuple):
    """opcode, shape and attributes as written; operands: their names; beside: all of its computation, by name."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    beside: Mapping[str, _Instruction]

    @property
    def op_name(self) -> str:
        """Its own, or what is known of the first operand."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        if found:
            return found[1]
        first = self.beside.get(self.operands[0]) if self.operands else None
        return first.op_name if first else ""


class _Where(NamedTuple):
    loops: tuple[int | None, ...] = ()
    conditional: bool = False


def _executed(hlo_text: str) -> Iterator[tuple[_Instruction, _Where]]:
    """Instructions that run something, in every place from which they are called."""
    computations, entry = _computations(hlo_text)

    def visit(name: str, where: _Where) -> Iterator[tuple[_Instruction, _Where]]:
        for instruction in computations[name]:
            yield instruction, where
            # The end of an asynchronous operation may name the computation that its start has run.
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            inside = where
            if instruction.opcode == "while":
                trips = _TRIPS.search(instruction.attributes)
                inside = _Where((*where.loops, int(trips[1]) if trips else None), where.conditional)
            elif instruction.opcode == "conditional":
                inside = where._replace(conditional=True)
            for called in _CALLED.findall(instruction.attributes):
                for callee in re.findall(r"[\w.\-]+", called):
                    yield from visit(callee, inside)

    return visit(entry, _Where())


def _computations(hlo_text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(instructions of each computation, name of the one that is run)."""
    computations: dict[str, list[_Instruction]] = {}
    entry, instructions, beside = None, [], {}
    for line in _COMMENT.sub("", hlo_text).splitlines():
        if line[:1].isspace():
            match = _INSTRUCTION.match(line)
            if match:
                name, shape, opcode, rest = match.groups()
                end = _closing(rest)
                operands = tuple(_OPERAND.findall(rest[:end])) if opcode != "constant" else ()
                beside[name] = _Instruction(name, opcode, shape, operands, rest[end + 1 :], beside)
                instructions.append(beside[name])
        elif match := _COMPUTATION.match(line):
            instructions, beside = computations.setdefault(match[2], []), {}
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no entry computation")
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before `text`."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple; numbers of less than a byte are packed."""
    return sum(
        math.ceil(math.prod(_dims(dims)) * (int(bits) if bits else 8 * (kind == "pred")) / 8)
        for kind, bits, dims in _ARRAY.findall(shape)
    )


def _dims(dims: str) -> tuple[int, ...]:
    return tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)


# --- collectives


def _kind(instruction: _Instruction) -> Kind | None:
    if instruction.opcode == "send" and "source_target_pairs" in instruction.attributes:
        return "collective-permute"  # cut in two by XLA
    opcode = instruction.opcode.removesuffix("-start")
    return next((kind for kind in get_args(Kind) if kind == opcode), None)


def _collective(
    kind: Kind, instruction: _Instruction, where: _Where, mesh_shape: tuple[tuple[str, int], ...]
) -> Collective:
    if kind == "collective-permute":
        axes, size = _moved_along(_written(r"source_target_pairs=\"?", instruction), mesh_shape)
    else:
        axes, size = _spanned(_written("replica_groups=", instruction), mesh_shape)
    operands = instruction.operands
    if kind == "ragged-all-to-all" or "slice_sizes=" in instruction.attributes or instruction.opcode == "send":
        operands = operands[:1]  # the others say where things go
    # Not from the shape of the result: that of an asynchronous start holds operands and more.
    operand_bytes = sum(_bytes(instruction.beside[name].shape) for name in operands)
    factors = {"all-gather": (size, 1), "reduce-scatter": (1, size)}
    multiply, divide = factors.get(kind, (1, 1))
    if kind == "ragged-all-to-all":
        result_bytes = _bytes(instruction.beside[instruction.operands[1]].shape)
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


def _written(key: str, instruction: _Instruction) -> str:
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
    ids = np.arange(math.prod(_dims(source))).reshape(_dims(source))
    return (ids.transpose(_dims(order)) if order else ids).reshape(_dims(shape))


def _along_axes(written: str) -> np.ndarray:
    mesh, named = written[:-1].rsplit("{", 1)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if listed := re.search(r"device_ids=\(([\d,]+)\)", mesh):
        ids = np.array(_dims(listed[1]))
    elif permuted := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", mesh):
        ids = np.arange(ids.size).reshape(_dims(permuted[1])).transpose(_dims(permuted[2]))
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


# --- products


def _flops(instruction: _Instruction) -> int:
    """Of a `dot`, or of a cuBLAS call, which says in its configuration what it contracts."""
    contracted = re.search(
        r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes
    )
    if contracted is None:
        raise ValueError(f"{instruction.name}: does not say what it contracts: {instruction.attributes[:200]}")
    lhs, result = (
        _dims(_ARRAY.findall(shape)[0][2])
        for shape in (instruction.beside[instruction.operands[0]].shape, instruction.shape)
    )
    inner = _dims((contracted[1] or contracted[2] or "").replace('"', ""))
    return 2 * math.prod(result) * math.prod(lhs[dim] for dim in inner)
