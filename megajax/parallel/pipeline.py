"""Lockstep 1F1B: every stage runs the same program, one forward and one backward of a chunk a tick, without a branch.

A manual region over `pp` alone; the other axes stay automatic inside. With p stages, v chunks a stage and m
microbatches, tick t runs on stage s

    forward of item  t - s                        for t in [0, n + p - 1)
    backward of item t - (v p - 1) - (p - 1 - s)  for t in [v p - 1, v p - 1 + n + p - 1)

where the n = v m items are ordered in groups of p microbatches, each group once a chunk: forwards through the chunks
upwards, backwards downwards (circular placement, as in Megatron's interleaved schedule, arXiv:2104.04473). What a stage
sends arrives one tick later, exactly when its neighbour needs it. Warm-up ticks run forwards only, cool-down ticks
backwards only, so the time is (n + p - 1) (F + B) of a chunk: 1F1B's, with a bubble of (p - 1) / (v m). Only where
stages have far fewer layers than others do they branch, around each layer that they may not have.

Between forward and backward, what the derivative needs waits in a ring of 2 v p - 1 slots, whatever m is. It is what
`jax.vjp` keeps, so the recomputation policy of the layers decides its size, and no forward is repeated unless asked.

On the last stage, a tick's backward begins with the loss of its forward. With `beside` it waits a tick longer, so that
the two need nothing of each other and run in one loop over layers: one's collectives beside the other's arithmetic.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from megajax.parallel.branch_check import branch_of_some_stages
from megajax.parallel.in_place import Row, Target, adding, is_target, whole
from megajax.parallel.pipeline_pieces import (
    PP,
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
from megajax.parallel.pipeline_residuals import Residuals
from megajax.parallel.replicas import ALIKE, Replicas, manual_part
from megajax.parallel.side_by_side import side_by_side

Array = jax.Array
Tree = Any


class Item(NamedTuple):
    """A chunk's pass over a microbatch. valid: False for ticks that only keep step."""

    chunk: Array
    microbatch: Array
    slot: Array
    valid: Array


@dataclasses.dataclass(frozen=True)
class Lockstep:
    """When what runs. Times are ticks; a traced tick or stage is fine everywhere.

    beside: the forward and the backward of a tick run side by side, a tick after the loss.
    """

    stages: int
    chunks: int
    microbatches: int
    beside: bool = False

    @property
    def items(self) -> int:
        """Items a stage runs; with chunks the last group of microbatches is filled up."""
        groups = -(-self.microbatches // self.stages)
        return self.microbatches if self.chunks == 1 else groups * self.stages * self.chunks

    @property
    def slots(self) -> int:
        """Room for the items between their forward and their backward on one stage."""
        # With few items, one slot more than items: what runs only to keep step must not overwrite one of them.
        return min(2 * self.stages * self.chunks - 1, self.items + 1)

    @property
    def first_backward(self) -> int:
        """The tick of the first backward."""
        return self.stages * self.chunks - 1 + self.beside

    @property
    def forward_ticks(self) -> int:
        """Ticks until every forward is done."""
        return self.items + self.stages - 1

    @property
    def ticks(self) -> int:
        """Ticks in all."""
        return self.first_backward + self.forward_ticks

    def forward(self, tick: Array, stage: Array | int) -> Item:
        """What `stage` runs forward at `tick`."""
        index = tick - stage
        group, rest = jnp.divmod(index, self.stages * self.chunks)
        chunk, member = jnp.divmod(rest, self.stages)
        return self._item(index, chunk, group * self.stages + member, index)

    def backward(self, tick: Array, stage: Array | int) -> Item:
        """What `stage` runs backward at `tick`."""
        index = tick - self.first_backward - (self.stages - 1 - stage)
        group, rest = jnp.divmod(index, self.stages * self.chunks)
        passes, member = jnp.divmod(rest, self.stages)
        chunk = self.chunks - 1 - passes
        forward = (group * self.chunks + chunk) * self.stages + member
        return self._item(index, chunk, group * self.stages + member, forward)

    def _item(self, index: Array, chunk: Array, microbatch: Array, forward: Array) -> Item:
        inside = (index >= 0) & (index < self.items)
        slot = jnp.where(inside, forward, self.items) % self.slots if self.slots > self.items else forward % self.slots
        valid = inside & (microbatch < self.microbatches)
        return Item(chunk, jnp.clip(microbatch, 0, self.microbatches - 1), slot, valid)


def pipeline_gradients(
    pieces: Pieces,
    schedule: Lockstep,
    params: Params,
    rows: tuple[Tree, ...],
    work: Work,
    *,
    specs: Params,
    gradient_specs: Params,
    replicas: Replicas = ALIKE,
) -> tuple[Params, Array]:
    """Gradients of the weighted sum of all token losses, and the sum of the masked ones.

    The model has one block of layers: with several, stages would be in different ones at the same tick.

    Args:
      rows: for each block arrays [p v n]: what it is told of the rows of the parameters.
      specs, gradient_specs: partition specs of the parameters, and of the gradients while they add up.
      replicas: those that add up their own gradients.

    Returns:
      (gradients like params in fp32, fp32 scalar).
    """

    def region(params: Params, rows: tuple[Tree, ...], work: Work) -> tuple[Params, Array]:
        return replicas.reduced(*_Engine(pieces, schedule, params, rows, work, gradient_specs).gradients())

    gradients = manual_part(replicas.specs if replicas.axes else specs, (PP, *replicas.axes))
    return over_stages(region, specs, (gradients, PartitionSpec()), replicas)(params, rows, work)


def pipeline_loss(
    pieces: Pieces, schedule: Lockstep, params: Params, rows: tuple[Tree, ...], work: Work, *, specs: Params
) -> Array:
    """The sum of the masked token losses alone: the forward half of the schedule, whose chunks are those of all blocks
    together."""

    def region(params: Params, rows: tuple[Tree, ...], work: Work) -> Array:
        return _Engine(pieces, schedule, params, rows, work).loss()

    return over_stages(region, specs, out_specs=PartitionSpec())(params, rows, work)


class _Carry(NamedTuple):
    """What goes from tick to tick. x, g: from the neighbours, an input and the gradient of an output. y: the last
    output here. ring: a slot for each item under way."""

    x: Tree
    g: Tree
    y: Tree
    ring: Tree
    sums: Sums


class _Engine:
    """One stage's view of the schedule, inside the manual region."""

    def __init__(
        self,
        pieces: Pieces,
        schedule: Lockstep,
        params: Params,
        rows: tuple[Tree, ...],
        work: Work,
        gradient_specs: Params | None = None,
    ) -> None:
        self.pieces, self.schedule, self.work, self.gradient_specs = pieces, schedule, work, gradient_specs
        self.stage = jax.lax.axis_index(PP)
        self.chunks = Chunks(params.staged, rows, schedule.chunks)
        self.params = params._replace(staged=self.chunks.params)
        self.ends = Ends(pieces, params.shared, work, schedule.stages, gradient_specs)

    def gradients(self) -> tuple[Params, Array]:
        """All ticks: forwards, forwards and backwards, backwards."""
        schedule, first = self.schedule, jnp.int32(0)
        [block] = self.pieces.blocks
        self.residuals = Residuals.of(block, self.chunks.at(0, first), self.ends.x_like, self.work.at(first))
        start = self._start(room(schedule.slots, list(self.residuals.shapes)), zero_sums(self.params))
        turn, end = schedule.first_backward, schedule.forward_ticks

        def warm_up(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            return self._send_forward(self._forward(carry, tick)), None

        def steady(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            if schedule.beside:
                return self._send_forward(self._both(carry, tick)), None
            carry = self._forward(carry, tick)
            return self._send_forward(self._backward(carry, tick)), None

        def cool_down(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            return self._backward(carry, tick), None

        carry, _ = jax.lax.scan(warm_up, start, jnp.arange(0, turn))
        carry, _ = jax.lax.scan(steady, carry, jnp.arange(turn, end))
        carry, _ = jax.lax.scan(cool_down, carry, jnp.arange(end, schedule.ticks))
        gradients, loss = carry.sums
        return finished(gradients, self.pieces), loss

    def loss(self) -> Array:
        """The forward ticks alone."""

        def tick(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            carry = self._forward(carry, tick, keep=False)
            leaving = self._leaving(tick)
            loss = carry.sums.loss + self.ends.loss(leaving.valid, leaving.microbatch, carry.y)
            return self._send_forward(carry._replace(sums=carry.sums._replace(loss=loss))), None

        start = self._start(None, Sums(Params((), None), jnp.float32(0)))
        carry, _ = jax.lax.scan(tick, start, jnp.arange(self.schedule.forward_ticks))
        return carry.sums.loss

    def _start(self, ring: Tree, sums: Sums) -> _Carry:
        none = zeros(self.ends.x_like)
        return _Carry(none, none, none, ring, sums)

    def _forward(self, carry: _Carry, tick: Array, *, keep: bool = True) -> _Carry:
        item = self.schedule.forward(tick, self.stage)
        x, work = self._entering(carry, tick), self.work.at(item.microbatch)
        if not keep:
            return carry._replace(y=self._through_layers(item, x, work))
        into = [Target(Row(buffer, (item.slot,))) for buffer in carry.ring]
        y, ring = self.residuals.forward(self.chunks.at(0, item.chunk), x, work, into)
        return carry._replace(y=y, ring=ring)

    def _entering(self, carry: _Carry, tick: Array) -> Tree:
        """What the layers of this stage read."""
        item, entering = self.schedule.forward(tick, self.stage), self.schedule.forward(tick, 0)
        new = self.ends.enter(entering.valid & (entering.chunk == 0), entering.microbatch)
        return select((self.stage == 0) & (item.chunk == 0), new, carry.x)

    def _through_layers(self, item: Item, x: Tree, work: Work) -> Tree:
        def run(block: int) -> Tree:
            params, rows = jax.tree.map(whole, self.chunks.at(block, item.chunk))
            y = self.pieces.blocks[block](params, rows, x, work.batch, work.weights, work.key)
            return as_stream(y)

        branches = [partial(run, block) for block in range(len(self.pieces.blocks))]
        # Stages are in different blocks at one tick, but all members of a stage's other groups are in the same.
        return branch_of_some_stages(jnp.clip(item.chunk, 0, None) // self.chunks.of_block, branches)

    def _leaving(self, tick: Array) -> Item:
        """The item whose last stage runs at `tick`; invalid if its loss is not yet due."""
        item = self.schedule.forward(tick, self.schedule.stages - 1)
        return item._replace(valid=item.valid & (item.chunk == self.schedule.chunks - 1))

    def _backward(self, carry: _Carry, tick: Array) -> _Carry:
        item = self.schedule.backward(tick, self.stage)
        sums, g = self._leaves(carry, tick)
        kept = [Row(buffer, (item.slot,)) for buffer in carry.ring]
        chunk, work = self.chunks.at(0, item.chunk), self.work.at(item.microbatch)
        staged, dx = self.residuals.backward(chunk, kept, work, g, into=self._targets(item, sums))
        return self._with_gradients(carry, tick, sums, staged, dx)

    def _targets(self, item: Item, sums: Sums) -> Tree:
        """Where the gradients of a chunk are added."""

        def target(path: Any, total: Array) -> Target:
            def add(total: Array, gradient: Array) -> Array:
                return adding(path, total, jnp.where(item.valid, gradient, 0))

            return Target(Row(total, (item.chunk,)), add)

        [totals] = sums.gradients.staged
        return jax.tree_util.tree_map_with_path(target, totals)

    def _both(self, carry: _Carry, tick: Array) -> _Carry:
        """A forward and a backward that need nothing of each other."""
        ahead, back = self.schedule.forward(tick, self.stage), self.schedule.backward(tick, self.stage)
        x, (sums, g) = self._entering(carry, tick), self._leaves(carry, tick)
        # Read before it is written, for the forward may take the slot that the backward leaves.
        kept, ring = jax.lax.optimization_barrier((at_index(carry.ring, back.slot), carry.ring))
        # One loop that writes the ring for one and reads it for the other would copy it: here both have their own.
        chunk, its_chunk = (jax.tree.map(whole, self.chunks.at(0, item.chunk)) for item in (ahead, back))
        (y, new), (gradients, dx) = side_by_side(
            self.residuals.forward,
            (chunk, x, self.work.at(ahead.microbatch)),
            self.residuals.backward,
            (its_chunk, kept, self.work.at(back.microbatch), g),
        )
        carry = carry._replace(y=y, ring=put_at(ring, new, ahead.slot))
        targets = self._targets(back, sums)
        staged = jax.tree.map(lambda to, d: to.with_value(d), targets, gradients, is_leaf=is_target)
        return self._with_gradients(carry, tick, sums, staged, dx)

    def _leaves(self, carry: _Carry, tick: Array) -> tuple[Sums, Tree]:
        """(sums with those of the microbatch whose y is the last stage's, gradient of what this stage returned)."""
        item, last = self.schedule.backward(tick, self.stage), self.schedule.stages - 1
        leaving = self._leaving(tick - self.schedule.beside)
        sums, g_last = self.ends.leave(leaving.valid, leaving.microbatch, carry.y, carry.sums)
        g = select((self.stage == last) & (item.chunk == self.schedule.chunks - 1), g_last, carry.g)
        return sums, _of_type(g, carry.y)

    def _with_gradients(self, carry: _Carry, tick: Array, sums: Sums, staged: Tree, dx: Tree) -> _Carry:
        """With what a backward gives: sums of the gradients of layers, and a gradient to send."""
        entered = self.schedule.backward(tick, 0)
        assert self.gradient_specs is not None
        staged = laid_out((staged,), self.gradient_specs.staged)
        sums = sums._replace(gradients=sums.gradients._replace(staged=staged))
        sums = self.ends.enter_backward(entered.valid & (entered.chunk == 0), entered.microbatch, dx, sums)
        return carry._replace(sums=sums, g=shift(dx, self.schedule.stages, -1))

    def _send_forward(self, carry: _Carry) -> _Carry:
        return carry._replace(x=shift(carry.y, self.schedule.stages, 1))


def _of_type(g: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda leaf, of: leaf.astype(of.dtype), g, like)
