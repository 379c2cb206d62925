"""Lockstep 1F1B: every stage runs the same program, one forward and one backward of a chunk a tick, without a branch.

A manual region over `pp` alone; the other axes stay automatic inside. With p stages, v chunks a stage and m
microbatches, tick t runs on stage s

    forward of item  t - s                        for t in [0, n + p - 1)
    backward of item t - (v p - 1) - (p - 1 - s)  for t in [v p - 1, v p - 1 + n + p - 1)

where the n = v m items are ordered in groups of p microbatches, each group once a chunk: forwards through the chunks
upwards, backwards downwards (circular placement, as in Megatron's interleaved schedule, arXiv:2104.04473). What a stage
sends arrives one tick later, exactly when its neighbour needs it. Warm-up ticks run forwards only, cool-down ticks
backwards only, so the time is (n + p - 1) (F + B) of a chunk: 1F1B's, with a bubble of (p - 1) / (v m).

Between forward and backward, what the derivative needs waits in a ring of 2 v p - 1 slots, whatever m is. It is what
`jax.vjp` keeps, so the recomputation policy of the layers decides its size, and no forward is repeated unless asked.

Embedding and loss belong to no stage: their table is divided over (pp, tp), and all stages work on the microbatch that
enters or leaves.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from megajax.ops.cross_entropy import FusedLoss
from megajax.parallel.sharding import constrain

Array = jax.Array
Tree = Any
Batch = Mapping[str, Array]

PP = "pp"


class Pieces(NamedTuple):
    """A model in the pieces of a tick. Keys are a microbatch's dropout key, None without dropout.

    embed: (shared parameters, microbatch, key) -> x. stage: (stage parameters, rows, x, microbatch, key) -> y, where
    rows says which layers the parameters are. loss: (shared parameters, y, microbatch, weights) -> loss. Embed and
    loss are called on all stages alike and return the same on each.
    """

    embed: Callable[[Tree, Batch, Array | None], Array]
    stage: Callable[[Tree, Tree, Array, Batch, Array | None], Array]
    loss: Callable[[Tree, Array, Batch, Array], FusedLoss]


class Item(NamedTuple):
    """A chunk's pass over a microbatch. valid: False for ticks that only keep step."""

    chunk: Array
    microbatch: Array
    slot: Array
    valid: Array


@dataclasses.dataclass(frozen=True)
class Lockstep:
    """When what runs. Times are ticks; a traced tick or stage is fine everywhere."""

    stages: int
    chunks: int
    microbatches: int

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
        return self.stages * self.chunks - 1

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


class Params(NamedTuple):
    """Parameters (or their gradients, or partition specs) in two trees.

    staged: leaves [p v n, ...], divided over pp: the rows of stage 0 first, on each stage chunk after chunk.
    shared: everything else; of these only the vocabulary's tables are divided over pp.
    """

    staged: Tree
    shared: Tree


class Work(NamedTuple):
    """The microbatches of a step: arrays [m, ...] each, and the key that is folded with a microbatch's index."""

    batch: Batch
    weights: Array
    mask: Array
    key: Array | None

    def at(self, microbatch: Array) -> Work:
        """One microbatch of it."""
        pick = partial(jax.lax.dynamic_index_in_dim, index=microbatch, axis=0, keepdims=False)
        batch, weights, mask = jax.tree.map(pick, (dict(self.batch), self.weights, self.mask))
        return Work(batch, weights, mask, None if self.key is None else jax.random.fold_in(self.key, microbatch))


def pipeline_gradients(
    pieces: Pieces,
    schedule: Lockstep,
    params: Params,
    rows: Tree,
    work: Work,
    *,
    specs: Params,
    gradient_specs: Params,
) -> tuple[Params, Array]:
    """Gradients of the weighted sum of all token losses, and the sum of the masked ones.

    Args:
      rows: arrays [p v n]: what `pieces.stage` is told of the rows of the parameters.
      specs, gradient_specs: partition specs of the parameters, and of the gradients while they add up.

    Returns:
      (gradients like params in fp32, fp32 scalar).
    """

    def region(params: Params, rows: Tree, work: Work) -> tuple[Params, Array]:
        return _Engine(pieces, schedule, params, rows, work).gradients(gradient_specs)

    return _over_stages(region, specs, out_specs=(_manual(specs), PartitionSpec()))(params, rows, work)


def pipeline_loss(
    pieces: Pieces, schedule: Lockstep, params: Params, rows: Tree, work: Work, *, specs: Params
) -> Array:
    """The sum of the masked token losses alone: the forward half of the schedule."""

    def region(params: Params, rows: Tree, work: Work) -> Array:
        return _Engine(pieces, schedule, params, rows, work).loss()

    return _over_stages(region, specs, out_specs=PartitionSpec())(params, rows, work)


def _over_stages(region: Callable[..., Any], specs: Params, out_specs: Any) -> Callable[..., Any]:
    in_specs = (_manual(specs), PartitionSpec(PP), PartitionSpec())
    return jax.shard_map(region, in_specs=in_specs, out_specs=out_specs, axis_names={PP}, check_vma=False)


def _manual(specs: Params) -> Params:
    """What the specs say of pp alone: the other axes stay automatic."""

    def only_pp(entry: Any) -> str | None:
        return PP if entry == PP or (isinstance(entry, tuple) and PP in entry) else None

    def of_leaf(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(only_pp(entry) for entry in spec))

    return jax.tree.map(of_leaf, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


class _Carry(NamedTuple):
    """What goes from tick to tick. x, g: from the neighbours, an input and the gradient of an output. y: the last
    output here. ring: a slot for each item under way. gradients, total: sums so far."""

    x: Array
    g: Array
    y: Array
    ring: Tree
    gradients: Params
    total: Array


class _Engine:
    """One stage's view of the schedule, inside the manual region."""

    def __init__(self, pieces: Pieces, schedule: Lockstep, params: Params, rows: Tree, work: Work) -> None:
        self.pieces, self.schedule, self.work = pieces, schedule, work
        self.stage = jax.lax.axis_index(PP)
        self.shared = params.shared
        split = partial(jax.tree.map, lambda a: a.reshape(schedule.chunks, -1, *a.shape[1:]))
        self.staged, self.rows = split(params.staged), split(rows)
        first = work.at(jnp.int32(0))
        self.x_like = jax.eval_shape(pieces.embed, self.shared, first.batch, first.key)
        self.residuals = Residuals.of(pieces.stage, self._chunk(jnp.int32(0)), self.x_like, first)

    def gradients(self, specs: Params) -> tuple[Params, Array]:
        """All ticks: forwards, forwards and backwards, backwards."""
        schedule, self.gradient_specs = self.schedule, specs
        start = self._start(ring=self.residuals.ring(schedule.slots))
        turn, end = schedule.first_backward, schedule.forward_ticks

        def warm_up(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            return self._send_forward(self._forward(carry, tick)), None

        def steady(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            carry = self._forward(carry, tick)
            return self._send_forward(self._backward(carry, tick)), None

        def cool_down(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            return self._backward(carry, tick), None

        carry, _ = jax.lax.scan(warm_up, start, jnp.arange(0, turn))
        carry, _ = jax.lax.scan(steady, carry, jnp.arange(turn, end))
        carry, _ = jax.lax.scan(cool_down, carry, jnp.arange(end, schedule.ticks))
        merged = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), carry.gradients.staged)
        return carry.gradients._replace(staged=merged), carry.total

    def loss(self) -> Array:
        """The forward ticks alone."""

        def tick(carry: _Carry, tick: Array) -> tuple[_Carry, None]:
            carry = self._forward(carry, tick, keep=False)
            leaving = self._leaving(tick)

            def finish() -> Array:
                work = self.work.at(leaving.microbatch)
                y = broadcast_from(carry.y, self.schedule.stages - 1)
                losses = self.pieces.loss(self.shared, y, work.batch, work.weights)
                return jnp.sum(losses.per_token * work.mask)

            total = carry.total + jax.lax.cond(leaving.valid, finish, lambda: jnp.float32(0))
            return self._send_forward(carry._replace(total=total)), None

        carry, _ = jax.lax.scan(tick, self._start(ring=None), jnp.arange(self.schedule.forward_ticks))
        return carry.total

    def _start(self, ring: Tree) -> _Carry:
        zeros = jnp.zeros(self.x_like.shape, self.x_like.dtype)
        sums = Params(*jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (self.staged, self.shared)))
        return _Carry(zeros, zeros, zeros, ring, sums if ring is not None else Params(None, None), jnp.float32(0))

    def _chunk(self, chunk: Array) -> tuple[Tree, Tree]:
        """(parameters, rows) of a chunk of this stage."""
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, chunk, axis=0, keepdims=False), (self.staged, self.rows)
        )

    def _forward(self, carry: _Carry, tick: Array, *, keep: bool = True) -> _Carry:
        item, entering = self.schedule.forward(tick, self.stage), self.schedule.forward(tick, 0)

        def enter() -> Array:
            work = self.work.at(entering.microbatch)
            return _as_stream(self.pieces.embed(self.shared, work.batch, work.key))

        # The same on every stage, so that they may meet inside the branch.
        embeds = entering.valid & (entering.chunk == 0)
        new = jax.lax.cond(embeds, enter, lambda: _as_stream(jnp.zeros_like(carry.x)))
        x = jnp.where((self.stage == 0) & (item.chunk == 0), new, carry.x)
        params, rows = self._chunk(item.chunk)
        work = self.work.at(item.microbatch)
        if not keep:
            return carry._replace(y=self.pieces.stage(params, rows, x, work.batch, work.key))
        y, kept = self.residuals.forward((params, rows), x, work)
        ring = jax.tree.map(
            lambda slots, value: jax.lax.dynamic_update_index_in_dim(slots, value, item.slot, axis=0), carry.ring, kept
        )
        return carry._replace(y=y, ring=ring)

    def _leaving(self, tick: Array) -> Item:
        """The item whose last stage runs at `tick`; invalid if its loss is not yet due."""
        item = self.schedule.forward(tick, self.schedule.stages - 1)
        return item._replace(valid=item.valid & (item.chunk == self.schedule.chunks - 1))

    def _backward(self, carry: _Carry, tick: Array) -> _Carry:
        item, last = self.schedule.backward(tick, self.stage), self.schedule.stages - 1
        carry, g_last = self._finish(carry, tick)
        g = jnp.where((self.stage == last) & (item.chunk == self.schedule.chunks - 1), g_last, carry.g)
        kept = jax.tree.map(
            lambda slots: jax.lax.dynamic_index_in_dim(slots, item.slot, axis=0, keepdims=False), carry.ring
        )
        d_params, dx = self.residuals.backward(
            self._chunk(item.chunk), kept, self.work.at(item.microbatch), g.astype(carry.y.dtype)
        )

        def add(total: Array, gradient: Array) -> Array:
            gradient = jnp.where(item.valid, gradient.astype(jnp.float32), 0.0)
            return total.at[item.chunk].add(gradient)

        staged = _laid_out(jax.tree.map(add, carry.gradients.staged, d_params), self.gradient_specs.staged)
        carry = self._enter_backward(carry._replace(gradients=carry.gradients._replace(staged=staged)), tick, dx)
        return carry._replace(g=self._shift(dx, -1))

    def _finish(self, carry: _Carry, tick: Array) -> tuple[_Carry, Array]:
        """The loss of the microbatch that leaves the last stage, and the gradient of its output."""
        leaving = self._leaving(tick)
        work = self.work.at(leaving.microbatch)

        def finish() -> tuple[Tree, Array, Array]:
            y = broadcast_from(carry.y, self.schedule.stages - 1)

            def loss(shared: Tree, y: Array) -> tuple[Array, Array]:
                losses = self.pieces.loss(shared, y, work.batch, work.weights)
                return losses.weighted_sum, jnp.sum(losses.per_token * work.mask)

            _, pullback, masked_sum = jax.vjp(loss, self.shared, y, has_aux=True)
            d_shared, dy = pullback(jnp.float32(1))
            shared = self._constrained(_added(carry.gradients.shared, d_shared))
            return shared, carry.total + masked_sum, _as_stream(dy)

        def wait() -> tuple[Tree, Array, Array]:
            return self._constrained(carry.gradients.shared), carry.total, _as_stream(jnp.zeros_like(carry.y))

        shared, total, dy = jax.lax.cond(leaving.valid, finish, wait)
        return carry._replace(gradients=carry.gradients._replace(shared=shared), total=total), dy

    def _enter_backward(self, carry: _Carry, tick: Array, dx: Array) -> _Carry:
        """Through the embedding, for the microbatch whose first stage has just run backward."""
        entered = self.schedule.backward(tick, 0)
        work = self.work.at(entered.microbatch)

        def embed_backward() -> Tree:
            _, pullback = jax.vjp(lambda shared: self.pieces.embed(shared, work.batch, work.key), self.shared)
            return self._constrained(_added(carry.gradients.shared, pullback(broadcast_from(dx, 0))[0]))

        due = entered.valid & (entered.chunk == 0)
        shared = jax.lax.cond(due, embed_backward, lambda: self._constrained(carry.gradients.shared))
        return carry._replace(gradients=carry.gradients._replace(shared=shared))

    def _constrained(self, shared: Tree) -> Tree:
        # Both branches of a conditional must lay out what they return alike.
        return _laid_out(shared, self.gradient_specs.shared)

    def _send_forward(self, carry: _Carry) -> _Carry:
        return carry._replace(x=self._shift(carry.y, 1))

    def _shift(self, x: Array, by: int) -> Array:
        stages = self.schedule.stages
        return jax.lax.ppermute(x, PP, [(stage, (stage + by) % stages) for stage in range(stages)])


def _laid_out(gradients: Tree, specs: Tree) -> Tree:
    """Gradients as their specs say; in the region pp is no longer said, and staged leaves are [chunks, rows, ...]."""

    def without_pp(entry: Any) -> Any:
        entry = (entry,) if isinstance(entry, str) else tuple(entry or ())
        return tuple(axis for axis in entry if axis != PP) or None

    def of_leaf(gradient: Array, spec: PartitionSpec) -> Array:
        inner = [without_pp(entry) for entry in spec]
        inner = [None] * (gradient.ndim - len(inner)) + inner
        return jax.lax.with_sharding_constraint(gradient, PartitionSpec(*inner))

    return jax.tree.map(of_leaf, gradients, specs)


def _as_stream(x: Array) -> Array:
    return constrain(x, "batch", "residual_seq", "act_embed")


def _added(totals: Tree, gradients: Tree) -> Tree:
    return jax.tree.map(lambda total, gradient: total + gradient.astype(jnp.float32), totals, gradients)


def broadcast_from(x: Array, stage: int) -> Array:
    """x of one stage, on every stage."""
    # Bits add up exactly where all but one are zero; XLA:CPU cannot sum bf16 in a manual region.
    bits = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32}[x.dtype.itemsize]
    mine = jnp.where(jax.lax.axis_index(PP) == stage, jax.lax.bitcast_convert_type(x, bits), 0)
    return jax.lax.bitcast_convert_type(jax.lax.psum(mine, PP), x.dtype)


@dataclasses.dataclass(frozen=True)
class Residuals:
    """A stage cut into forward and backward at what its derivative keeps.

    The function that `jax.vjp` returns is a pytree: its leaves are the residuals. Those that are the stage's own
    parameters, or the microbatch, are at hand in the backward tick and need not wait in the ring.
    """

    stage: Callable[[Tree, Tree, Array, Batch, Array | None], Array]
    structure: Any
    sources: tuple[int | None, ...]
    """Of each leaf: its place among the arrays at hand, or None if it has to be kept."""
    shapes: tuple[Any, ...]

    @classmethod
    def of(cls, stage: Any, chunk: tuple[Tree, Tree], x_like: Any, work: Work) -> Residuals:
        """Traces the stage to see what it keeps."""
        found: dict[str, Any] = {}

        def trace(chunk: tuple[Tree, Tree], x: Array, work: Work) -> list[Array]:
            _, leaves, found["structure"] = _pull_apart(stage, chunk, x, work)
            known = jax.tree.leaves((chunk, work))
            places = (next((i for i, one in enumerate(known) if one is leaf), None) for leaf in leaves)
            found["sources"] = tuple(places)
            return [leaf for leaf, source in zip(leaves, found["sources"], strict=True) if source is None]

        shapes = jax.eval_shape(trace, chunk, x_like, work)
        return cls(stage, found["structure"], found["sources"], tuple(shapes))

    def ring(self, slots: int) -> list[Array]:
        """Room for the residuals of so many items."""
        return [jnp.zeros((slots, *shape.shape), shape.dtype) for shape in self.shapes]

    def forward(self, chunk: tuple[Tree, Tree], x: Array, work: Work) -> tuple[Array, list[Array]]:
        """(y, what to keep)."""
        y, leaves, _ = _pull_apart(self.stage, chunk, x, work)
        return y, [leaf for leaf, source in zip(leaves, self.sources, strict=True) if source is None]

    def backward(self, chunk: tuple[Tree, Tree], kept: list[Array], work: Work, g: Array) -> tuple[Tree, Array]:
        """(gradient of the parameters, gradient of x)."""
        known, rest = jax.tree.leaves((chunk, work)), iter(kept)
        leaves = [next(rest) if source is None else known[source] for source in self.sources]
        return jax.tree.unflatten(self.structure, leaves)(g)


def _pull_apart(stage: Any, chunk: tuple[Tree, Tree], x: Array, work: Work) -> tuple[Array, list[Array], Any]:
    params, rows = chunk
    y, pullback = jax.vjp(lambda params, x: stage(params, rows, x, work.batch, work.key), params, x)
    return y, *jax.tree.flatten(pullback)
