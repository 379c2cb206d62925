"""The text of a compiled program, `compiled.as_text()`, as instructions: what each reads, calls and computes.

Nothing has to run, and the devices need not exist: a program for a thousand GPUs can be compiled and read on a laptop.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

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


class Instruction(NamedTuple):
    """opcode, shape and attributes as written; operands: their names; beside: all of its computation, by name."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    beside: Mapping[str, Instruction]

    @property
    def op_name(self) -> str:
        """Its own, or what is known of the first operand."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        if found:
            return found[1]
        first = self.beside.get(self.operands[0]) if self.operands else None
        return first.op_name if first else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs: a loop's condition and body, a conditional's branches, a fusion's."""
        return tuple(
            callee for called in _CALLED.findall(self.attributes) for callee in re.findall(r"[\w.\-]+", called)
        )

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler knows it."""
        trips = _TRIPS.search(self.attributes)
        return int(trips[1]) if trips else None

    @property
    def reads(self) -> tuple[Instruction, ...]:
        """What its operands are."""
        return tuple(self.beside[name] for name in self.operands)


class Where(NamedTuple):
    """Trip counts of the loops around an instruction, outermost first, and whether it stands in a branch. share: of the
    times that all this tells, those when it runs."""

    loops: tuple[int | None, ...] = ()
    conditional: bool = False
    share: float = 1.0


def executed(hlo_text: str) -> Iterator[tuple[Instruction, Where]]:
    """Instructions that run something, in every place from which they are called."""
    computations, entry = computations_of(hlo_text)

    def visit(name: str, where: Where) -> Iterator[tuple[Instruction, Where]]:
        for instruction in computations[name]:
            yield instruction, where
            # The end of an asynchronous operation may name the computation that its start has run.
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            inside = where
            if instruction.opcode == "while":
                inside = where._replace(loops=(*where.loops, instruction.trips))
            elif instruction.opcode == "conditional":
                inside = where._replace(conditional=True)
            for callee in instruction.called:
                yield from visit(callee, inside)

    return visit(entry, Where())


def computations_of(hlo_text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of each computation, name of the one that is run)."""
    computations: dict[str, list[Instruction]] = {}
    entry, instructions, beside = None, [], {}
    for line in _COMMENT.sub("", hlo_text).splitlines():
        if line[:1].isspace():
            match = _INSTRUCTION.match(line)
            if match:
                name, shape, opcode, rest = match.groups()
                end = _closing(rest)
                operands = tuple(_OPERAND.findall(rest[:end])) if opcode != "constant" else ()
                beside[name] = Instruction(name, opcode, shape, operands, rest[end + 1 :], beside)
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


def bytes_of(shape: str) -> int:
    """Of an array, or of all arrays of a tuple; numbers of less than a byte are packed."""
    return sum(
        math.ceil(math.prod(dims_of(dims)) * (int(bits) if bits else 8 * (kind == "pred")) / 8)
        for kind, bits, dims in _ARRAY.findall(shape)
    )


def arrays_of(shape: str) -> list[tuple[int, ...]]:
    """The dims of an array, or of all arrays of a tuple."""
    return [dims_of(dims) for _, _, dims in _ARRAY.findall(shape)]


def dims_of(dims: str) -> tuple[int, ...]:
    """Dims as written between brackets."""
    return tuple(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)


def dot_flops(hlo_text: str) -> int:
    """Floating-point operations in the matrix products that one device executes in one run of a compiled program.

    A product of [m, k] and [k, n] is 2 m k n. Those of a loop count once a trip, and those of a conditional's branches
    as if each always ran: in a pipeline's idle ticks, where no loss is due, more than is really done. Counted are
    `dot`s, in fusions too, and cuBLAS calls; not counted are convolutions, fused attention and kernels written by hand.
    """
    total = 0
    for instruction, where in executed(hlo_text):
        if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
            total += flops_of(instruction) * math.prod(trips or 1 for trips in where.loops)
    return total


def flops_of(instruction: Instruction) -> int:
    """Of a `dot`, or of a cuBLAS call, which says in its configuration what it contracts."""
    contracted = re.search(
        r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes
    )
    if contracted is None:
        raise ValueError(f"{instruction.name}: does not say what it contracts: {instruction.attributes[:200]}")
    lhs, result = (arrays_of(shape)[0] for shape in (instruction.reads[0].shape, instruction.shape))
    inner = dims_of((contracted[1] or contracted[2] or "").replace('"', ""))
    return 2 * math.prod(result) * math.prod(lhs[dim] for dim in inner)
