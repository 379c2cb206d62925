"""What is alive in a compiled program when it needs the most memory, by XLA's own account.

XLA writes how long each buffer lives, and which of them are alive at the peak, to the folder that the compiler option
`xla_dump_to` names. What lies there is read here and joined with the program's text, which knows where in the JAX
program a buffer comes from.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megajax.parallel.hlo import Instruction, computations_of

_PEAK = re.compile(r"Live ranges at (\d+) \(peak\):")
_BUFFER = re.compile(r"(\S+?)\{([\d,]*)\}: (\d+) bytes")
_VALUE = re.compile(r"\s*value: <\d+ ([^\s{]+)(?:\{([\d,]*)\})? (?:\(phi\) )?@\d+> \(size=(\d+),offset=(\d+)\)")
_STEP = re.compile(r"(\d+):(\S+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\]")


class LiveBuffer(NamedTuple):
    """A buffer that is alive at the peak.

    Attributes:
      size: bytes.
      dtype, shape: of the array in it, as XLA writes them: `f32`, dims. None if they are not known.
      argument: whether it lies in an argument of the program: is one, or was written over one that is donated.
      local: whether what runs at the peak, in its own loop body, made it, and not in what the loop carries; otherwise
        it waits for something outside.
      op_name: where in the JAX program it comes from.
    """

    name: str
    size: int
    dtype: str | None
    shape: tuple[int, ...] | None
    argument: bool
    local: bool
    op_name: str


def compile_and_watch(lowered: Any) -> tuple[Any, tuple[LiveBuffer, ...]]:
    """(the executable of `jax.jit(...).lower(...)` for a GPU, what is alive at its peak, the largest first)."""
    with tempfile.TemporaryDirectory(prefix="megajax-plan-") as folder:
        executable = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        # The largest module is the step itself; small ones are constants that XLA has folded.
        found = sorted(Path(folder).glob("*-live-range.txt"), key=lambda path: path.stat().st_size)
        if not found:
            return executable, ()
        assignment = found[-1].with_name(found[-1].name.replace("-live-range.txt", "-buffer-assignment.txt"))
        return executable, live_at_peak(found[-1].read_text(), assignment.read_text(), executable.as_text())


def live_at_peak(report: str, assignment: str, hlo_text: str) -> tuple[LiveBuffer, ...]:
    """The buffers of a live-range report of XLA, the largest first; none where the report names no peak.

    Args:
      report, assignment: what XLA writes of when buffers live, and where they lie.
      hlo_text: the compiled program.
    """
    peak = _PEAK.search(report)
    if peak is None:
        return ()
    computations, entry = computations_of(hlo_text)
    known = {instruction.name: instruction for body in computations.values() for instruction in body}
    places = _places(assignment)
    program = _Program(
        known=known,
        home={instruction.name: name for name, body in computations.items() for instruction in body},
        entry=entry,
        places=places,
        carried=frozenset(_carried(places, known)),
    )
    running = program.home.get(_step(report[: peak.start()], int(peak[1])))
    found = []
    for line in report[peak.end() :].splitlines()[1:]:
        match = _BUFFER.match(line.strip())
        if match is None:
            break
        found.append((match[1], match[2], int(match[3])))
    distinct = _distinct(found, program.places)
    return tuple(program.buffer(name, index, size, running) for name, index, size in distinct)


def _distinct(
    found: list[tuple[str, str, int]], places: Mapping[tuple[str, str], _Place]
) -> list[tuple[str, str, int]]:
    """Without values that lie where a larger one does: the result of a branch, say, and that of its conditional."""
    taken: dict[str, list[tuple[int, int]]] = {}
    kept = []
    for name, index, size in sorted(found, key=lambda value: -value[2]):
        place = places.get((name, index))
        if place is not None:
            others = taken.setdefault(place.allocation, [])
            if any(begin < place.offset + size and place.offset < end for begin, end in others):
                continue
            others.append((place.offset, place.offset + size))
        kept.append((name, index, size))
    return kept


def _step(report: str, step: int) -> str:
    """The instruction at a step of the sequence."""
    sequence = report.split("BufferLiveRange", 1)[0]
    return next((name for number, name in _STEP.findall(sequence) if int(number) == step), "")


class _Place(NamedTuple):
    """Where a value lies."""

    allocation: str
    argument: bool
    offset: int
    size: int


def _places(assignment: str) -> dict[tuple[str, str], _Place]:
    """(name, index) of a value -> where it lies."""
    found, allocation, argument = {}, "", False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            allocation, argument = line.split(":")[0], ", parameter " in line
        elif match := _VALUE.match(line):
            found[match[1], match[2] or ""] = _Place(allocation, argument, offset=int(match[4]), size=int(match[3]))
    return found


def _carried(places: Mapping[tuple[str, str], _Place], known: Mapping[str, Instruction]) -> Iterator[_Place]:
    """Where loops carry something from turn to turn."""
    for (name, _), place in places.items():
        instruction = known.get(name)
        if instruction is not None and instruction.opcode in ("parameter", "while") and not place.argument:
            yield place


class _Program(NamedTuple):
    """known: instructions by name; home: their computations; places: where values lie; carried: those of loops."""

    known: dict[str, Instruction]
    home: dict[str, str]
    entry: str
    places: Mapping[tuple[str, str], _Place]
    carried: frozenset[_Place]

    def buffer(self, name: str, index: str, size: int, running: str | None) -> LiveBuffer:
        """running: the computation that runs at the peak."""
        place = self.places.get((name, index))
        argument = place is not None and place.argument
        instruction = self.known.get(name)
        if instruction is None:
            return LiveBuffer(name, size, None, None, argument=argument, local=False, op_name="")
        arrays = _ARRAY.findall(instruction.shape)
        element = int(index.split(",")[0]) if index else 0
        dtype, dims = arrays[element] if element < len(arrays) else (None, "")
        return LiveBuffer(
            name,
            size,
            dtype,
            None if dtype is None else tuple(int(dim) for dim in dims.split(",") if dim),
            argument=argument,
            local=self.home[name] == running != self.entry and place not in self.carried,
            op_name=instruction.op_name,
        )
