"""What an engine reads at each tick of a schedule: operations, slots of its buffers, and what arrives from where."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from megajax.parallel.schedules import KINDS, Cells, Kind, Op, Schedule, in_parts

NONE = -1
"""Instead of a slot or a microbatch: there is none."""

Rows = Any
"""A numpy array; in an engine, the traced array of a tick, or one stage's number of it."""

_At = tuple[int, int]
"""(chunk, microbatch) on a stage."""
_Ticks = dict[tuple[Kind, int, int, int], list[int]]
"""When (kind, stage, chunk, microbatch) runs: the ticks of its parts."""


class StageTicks(NamedTuple):
    """Of each tick and stage, int32 [ticks, stages]; slots are NONE where nothing is read or written.

    kind: 0 idle, 1 F, 2 B, 3 W. part: of a B, the last layers' first. input: F's input; NONE where the model begins.
    gradient: what B starts from. saved, saved_longer: what F keeps until B, and until W. aside: what B keeps for W.
    arriving_input, arriving_gradient: where what the neighbours sent at the tick before belongs. leaving: where the
    gradient of this F's loss belongs. midway: where the gradient belongs that a part of B hands to the next part.
    """

    kind: Rows
    part: Rows
    chunk: Rows
    microbatch: Rows
    input: Rows
    gradient: Rows
    saved: Rows
    saved_longer: Rows
    aside: Rows
    arriving_input: Rows
    arriving_gradient: Rows
    leaving: Rows
    midway: Rows


class Events(NamedTuple):
    """Of each tick, int32 [ticks]: the microbatch that all stages embed for stage 0, whose loss they work out, and
    whose gradient they lead through the embedding, or NONE; and whether (0, 1) any stage sends to the next, or back."""

    enters: Rows
    leaves: Rows
    returns: Rows
    sends_forward: Rows
    sends_backward: Rows


class Slots(NamedTuple):
    """Lengths of the buffers: as few as the busiest stage can do with. What F and B keep has buffers for each block."""

    input: int
    gradient: int
    saved: tuple[int, ...]
    saved_longer: tuple[int, ...]
    aside: tuple[int, ...]


class Plan(NamedTuple):
    """A schedule as arrays."""

    stage_ticks: StageTicks
    events: Events
    slots: Slots


def plan_ticks(schedule: Schedule, blocks: int = 1, parts: int = 1) -> Plan:
    """A valid schedule as arrays. blocks: of layers that the chunks are divided over, the first chunks being of the
    first. parts: of a backward."""
    cells = in_parts(schedule, parts)
    shape = (len(cells), schedule.stages)
    arrays = StageTicks(*(np.full(shape, NONE, np.int32) for _ in StageTicks._fields))
    ticks: _Ticks = {}
    for name in ("kind", "part", "chunk", "microbatch"):
        getattr(arrays, name)[:] = 0
    for tick, stage in np.ndindex(shape):
        cell = cells[tick][stage]
        if cell is not None:
            op, part = cell
            at = tick, stage
            arrays.kind[at], arrays.part[at] = 1 + KINDS.index(op.kind), part
            arrays.chunk[at], arrays.microbatch[at] = op.chunk, op.microbatch
            ticks.setdefault((op.kind, stage, op.chunk, op.microbatch), []).append(tick)
    lengths: dict[str, list[int]] = {name: [0] * blocks for name in Slots._fields}
    of_block = schedule.chunks // blocks
    for stage in range(schedule.stages):
        for buffer, everything in _held(schedule, ticks, stage).items():
            apart = blocks if buffer in ("saved", "saved_longer", "aside") else 1
            for block in range(apart):
                held = {at: use for at, use in everything.items() if apart == 1 or at[0] // of_block == block}
                slots = _assign({at: (begin, end) for at, (begin, end, _) in held.items()})
                lengths[buffer][block] = max(lengths[buffer][block], 1 + max(slots.values(), default=-1))
                for at, (_, _, uses) in held.items():
                    for name, tick in uses:
                        getattr(arrays, name)[tick, stage] = slots[at]
    [input_slots, *_], [gradient_slots, *_] = lengths["input"], lengths["gradient"]
    kept = (tuple(lengths[name]) for name in ("saved", "saved_longer", "aside"))
    return Plan(arrays, _events(schedule, cells, parts), Slots(input_slots, gradient_slots, *kept))


_Held = dict[_At, tuple[int, int, list[tuple[str, int]]]]
"""(first tick, last tick, where the slot is to be written down) of what a buffer holds."""


def _held(schedule: Schedule, ticks: _Ticks, stage: int) -> dict[str, _Held]:
    """What the buffers of a stage hold, and when."""
    last_stage, last = schedule.stages - 1, schedule.virtual_stages - 1
    held: dict[str, _Held] = {name: {} for name in Slots._fields}
    for chunk, i in np.ndindex(schedule.chunks, schedule.microbatches):
        here = chunk * schedule.stages + stage
        [f], b = ticks["F", stage, chunk, i], ticks["B", stage, chunk, i]
        reads = [("gradient", tick) for tick in b] + [("midway", tick) for tick in b[:-1]]
        if here > 0:
            [sent] = ticks["F", *reversed(divmod(here - 1, schedule.stages)), i]
            held["input"][chunk, i] = (sent + 1, f, [("arriving_input", sent + 1), ("input", f)])
        if here < last:
            sent = ticks["B", *reversed(divmod(here + 1, schedule.stages)), i][-1]
            held["gradient"][chunk, i] = (sent + 1, b[-1], [("arriving_gradient", sent + 1), *reads])
        else:
            assert stage == last_stage
            held["gradient"][chunk, i] = (f + 1, b[-1], [("leaving", f), *reads])
        held["saved"][chunk, i] = (f, b[-1], [("saved", tick) for tick in (f, *b)])
        if schedule.splits_backward:
            [w] = ticks["W", stage, chunk, i]
            held["saved_longer"][chunk, i] = (f, w, [("saved_longer", t) for t in (f, *b, w)])
            held["aside"][chunk, i] = (b[-1], w, [("aside", b[-1]), ("aside", w)])
    return held


def _assign(intervals: dict[_At, tuple[int, int]]) -> dict[_At, int]:
    """A slot for each interval of ticks, ends included, so that no two of a slot overlap; as few slots as possible."""
    slots: dict[_At, int] = {}
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    used = 0
    for at, (begin, end) in sorted(intervals.items(), key=lambda item: item[1]):
        while busy and busy[0][0] < begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            slots[at] = heapq.heappop(free)
        else:
            slots[at], used = used, used + 1
        heapq.heappush(busy, (end, slots[at]))
    return slots


def _events(schedule: Schedule, cells: Cells, parts: int) -> Events:
    first, last = 0, schedule.virtual_stages - 1

    def virtual(stage: int, op: Op) -> int:
        return op.chunk * schedule.stages + stage

    def microbatch(ops: Iterable[tuple[int, Op]], kind: Kind, at: int) -> int:
        return next((op.microbatch for stage, op in ops if op.kind == kind and virtual(stage, op) == at), NONE)

    rows = []
    for row in cells:
        ended = [(stage, *cell) for stage, cell in enumerate(row) if cell is not None]
        ops = [(stage, op) for stage, op, part in ended if op.kind != "B" or part == parts - 1]
        rows.append(
            (
                microbatch(ops, "F", first),
                microbatch(ops, "F", last),
                microbatch(ops, "B", first),
                any(op.kind == "F" and virtual(stage, op) != last for stage, op in ops),
                any(op.kind == "B" and virtual(stage, op) != first for stage, op in ops),
            )
        )
    return Events(*np.array(rows, np.int32).T)


assert KINDS == ("F", "B", "W"), "StageTicks.kind says so"
