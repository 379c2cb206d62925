"""A pipeline that runs any schedule: at each tick every stage looks up what to do and branches to it.

A manual region over `pp` alone, one scan over the ticks of a table. The branches differ between stages at one tick, but
every member of a stage's tensor-, context- and data-parallel groups takes the same one, so that they may hold these
groups' collectives; what crosses stages stays outside of them. Against the lockstep engine of `pipeline.py` it costs a
branch a tick and buys any order of operations: 1F1B with the activations of p instead of 2 p - 1 microbatches, GPipe,
and ZB-H1, whose weight gradients are operations of their own.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from megajax.parallel.pipeline_pieces import (
    PP,
    Ends,
    Params,
    Pieces,
    Sums,
    Work,
    as_stream,
    at_index,
    by_chunk,
    laid_out,
    manual_specs,
    over_stages,
    put_at,
    room,
    shift,
    zero_sums,
)
from megajax.parallel.pipeline_residuals import Residuals, SplitResiduals
from megajax.parallel.schedule_ticks import NONE, Events, StageTicks, plan_ticks
from megajax.parallel.schedules import Schedule

Array = jax.Array
Tree = Any


def table_gradients(
    pieces: Pieces,
    schedule: Schedule,
    params: Params,
    rows: Tree,
    work: Work,
    *,
    specs: Params,
    gradient_specs: Params,
) -> tuple[Params, Array]:
    """As `pipeline_gradients`, by a valid schedule."""

    def region(params: Params, rows: Tree, work: Work) -> tuple[Params, Array]:
        return _Engine(pieces, schedule, params, rows, work, gradient_specs).gradients()

    return over_stages(region, specs, out_specs=(manual_specs(specs), PartitionSpec()))(params, rows, work)


class _Buffers(NamedTuple):
    """Leaves [slots, ...]. saved: what F keeps until B or, where W needs it, until W. aside: what B keeps for W."""

    saved: list[Array]
    aside: list[Array]


class _Carry(NamedTuple):
    """What goes from tick to tick. from_before, from_after: what the neighbours sent. inputs, output_gradients: what
    waits for its F and its B, [slots, ...]."""

    from_before: Array
    from_after: Array
    inputs: Array
    output_gradients: Array
    buffers: _Buffers
    sums: Sums


class _Engine:
    """One stage's view of the table, inside the manual region."""

    def __init__(
        self, pieces: Pieces, schedule: Schedule, params: Params, rows: Tree, work: Work, gradient_specs: Params
    ) -> None:
        self.schedule, self.work, self.gradient_specs = schedule, work, gradient_specs
        self.plan = plan_ticks(schedule)
        self.stage = jax.lax.axis_index(PP)
        self.params = params._replace(staged=by_chunk(params.staged, schedule.chunks))
        self.rows = by_chunk(rows, schedule.chunks)
        self.ends = Ends(pieces, params.shared, work, schedule.stages, gradient_specs)
        chunk, first = self._chunk(jnp.int32(0)), work.at(jnp.int32(0))
        self.residuals = Residuals.of(pieces.stage, chunk, self.ends.x_like, first)
        self.split = (
            SplitResiduals.of(self.residuals, chunk, self.ends.x_like, first) if schedule.splits_backward else None
        )
        self.longer = self.split.longer if self.split else (False,) * len(self.residuals.shapes)

    def gradients(self) -> tuple[Params, Array]:
        """All ticks."""
        ticks = jax.tree.map(jnp.asarray, (self.plan.stage_ticks, self.plan.events))
        carry, _ = jax.lax.scan(self._tick, self._start(), ticks)
        gradients, loss = carry.sums
        return gradients._replace(staged=jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), gradients.staged)), loss

    def _start(self) -> _Carry:
        slots, like = self.plan.slots, self.ends.x_like
        lengths = (slots.saved_longer if longer else slots.saved for longer in self.longer)
        saved = [room(length, shape) for length, shape in zip(lengths, self.residuals.shapes, strict=True)]
        aside = [room(slots.aside, shape) for shape in self.split.cut.aside] if self.split else []
        zeros = jnp.zeros(like.shape, like.dtype)
        inputs, waiting = (room(max(count, 1), like) for count in (slots.input, slots.gradient))
        return _Carry(zeros, zeros, inputs, waiting, _Buffers(saved, aside), zero_sums(self.params))

    def _chunk(self, chunk: Array) -> tuple[Tree, Tree]:
        return at_index((self.params.staged, self.rows), chunk)

    def _tick(self, carry: _Carry, tick: tuple[StageTicks, Events]) -> tuple[_Carry, None]:
        mine: StageTicks = at_index(tick[0], self.stage)
        events = tick[1]
        inputs = _written(carry.inputs, carry.from_before, mine.arriving_input)
        waiting = _written(carry.output_gradients, carry.from_after, mine.arriving_gradient)
        new = self.ends.enter(events.enters != NONE, jnp.maximum(events.enters, 0))
        x = jnp.where(mine.input == NONE, new, _read(inputs, mine.input))
        staged, buffers, out = self._operation(mine, x, _read(waiting, mine.gradient), carry)
        sums = carry.sums._replace(gradients=carry.sums.gradients._replace(staged=staged))
        sums, dy = self.ends.leave(events.leaves != NONE, jnp.maximum(events.leaves, 0), out, sums)
        waiting = _written(waiting, dy, mine.leaving)
        sums = self.ends.enter_backward(events.returns != NONE, jnp.maximum(events.returns, 0), out, sums)
        from_before = self._sent(events.sends_forward, out, 1)
        return _Carry(from_before, self._sent(events.sends_backward, out, -1), inputs, waiting, buffers, sums), None

    def _sent(self, sends: Array, out: Array, by: int) -> Array:
        # Whether it is an output or a gradient, and for whom, the table knows.
        return jax.lax.cond(sends == 1, lambda: shift(out, self.schedule.stages, by), lambda: jnp.zeros_like(out))

    def _operation(self, mine: StageTicks, x: Array, g: Array, carry: _Carry) -> tuple[Tree, _Buffers, Array]:
        """(gradients of the staged parameters, buffers, output or gradient of the input) after the operation."""
        work = self.work.at(mine.microbatch)
        staged, buffers = carry.sums.gradients.staged, carry.buffers

        def result(staged: Tree, buffers: _Buffers, out: Array | None) -> tuple[Tree, _Buffers, Array]:
            out = jnp.zeros_like(x) if out is None else out
            return laid_out(staged, self.gradient_specs.staged), buffers, as_stream(out)

        def add(gradients: Tree) -> Tree:
            return jax.tree.map(lambda total, g: total.at[mine.chunk].add(g.astype(total.dtype)), staged, gradients)

        def saved() -> list[Array]:
            slots = (mine.saved_longer if longer else mine.saved for longer in self.longer)
            return [_read(buffer, slot) for buffer, slot in zip(buffers.saved, slots, strict=True)]

        def idle() -> tuple[Tree, _Buffers, Array]:
            return result(staged, buffers, None)

        def forward() -> tuple[Tree, _Buffers, Array]:
            y, kept = self.residuals.forward(self._chunk(mine.chunk), x, work)
            slots = (mine.saved_longer if longer else mine.saved for longer in self.longer)
            new = [put_at(buffer, leaf, slot) for buffer, leaf, slot in zip(buffers.saved, kept, slots, strict=True)]
            return result(staged, buffers._replace(saved=new), y)

        def backward() -> tuple[Tree, _Buffers, Array]:
            if self.split is None:
                d_params, dx = self.residuals.backward(self._chunk(mine.chunk), saved(), work, g)
                return result(add(d_params), buffers, dx)
            dx, aside = self.split.input_gradient(self._chunk(mine.chunk), saved(), work, g)
            return result(staged, buffers._replace(aside=put_at(buffers.aside, aside, mine.aside)), dx)

        def weights() -> tuple[Tree, _Buffers, Array]:
            assert self.split is not None
            kept = [leaf if longer else None for leaf, longer in zip(saved(), self.longer, strict=True)]
            aside = at_index(buffers.aside, mine.aside)
            d_params = self.split.parameter_gradients(self._chunk(mine.chunk), kept, work, aside)
            return result(add(d_params), buffers, None)

        branches = [idle, forward, backward] + ([weights] if self.split else [])
        return jax.lax.switch(mine.kind, branches)


def _read(buffer: Array, slot: Array) -> Array:
    return at_index(buffer, jnp.maximum(slot, 0))


def _written(buffer: Array, value: Array, slot: Array) -> Array:
    """With `value` in its slot, if it has one."""
    return put_at(buffer, jnp.where(slot == NONE, _read(buffer, slot), value), jnp.maximum(slot, 0))
