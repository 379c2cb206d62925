"""A pipeline that runs any schedule: at each tick every stage looks up what to do and does that.

A manual region over `pp` alone, one scan over the ticks of a table. Operations differ between stages at one tick, but
every member of a stage's tensor-, context- and data-parallel groups runs the same one, so that they may hold these
groups' collectives; what crosses stages stays outside of them. Each is a loop of one turn or none: see
`run_on_some_stages`. Against the lockstep engine of `pipeline.py` that buys any order of operations: 1F1B with the
activations of p instead of 2 p - 1 microbatches, GPipe, and ZB-H1, whose weight gradients are operations of their own.

The price: stages meet at the end of each tick, so a tick takes as long as the longest operation in it. A backward is
cut into parts, some of its layers each, that take about as long as a forward, so that stages wait less for each other.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from megajax.parallel.branch_check import run_on_some_stages
from megajax.parallel.in_place import Row, Target, adding, is_target
from megajax.parallel.pipeline_pieces import (
    PP,
    BlockFn,
    Chunks,
    Ends,
    Params,
    Pieces,
    Sums,
    Work,
    as_stream,
    at_index,
    finished,
    laid_out,
    over_stages,
    put_at,
    room,
    select,
    shift,
    zero_sums,
    zeros,
)
from megajax.parallel.pipeline_residuals import Residuals, SplitResiduals
from megajax.parallel.replicas import ALIKE, Replicas, manual_part
from megajax.parallel.schedule_ticks import NONE, Events, StageTicks, plan_ticks
from megajax.parallel.schedules import KINDS, Schedule

Array = jax.Array
Tree = Any

FORWARD, BACKWARD, WEIGHTS = (1 + KINDS.index(kind) for kind in ("F", "B", "W"))
"""Of `StageTicks.kind`."""


def loop_of(kind: int, part: int = 0) -> str:
    """What the loop of one turn or none is called, in which an operation runs, in the names of its instructions."""
    return f"stage_{('forward', 'backward', 'weights')[kind - 1]}_{part}"


def table_gradients(
    pieces: Pieces,
    schedule: Schedule,
    params: Params,
    rows: tuple[Tree, ...],
    work: Work,
    *,
    specs: Params,
    gradient_specs: Params,
    replicas: Replicas = ALIKE,
    parts: int = 1,
) -> tuple[Params, Array]:
    """As `pipeline_gradients`, for any number of blocks, by a valid schedule of the chunks of all of them together.

    Args:
      parts: of a backward; with more than one, each block is one stack of at least so many layers a chunk.
    """

    def region(params: Params, rows: tuple[Tree, ...], work: Work) -> tuple[Params, Array]:
        return replicas.reduced(*_Engine(pieces, schedule, params, rows, work, gradient_specs, parts).gradients())

    gradients = manual_part(replicas.specs if replicas.axes else specs, (PP, *replicas.axes))
    return over_stages(region, specs, (gradients, PartitionSpec()), replicas)(params, rows, work)


class _Buffers(NamedTuple):
    """Of a block, leaves [slots, ...]. saved: what each part of F keeps until B or, where W needs it, until W. aside:
    what B keeps for W."""

    saved: tuple[list[Array], ...]
    aside: list[Array]


class _Part(NamedTuple):
    """Some of the layers of a block, `count` from the `first` on. longer: of each array that F keeps whether W needs
    it."""

    first: int
    count: int
    residuals: Residuals
    split: SplitResiduals | None
    longer: tuple[bool, ...]


class _Carry(NamedTuple):
    """What goes from tick to tick. from_before, from_after: what the neighbours sent. inputs, output_gradients: what
    waits for its F and its B, [slots, ...]."""

    from_before: Tree
    from_after: Tree
    inputs: Tree
    output_gradients: Tree
    buffers: tuple[_Buffers, ...]
    sums: Sums


class _Engine:
    """One stage's view of the table, inside the manual region."""

    def __init__(
        self,
        pieces: Pieces,
        schedule: Schedule,
        params: Params,
        rows: tuple[Tree, ...],
        work: Work,
        gradient_specs: Params,
        parts: int,
    ) -> None:
        self.pieces, self.schedule, self.work, self.gradient_specs = pieces, schedule, work, gradient_specs
        self.plan = plan_ticks(schedule, len(pieces.blocks), parts)
        self.stage = jax.lax.axis_index(PP)
        self.chunks = Chunks(params.staged, rows, schedule.chunks)
        self.params = params._replace(staged=self.chunks.params)
        self.ends = Ends(pieces, params.shared, work, schedule.stages, gradient_specs)
        self.blocks = [self._parts(index, block, parts) for index, block in enumerate(pieces.blocks)]

    def _parts(self, index: int, block: BlockFn, parts: int) -> tuple[_Part, ...]:
        like, first_work, first_chunk = self.ends.x_like, self.work.at(jnp.int32(0)), index * self.chunks.of_block
        count = self.chunks.layers(index)
        found = []
        for part in range(parts):
            first, end = part * count // parts, (part + 1) * count // parts
            chunk = self.chunks.at(index, jnp.int32(first_chunk), first, end - first)
            residuals = Residuals.of(block, chunk, like, first_work)
            split = SplitResiduals.of(residuals, chunk, like, first_work) if self.schedule.splits_backward else None
            longer = split.longer if split else (False,) * len(residuals.shapes)
            found.append(_Part(first, end - first, residuals, split, longer))
        return tuple(found)

    def gradients(self) -> tuple[Params, Array]:
        """All ticks."""
        ticks = jax.tree.map(jnp.asarray, (self.plan.stage_ticks, self.plan.events))
        carry, _ = jax.lax.scan(self._tick, self._start(), ticks)
        gradients, loss = carry.sums
        return finished(gradients, self.pieces), loss

    def _start(self) -> _Carry:
        slots, like = self.plan.slots, self.ends.x_like
        none = zeros(like)
        inputs, waiting = (room(max(count, 1), like) for count in (slots.input, slots.gradient))
        buffers = tuple(self._buffers(index, parts) for index, parts in enumerate(self.blocks))
        return _Carry(none, none, inputs, waiting, buffers, zero_sums(self.params))

    def _buffers(self, index: int, parts: tuple[_Part, ...]) -> _Buffers:
        slots = self.plan.slots

        def of_part(part: _Part) -> list[Array]:
            lengths = (slots.saved_longer[index] if longer else slots.saved[index] for longer in part.longer)
            return [room(length, shape) for length, shape in zip(lengths, part.residuals.shapes, strict=True)]

        aside = [room(slots.aside[index], list(part.split.cut.aside)) for part in parts if part.split is not None]
        return _Buffers(tuple(map(of_part, parts)), aside[0] if aside else [])

    def _tick(self, carry: _Carry, tick: tuple[StageTicks, Events]) -> tuple[_Carry, None]:
        mine: StageTicks = at_index(tick[0], self.stage)
        events = tick[1]
        inputs = _written(carry.inputs, carry.from_before, mine.arriving_input)
        waiting = _written(carry.output_gradients, carry.from_after, mine.arriving_gradient)
        new = self.ends.enter(events.enters != NONE, jnp.maximum(events.enters, 0))
        x = select(mine.input == NONE, new, _read(inputs, mine.input))
        staged, buffers, out = self._operation(mine, x, _read(waiting, mine.gradient), carry)
        sums = carry.sums._replace(gradients=carry.sums.gradients._replace(staged=staged))
        sums, dy = self.ends.leave(events.leaves != NONE, jnp.maximum(events.leaves, 0), out, sums)
        waiting = _written(_written(waiting, dy, mine.leaving), out, mine.midway)
        sums = self.ends.enter_backward(events.returns != NONE, jnp.maximum(events.returns, 0), out, sums)
        from_before = self._sent(events.sends_forward, out, 1)
        return _Carry(from_before, self._sent(events.sends_backward, out, -1), inputs, waiting, buffers, sums), None

    def _sent(self, sends: Array, out: Tree, by: int) -> Tree:
        # Whether it is an output or a gradient, and for whom, the table knows.
        return jax.lax.cond(sends == 1, lambda: shift(out, self.schedule.stages, by), lambda: zeros(out))

    def _operation(self, mine: StageTicks, x: Tree, g: Tree, carry: _Carry) -> tuple[Tree, tuple[_Buffers, ...], Tree]:
        """(gradients of the staged parameters, buffers, output or gradient of the input) after the operation."""
        work, out = self.work.at(mine.microbatch), as_stream(zeros(x))
        staged, buffers = list(carry.sums.gradients.staged), list(carry.buffers)
        block = jnp.maximum(mine.chunk, 0) // self.chunks.of_block
        for index, parts in enumerate(self.blocks):

            def due(kind: int, part: int = 0, index: int = index) -> Array:
                return (mine.kind == kind) & (mine.part == part) & (block == index)

            forward = partial(self._forward, index, mine, x, work)
            saved, out = run_on_some_stages(due(FORWARD), forward, (buffers[index].saved, out), loop_of(FORWARD))
            buffers[index] = buffers[index]._replace(saved=saved)
            for part in range(len(parts)):
                backward = partial(self._backward, index, mine, part, g, work, saved)
                state = staged[index], buffers[index].aside, out
                staged[index], aside, out = run_on_some_stages(
                    due(BACKWARD, part), backward, state, loop_of(BACKWARD, part)
                )
                buffers[index] = buffers[index]._replace(aside=aside)
            if self.schedule.splits_backward:
                weights = partial(self._weights, index, mine, work, buffers[index])
                staged[index] = run_on_some_stages(due(WEIGHTS), weights, staged[index], loop_of(WEIGHTS))
        return laid_out(tuple(staged), self.gradient_specs.staged), tuple(buffers), out

    def _chunk(self, index: int, part: _Part, mine: StageTicks) -> tuple[Tree, Tree]:
        return self.chunks.at(index, mine.chunk, part.first, part.count)

    def _saved(self, part: _Part, mine: StageTicks, buffers: list[Array]) -> list[Row]:
        slots = (mine.saved_longer if longer else mine.saved for longer in part.longer)
        return [Row(buffer, (slot,)) for buffer, slot in zip(buffers, slots, strict=True)]

    def _forward(self, index: int, mine: StageTicks, x: Tree, work: Work, state: Tree) -> Tree:
        saved, _ = state
        after = []
        for part, buffers in zip(self.blocks[index], saved, strict=True):
            into = [Target(row) for row in self._saved(part, mine, buffers)]
            x, kept = part.residuals.forward(self._chunk(index, part, mine), x, work, into)
            after.append(kept)
        return tuple(after), as_stream(x)

    def _backward(
        self, index: int, mine: StageTicks, turn: int, g: Tree, work: Work, saved: tuple[list[Array], ...], state: Tree
    ) -> Tree:
        place = len(self.blocks[index]) - 1 - turn  # the last layers first
        part, (sums, aside, _) = self.blocks[index][place], state
        chunk, kept = self._chunk(index, part, mine), self._saved(part, mine, saved[place])
        if part.split is None:
            sums, dx = part.residuals.backward(chunk, kept, work, g, into=self._targets(index, part, mine, sums))
            return sums, aside, as_stream(dx)
        dx, new = part.split.input_gradient(chunk, [row.read() for row in kept], work, g)
        return sums, put_at(aside, new, mine.aside), as_stream(dx)

    def _weights(self, index: int, mine: StageTicks, work: Work, buffers: _Buffers, sums: Tree) -> Tree:
        [part], [saved] = self.blocks[index], buffers.saved
        assert part.split is not None
        rows = zip(self._saved(part, mine, saved), part.longer, strict=True)
        kept = [row.read() if longer else None for row, longer in rows]
        aside = at_index(buffers.aside, mine.aside)
        into = self._targets(index, part, mine, sums)
        gradients = part.split.parameter_gradients(self._chunk(index, part, mine), kept, work, aside)
        return jax.tree.map(lambda target, gradient: target.with_value(gradient), into, gradients, is_leaf=is_target)

    def _targets(self, index: int, part: _Part, mine: StageTicks, sums: Tree) -> Tree:
        rows = self.chunks.of_rows(index, sums, mine.chunk, part.first, part.count)
        return jax.tree_util.tree_map_with_path(lambda path, row: Target(row, partial(adding, path)), rows)


def _read(buffer: Tree, slot: Array) -> Tree:
    return at_index(buffer, jnp.maximum(slot, 0))


def _written(buffer: Tree, value: Tree, slot: Array) -> Tree:
    """With `value` in its slot, if it has one."""
    return put_at(buffer, select(slot == NONE, _read(buffer, slot), value), jnp.maximum(slot, 0))
