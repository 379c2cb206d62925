"""What one device does to exchange tokens with the devices of its group: each dispatcher in three steps.

`send` brings tokens to the devices of their experts, `compute` runs the experts, `collect` brings the results back and
sums them. One after the other they are a dispatcher (`megajax.parallel.expert`); apart, a schedule can put other work
beside the exchange. The letters of shapes are those of `expert.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from megajax.ops.grouped import (
    Groups,
    expert_counts,
    permute,
    permute_choices,
    place,
    place_grouped,
    round_up,
    unpermute,
)
from megajax.ops.grouped_spans import span_of, through_spans

Array = jax.Array
MeshAxes = tuple[str, ...]
Tree = Any


class Sent(NamedTuple):
    """payload: what has arrived here, and from `compute` on the results. back: what `collect` needs to know."""

    payload: Tree
    back: Tree


class Exchange(NamedTuple):
    """A dispatcher. send: (x [T, D], ids [T, K], probs [T, K]) -> Sent. compute: payload -> payload. collect: Sent ->
    [T, D]."""

    send: "Callable[[Array, Array, Array, Work], Sent]"
    compute: "Callable[[Tree, Work], Tree]"
    collect: "Callable[[Sent, Work], Array]"


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes, major to minor, of more than one device: `token` cut the tokens, `ep` the experts, `etp` an expert."""

    token: MeshAxes = ()
    ep: MeshAxes = ()
    etp: MeshAxes = ()

    def gathered(self, group: MeshAxes) -> MeshAxes:
        """Those of `group` whose devices hold different tokens."""
        return tuple(a for a in group if a in self.token)

    def summed(self, group: MeshAxes) -> MeshAxes:
        """Those of `group` whose devices hold the same tokens."""
        return tuple(a for a in group if a not in self.token)


@dataclasses.dataclass(frozen=True)
class Work:
    """What all dispatchers need to know. fn: of parameters, x, probs and groups. limit: rows an expert takes from one
    device, None all. average: rows that an expert gets from the whole group, if all get alike."""

    fn: Callable[[Any, Array, Array, Groups | None], Array]
    params: Any
    num_experts: int
    limit: int | None
    average: int
    block: int
    pad_to_capacity: bool
    axes: Axes

    @property
    def shards(self) -> int:
        return _size(self.axes.ep)

    @property
    def experts(self) -> int:
        """Experts of this device."""
        return self.num_experts // self.shards

    @property
    def me(self) -> Array | int:
        """This device's place along ep."""
        return lax.axis_index(self.axes.ep) if self.axes.ep else 0


def _size(names: MeshAxes) -> int:
    return lax.axis_size(names) if names else 1


def _gather(x: Array, names: MeshAxes, dim: int = 0) -> Array:
    return lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def _sum_back(y: Array, axes: Axes, group: MeshAxes, dim: int = 0) -> Array:
    """Adds the results of the devices of `group`; those that gathered different tokens keep only their own rows."""
    scattered, summed = axes.gathered(group), axes.summed(group)
    y = lax.psum_scatter(y, scattered, scatter_dimension=dim, tiled=True) if scattered else y
    return lax.psum(y, summed) if summed else y


def _exchange(x: Array, names: MeshAxes) -> Array:
    """Part i of the first dim goes to device i, and part i of the result came from device i."""
    return lax.all_to_all(x, names, 0, 0, tiled=True) if names else x


def _compute(x_ND: Array, ids_NK: Array, probs_NK: Array, work: Work) -> Array:
    """Grouped by expert, computed, summed back to [N, D]. ids are of local experts, e of none."""
    experts, block = work.experts, work.block
    # However the router chooses: a token has at most one row with an expert, a group at most block - 1 rows too many.
    longest = x_ND.shape[0] * min(ids_NK.shape[1], experts) + experts * (block - 1)
    span = span_of(work.average, experts, block)
    if longest < 2 * span:
        where, groups = place_grouped(ids_NK, experts, round_up(longest, block), block)
        y_RD = work.fn(work.params, permute(x_ND, where), permute_choices(probs_NK, where), groups)
        return unpermute(y_RD, where)
    where, groups = place_grouped(ids_NK, experts, round_up(longest, span), block)
    return through_spans(work.fn, work.params, x_ND, probs_NK, where, groups, span)


def _compute_padded(x_ND: Array, ids_NK: Array, probs_NK: Array, work: Work, rows: int) -> Array:
    """The same with fixed shapes, `rows` rows an expert."""
    where = place(ids_NK, rows * jnp.arange(work.experts), work.experts * rows)
    x_RD, probs_R = permute(x_ND, where), permute_choices(probs_NK, where)
    y = work.fn(work.params, x_RD.reshape(work.experts, rows, -1), probs_R.reshape(work.experts, rows), None)
    return unpermute(y.reshape(x_RD.shape), where)


def _compute_arrived(x_ND: Array, routing_N2: Array, work: Work) -> Array:
    """`_compute` for rows of one expert each, together with the devices that hold the other parts of the experts."""
    others = work.axes.gathered(work.axes.etp)
    ids_N1, probs_N1 = _unpack(_gather(routing_N2, others)[:, None], work.experts)
    return _sum_back(_compute(_gather(x_ND, others), ids_N1, probs_N1, work), work.axes, work.axes.etp)


def _routing(ids: Array, probs: Array) -> Array:
    """Probability and expert in one message, [...] to [..., 2]. fp32 holds every id exactly, and an empty row, all
    zero, reads as an expert that is not there."""
    return jnp.stack([probs, (ids + 1).astype(probs.dtype)], -1)


def _unpack(routing: Array, experts: int) -> tuple[Array, Array]:
    """(ids, probs), an id outside [0, experts) becoming `experts`."""
    ids = routing[..., 1].astype(jnp.int32) - 1
    return jnp.where((ids >= 0) & (ids < experts), ids, experts), routing[..., 0]


def _allgather_send(x_TD: Array, ids_TK: Array, probs_TK: Array, work: Work) -> Sent:
    """Every device of the group sees all tokens and works on those that chose its experts."""
    others = work.axes.gathered(work.axes.ep + work.axes.etp)
    return Sent((_gather(x_TD, others), _gather(_routing(ids_TK, probs_TK), others)), ())


def _allgather_compute(payload: Tree, work: Work) -> Array:
    x_ND, routing_NK2 = payload
    ids_NK, probs_NK = _unpack(routing_NK2 - jnp.array([0, work.experts * work.me]), work.experts)
    if work.limit is not None and work.pad_to_capacity:
        rows = work.limit * _size(work.axes.gathered(work.axes.ep + work.axes.etp))
        return _compute_padded(x_ND, ids_NK, probs_NK, work, rows)
    return _compute(x_ND, ids_NK, probs_NK, work)


def _allgather_collect(sent: Sent, work: Work) -> Array:
    return _sum_back(sent.payload, work.axes, work.axes.ep + work.axes.etp)


def _alltoall_send(x_TD: Array, ids_TK: Array, probs_TK: Array, work: Work) -> Sent:
    """Messages of a fixed length: the most rows that a device can be sent."""
    ep, shards, experts = work.axes.ep, work.shards, work.experts
    rows = x_TD.shape[0] * min(ids_TK.shape[1], experts)
    # Rows for one device lie behind each other.
    counts = expert_counts(ids_TK, work.num_experts).reshape(shards, experts)
    starts = rows * jnp.arange(shards)[:, None] + jnp.cumsum(counts, 1) - counts
    where = place(ids_TK, starts.reshape(-1), shards * rows)
    x_ND = _exchange(permute(x_TD, where), ep)
    routing_N2 = _exchange(permute_choices(_routing(ids_TK % experts, probs_TK), where), ep)
    return Sent((x_ND, routing_N2), where)


def _arrived_compute(payload: Tree, work: Work) -> Array:
    x_ND, routing_N2 = payload
    return _compute_arrived(x_ND, routing_N2, work)


def _alltoall_collect(sent: Sent, work: Work) -> Array:
    return unpermute(_exchange(sent.payload, work.axes.ep), sent.back)


def _capacity_send(x_TD: Array, ids_TK: Array, probs_TK: Array, work: Work) -> Sent:
    """Messages of C rows for each expert."""
    assert work.limit is not None
    axes, shards, experts, limit = work.axes, work.shards, work.experts, work.limit
    where = place(ids_TK, limit * jnp.arange(work.num_experts), work.num_experts * limit)

    def to_experts(a: Array) -> Array:
        """[E * C, ...] to [e, rows of the whole group, ...]."""
        a = _exchange(a, axes.ep).reshape(shards, experts, limit, *a.shape[1:]).swapaxes(0, 1)
        return _gather(a.reshape(experts, shards * limit, *a.shape[3:]), axes.gathered(axes.etp), 1)

    return Sent((to_experts(permute(x_TD, where)), to_experts(permute_choices(probs_TK, where))), where)


def _capacity_compute(payload: Tree, work: Work) -> Array:
    x, probs = payload
    return _sum_back(work.fn(work.params, x, probs, None), work.axes, work.axes.etp, dim=1)


def _capacity_collect(sent: Sent, work: Work) -> Array:
    assert work.limit is not None
    y = sent.payload.reshape(work.experts, work.shards, work.limit, -1).swapaxes(0, 1)
    return unpermute(_exchange(y.reshape(work.num_experts * work.limit, -1), work.axes.ep), sent.back)


def _ragged_send(x_TD: Array, ids_TK: Array, probs_TK: Array, work: Work) -> Sent:
    """Only rows that exist travel; the buffer they arrive in is as long as the worst case."""
    ep, shards, experts = work.axes.ep, work.shards, work.experts
    tokens, top_k = ids_TK.shape
    counts = expert_counts(ids_TK, work.num_experts)
    where = place(ids_TK, jnp.cumsum(counts) - counts, tokens * top_k)
    longest = shards * tokens * min(top_k, experts)
    # sent[i, j, e]: rows that device i has for expert e of device j.
    sent = _gather(counts[None], ep).reshape(shards, shards, experts)
    there, back = _offsets(sent.sum(2), work.me)
    x_ND = _ragged_exchange(permute(x_TD, where), longest, there, ep)
    routing_N2 = _ragged_exchange(permute_choices(_routing(ids_TK % experts, probs_TK), where), longest, there, ep)
    return Sent((x_ND, routing_N2), (where, back))


def _ragged_collect(sent: Sent, work: Work) -> Array:
    where, back = sent.back
    return unpermute(_ragged_exchange(sent.payload, where.rows.size, back, work.axes.ep), where)


_Offsets = tuple[Array, Array, Array, Array]


def _offsets(rows_ij: Array, me: Array | int) -> tuple[_Offsets, _Offsets]:
    """What `ragged_all_to_all` asks for, on the way there and back, from rows that device i sends to device j:
    where they start here, how many, where they go there, how many come."""
    before_j = jnp.cumsum(rows_ij, 1) - rows_ij  # where they start at the sender i
    before_i = jnp.cumsum(rows_ij, 0) - rows_ij  # where they go at the receiver j
    there = (before_j[me], rows_ij[me], before_i[me], rows_ij[:, me])
    back = (before_i[:, me], rows_ij[:, me], before_j[:, me], rows_ij[me])
    return there, back


def _ragged_exchange(x: Array, rows: int, offsets: _Offsets, names: MeshAxes) -> Array:
    if not names:
        return x
    return lax.ragged_all_to_all(x, jnp.zeros((rows, *x.shape[1:]), x.dtype), *offsets, axis_name=names)


_CAPACITY = Exchange(_capacity_send, _capacity_compute, _capacity_collect)
_EXCHANGES: Mapping[str, Exchange] = {
    "allgather": Exchange(_allgather_send, _allgather_compute, _allgather_collect),
    "alltoall": Exchange(_alltoall_send, _arrived_compute, _alltoall_collect),
    "ragged": Exchange(_ragged_send, _arrived_compute, _ragged_collect),
}


def exchange_of(kind: str, limit: int | None) -> Exchange:
    """The dispatcher of that name. limit: rows that an expert takes from one device."""
    return _CAPACITY if kind == "alltoall" and limit is not None else _EXCHANGES[kind]
