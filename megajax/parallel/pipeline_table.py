"""A pipeline that runs any schedule: at each tick every stage looks up what to do and branches to it.

A manual region over `pp` alone, one scan over the ticks of a table. The branches differ between stages at one tick, but
every member of a stage's tensor-, context- and data-parallel groups takes the same one, so that they may hold these
groups' collectives; what crosses stages stays outside of them. Against the lockstep engine of `pipeline.py` it costs a
branch a tick and buys any order of operations: 1F1B with the activations of p instead of 2 p - 1 microbatches, GPipe,
and ZB-H1, whose weight gradients are operations of their own.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from megajax.parallel.branch_check import branch_of_some_stages
from megajax.parallel.gradient_sums import combine_at
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

FORWARD, BACKWARD = 1 + KINDS.index("F"), 1 + KINDS.index("B")
"""Of `StageTicks.kind`."""


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
) -> tuple[Params, Array]:
    """As `pipeline_gradients`, for any number of blocks, by a valid schedule of the chunks of all of them together."""

    def region(params: Params, rows: tuple[Tree, ...], work: Work) -> tuple[Params, Array]:
        return replicas.reduced(*_Engine(pieces, schedule, params, rows, work, gradient_specs).gradients())

    gradients = manual_part(replicas.specs if replicas.axes else specs, (PP, *replicas.axes))
    return over_stages(region, specs, (gradients, PartitionSpec()), replicas)(params, rows, work)


class _Buffers(NamedTuple):
    """Of a block, leaves [slots, ...]. saved: what F keeps until B or, where W needs it, until W. aside: what B
    keeps for W."""

    saved: list[Array]
    aside: list[Array]


class _Block(NamedTuple):
    """How the layers of a block are run. longer: of each array that F keeps whether W needs it."""

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
    ) -> None:
        self.pieces, self.schedule, self.work, self.gradient_specs = pieces, schedule, work, gradient_specs
        self.plan = plan_ticks(schedule, len(pieces.blocks))
        self.stage = jax.lax.axis_index(PP)
        self.chunks = Chunks(params.staged, rows, schedule.chunks)
        self.params = params._replace(staged=self.chunks.params)
        self.ends = Ends(pieces, params.shared, work, schedule.stages, gradient_specs)
        self.blocks = [self._block(index, block) for index, block in enumerate(pieces.blocks)]

    def _block(self, index: int, block: BlockFn) -> _Block:
        like, first = self.ends.x_like, self.work.at(jnp.int32(0))
        chunk = self.chunks.at(index, jnp.int32(index * self.chunks.of_block))
        residuals = Residuals.of(block, chunk, like, first)
        split = SplitResiduals.of(residuals, chunk, like, first) if self.schedule.splits_backward else None
        return _Block(residuals, split, split.longer if split else (False,) * len(residuals.shapes))

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
        buffers = tuple(self._buffers(index, block) for index, block in enumerate(self.blocks))
        return _Carry(none, none, inputs, waiting, buffers, zero_sums(self.params))

    def _buffers(self, index: int, block: _Block) -> _Buffers:
        slots = self.plan.slots
        lengths = (slots.saved_longer[index] if longer else slots.saved[index] for longer in block.longer)
        saved = [room(length, shape) for length, shape in zip(lengths, block.residuals.shapes, strict=True)]
        return _Buffers(saved, room(slots.aside[index], list(block.split.cut.aside)) if block.split else [])

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
        waiting = _written(waiting, dy, mine.leaving)
        sums = self.ends.enter_backward(events.returns != NONE, jnp.maximum(events.returns, 0), out, sums)
        from_before = self._sent(events.sends_forward, out, 1)
        return _Carry(from_before, self._sent(events.sends_backward, out, -1), inputs, waiting, buffers, sums), None

    def _sent(self, sends: Array, out: Tree, by: int) -> Tree:
        # Whether it is an output or a gradient, and for whom, the table knows.
        return jax.lax.cond(sends == 1, lambda: shift(out, self.schedule.stages, by), lambda: zeros(out))

    def _operation(self, mine: StageTicks, x: Tree, g: Tree, carry: _Carry) -> tuple[Tree, tuple[_Buffers, ...], Tree]:
        """(gradients of the staged parameters, buffers, output or gradient of the input) after the operation.

        Branches read the buffers and return what is new. It is written here: a branch that returned a buffer would
        return a copy, and so would every other.
        """
        work, buffers, count = self.work.at(mine.microbatch), carry.buffers, len(self.blocks)

        def result(index: int, changed: _Change) -> tuple[tuple[_Change, ...], Tree]:
            out = zeros(x) if changed.out is None else changed.out
            changes = [self._nothing(other, buffers[other]) for other in range(count)]
            changes[index] = changes[index].replaced_by(changed)
            return tuple(self._laid_out(*pair) for pair in enumerate(changes)), as_stream(out)

        runs: list[Callable[[int], _Change]] = [
            lambda index: self._forward(index, mine, x, work),
            lambda index: self._backward(index, mine, g, work, buffers[index]),
        ]
        if self.schedule.splits_backward:
            runs.append(lambda index: self._weights(index, mine, work, buffers[index]))
        branches = [lambda: result(0, _Change())]
        branches += [lambda run=run, index=index: result(index, run(index)) for run in runs for index in range(count)]
        block = jnp.maximum(mine.chunk, 0) // self.chunks.of_block
        branch = jnp.where(mine.kind == 0, 0, 1 + (mine.kind - 1) * count + block)
        changes, out = branch_of_some_stages(branch, branches)
        staged = tuple(self._added(i, t, c, mine) for i, (t, c) in enumerate(self._pairs(carry, changes)))
        new = tuple(self._stored(i, b, c, mine) for i, (b, c) in enumerate(zip(buffers, changes, strict=True)))
        return laid_out(staged, self.gradient_specs.staged), new, out

    @staticmethod
    def _pairs(carry: _Carry, changes: tuple[_Change, ...]) -> zip[tuple[Tree, _Change]]:
        return zip(carry.sums.gradients.staged, changes, strict=True)

    def _nothing(self, index: int, buffers: _Buffers) -> _Change:
        """What changes nothing: of buffers the first slot as it is, of gradients zeros."""
        gradients = jax.tree.map(lambda p: jnp.zeros(p.shape[1:], jnp.float32), self.chunks.params[index])
        saved, aside = at_index(list(buffers), jnp.int32(0))
        return _Change(None, saved, aside, gradients)

    def _laid_out(self, index: int, change: _Change) -> _Change:
        gradients = jax.tree.map(lambda d: d.astype(jnp.float32), change.gradients)
        return change._replace(out=None, gradients=laid_out(gradients, self.gradient_specs.staged[index]))

    def _added(self, index: int, totals: Tree, change: _Change, mine: StageTicks) -> Tree:
        here = jnp.clip(self.chunks.place(index, mine.chunk), 0, self.chunks.of_block - 1)
        return jax.tree_util.tree_map_with_path(
            lambda path, total, d: combine_at(path, total, here, d), totals, change.gradients
        )

    def _stored(self, index: int, buffers: _Buffers, change: _Change, mine: StageTicks) -> _Buffers:
        ours = jnp.maximum(mine.chunk, 0) // self.chunks.of_block == index
        forward, backward = ours & (mine.kind == FORWARD), ours & (mine.kind == BACKWARD)
        saved = [
            put_at(buffer, leaf, jnp.where(forward, mine.saved_longer if longer else mine.saved, 0))
            for buffer, leaf, longer in zip(buffers.saved, change.kept or [], self.blocks[index].longer, strict=True)
        ]
        return _Buffers(saved, put_at(buffers.aside, change.aside, jnp.where(backward, mine.aside, 0)))

    def _forward(self, index: int, mine: StageTicks, x: Tree, work: Work) -> _Change:
        y, kept = self.blocks[index].residuals.forward(self.chunks.at(index, mine.chunk), x, work)
        return _Change(y, kept)

    def _saved(self, index: int, mine: StageTicks, buffers: _Buffers) -> list[Array]:
        slots = (mine.saved_longer if longer else mine.saved for longer in self.blocks[index].longer)
        return [_read(buffer, slot) for buffer, slot in zip(buffers.saved, slots, strict=True)]

    def _backward(self, index: int, mine: StageTicks, g: Tree, work: Work, buffers: _Buffers) -> _Change:
        block, chunk, saved = self.blocks[index], self.chunks.at(index, mine.chunk), self._saved(index, mine, buffers)
        if block.split is None:
            d_params, dx = block.residuals.backward(chunk, saved, work, g)
            return _Change(dx, gradients=d_params)
        dx, aside = block.split.input_gradient(chunk, saved, work, g)
        return _Change(dx, aside=aside)

    def _weights(self, index: int, mine: StageTicks, work: Work, buffers: _Buffers) -> _Change:
        block, saved = self.blocks[index], self._saved(index, mine, buffers)
        assert block.split is not None
        kept = [leaf if longer else None for leaf, longer in zip(saved, block.longer, strict=True)]
        aside = at_index(buffers.aside, mine.aside)
        chunk = self.chunks.at(index, mine.chunk)
        return _Change(gradients=block.split.parameter_gradients(chunk, kept, work, aside))


class _Change(NamedTuple):
    """What an operation on a block leaves behind, None: nothing. out: for a neighbour. kept: by F, for B and W. aside:
    by B, for W. gradients: of the parameters of the chunk."""

    out: Tree = None
    kept: list[Array] | None = None
    aside: list[Array] | None = None
    gradients: Tree = None

    def replaced_by(self, other: _Change) -> _Change:
        """With what another one has."""
        return _Change(*(mine if its is None else its for mine, its in zip(self, other, strict=True)))


def _read(buffer: Tree, slot: Array) -> Tree:
    return at_index(buffer, jnp.maximum(slot, 0))


def _written(buffer: Tree, value: Tree, slot: Array) -> Tree:
    """With `value` in its slot, if it has one."""
    return put_at(buffer, select(slot == NONE, _read(buffer, slot), value), jnp.maximum(slot, 0))
