"""Expert parallelism: tokens travel to the devices that hold their experts, and the results back.

Three ways behind one function, `dispatch`. Tokens are cut over the token axes, experts over `ep`, each expert's ffn
width over `etp`. A group of n = ep devices (times those of etp that hold different tokens) exchanges tokens:

| dispatcher  | forward, besides numbers of a few bytes a token      | rows an expert computes                        |
|-------------|------------------------------------------------------|------------------------------------------------|
| `allgather` | all-gather of tokens, reduce-scatter of results      | those it was given, rounded up to a block      |
| `alltoall`  | two all-to-alls, over etp a gather and its inverse   | ep * C with a capacity C; without, as above    |
| `ragged`    | two ragged all-to-alls, likewise (GPU only)          | those it was given, rounded up to a block      |

Bytes a device sends forward, each way, in rows of width D: `allgather` (n - 1) T; `alltoall` with capacity about
T K factor, dropless (buffers as long as the worst case) ep T min(K, E / ep), so `allgather` is then the cheaper one;
`ragged` T K. Source: Megatron's transformer/moe/token_dispatcher.py.

Legend: T tokens of this device, K experts a token, E experts, e experts of this device, C rows an expert takes from one
device, N tokens or rows gathered from the group, R rows that experts read, D width.
"""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from megajax.config import ConfigError
from megajax.ops.grouped import (
    DropPolicy,
    Groups,
    capacity,
    drop,
    expert_counts,
    permute,
    permute_choices,
    place,
    place_grouped,
    round_up,
    unpermute,
)

Array = jax.Array
MeshAxes = tuple[str, ...]

ExpertFn = Callable[[Any, Array, Array, Groups | None], Array]
"""(parameters of the local experts, x, probs, groups) -> y of x's shape, each row by its own expert and already times
its probability. x is [R, D] with `groups`, or [e, C, D] with `groups` None; probs fp32, without the last dim. Rows that
hold no token are zero and so is their probability. With etp the result is this device's part of a sum over etp."""


@dataclasses.dataclass(frozen=True)
class Dispatcher:
    """How tokens reach their experts.

    capacity_factor: an expert takes ceil(T * K / E * factor) rows from each device, None all it is given. The rest is
    dropped: the least probable or the last ones (`drop_policy`). pad_to_capacity: experts read fixed shapes [e, C, D].
    `alltoall` always does, since its messages have fixed shapes; results never depend on it. block: rows that a group
    of the grouped layout is rounded up to; GPU kernels like 128.
    """

    kind: Literal["allgather", "alltoall", "ragged"] = "allgather"
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"
    pad_to_capacity: bool = False
    block: int = 128

    def __post_init__(self) -> None:
        if self.pad_to_capacity and self.capacity_factor is None:
            raise ConfigError("moe_pad_expert_input_to_capacity=True needs a moe_expert_capacity_factor; set one")
        if self.pad_to_capacity and self.kind == "ragged":
            raise ConfigError(
                "moe_pad_expert_input_to_capacity=True has no use with moe_token_dispatcher_type=ragged, which sends"
                " what there is; use alltoall"
            )


def dispatch(
    x: Array,
    expert_ids: Array,
    probs: Array,
    params: Any,
    expert_fn: ExpertFn,
    *,
    num_experts: int,
    dispatcher: Dispatcher,
    token_spec: PartitionSpec = PartitionSpec(),
    ep: MeshAxes = (),
    etp: MeshAxes = (),
    param_specs: Any = None,
) -> Array:
    """Sum over a token's experts of expert(token) * probability.

    It opens a `shard_map` over all axes named here, in the mesh of the context, also inside one that is manual over
    other axes; without a mesh everything is local. Gradients are exact for x, probs and params. Sums over devices are
    taken in the dtype of what is summed (of params' gradients, so give fp32 ones and cast in `expert_fn`), on CPUs in
    fp32.

    Args:
      x: [..., D]; the order of tokens, for `drop_policy="position"`, is row-major on each device.
      expert_ids: int32 [..., K], different ones for a token; one outside [0, E) is a choice that counts for nothing.
      probs: fp32 [..., K].
      params: tree of [E, ...].
      token_spec: mesh axes of every leading dim of x.
      ep, etp: mesh axes of the experts and of their ffn width, major to minor (see `expert_mesh`).
      param_specs: spec of each leaf of params, or one for all; by default the leading dim is cut over ep.

    Returns:
      [..., D] in the dtype of x, cut as x is.

    Raises:
      ConfigError: sizes that do not divide, a dispatcher that cannot work on these axes or this platform.
    """
    mesh, dtype = jax.sharding.get_abstract_mesh(), x.dtype
    _check_platform(dispatcher, mesh)
    # Axes of one device need no collective, and XLA would keep their sums.
    token_spec = _several(token_spec, mesh)
    specs = PartitionSpec(ep or None) if param_specs is None else param_specs
    specs = jax.tree.map(lambda s: _several(s, mesh), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    axes = _Axes(*(_names(_several(PartitionSpec(group), mesh)) for group in (_names(token_spec), ep, etp)))
    manual = {*axes.token, *axes.ep, *axes.etp, *_names_of_tree(specs)}
    if not manual:
        return _local(x, expert_ids, probs, params, expert_fn, num_experts, dispatcher, axes)
    _check(x, token_spec, axes, num_experts, dispatcher, mesh)
    if _platform(mesh) == "cpu":
        # XLA:CPU aborts on a sum of bf16 over devices.
        expert_fn = _narrowed(expert_fn, x.dtype, jax.tree.map(lambda a: a.dtype, params))
        x, params = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), (x, params))
    inner = functools.partial(_local, expert_fn=expert_fn, num_experts=num_experts, dispatcher=dispatcher, axes=axes)
    tokens = PartitionSpec(*token_spec, *(None,) * (x.ndim - len(token_spec)))
    sharded: Any = jax.shard_map(
        inner, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, axis_names=manual, check_vma=False
    )
    return sharded(x, expert_ids, probs, params).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Axes:
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
class _Work:
    """What all dispatchers need to know. limit: rows an expert takes from one device, None all."""

    fn: Callable[[Array, Array, Groups | None], Array]
    num_experts: int
    limit: int | None
    dispatcher: Dispatcher
    axes: _Axes

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


def _several(spec: PartitionSpec, mesh: AbstractMesh) -> PartitionSpec:
    """`spec` without the axes that have one device, and all of them where there is no mesh."""
    entries = [tuple(a for a in _names(PartitionSpec(entry)) if mesh.shape.get(a, 1) > 1) for entry in spec]
    return PartitionSpec(*(entry or None for entry in entries))


def _names(spec: PartitionSpec) -> MeshAxes:
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return tuple(name for entry in entries for name in entry)


def _names_of_tree(specs: Any) -> Iterable[str]:
    leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return (name for spec in leaves for name in _names(spec))


def _narrowed(fn: ExpertFn, dtype: Any, param_dtypes: Any) -> ExpertFn:
    """`fn` for x and params that came in fp32 and are meant in other dtypes."""

    def wrapped(params: Any, x: Array, probs: Array, groups: Groups | None) -> Array:
        params = jax.tree.map(lambda a, d: a.astype(d), params, param_dtypes)
        return fn(params, x.astype(dtype), probs, groups).astype(x.dtype)

    return wrapped


def _platform(mesh: AbstractMesh) -> str:
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _check_platform(dispatcher: Dispatcher, mesh: AbstractMesh) -> None:
    platform = _platform(mesh)
    if dispatcher.kind == "ragged" and platform not in ("gpu", "cuda", "rocm"):
        raise ConfigError(
            f"moe_token_dispatcher_type=ragged needs a GPU, this is {platform}; use allgather or alltoall"
        )


def _check(
    x: Array, token_spec: PartitionSpec, axes: _Axes, num_experts: int, dispatcher: Dispatcher, mesh: AbstractMesh
) -> None:
    size = math.prod(mesh.shape[a] for a in axes.ep)
    if num_experts % size:
        raise ConfigError(
            f"num_moe_experts={num_experts} is not divisible by expert_model_parallel_size={size}; change one of them"
        )
    whole = axes.summed(axes.ep)
    if whole and dispatcher.kind != "allgather":
        raise ConfigError(
            f"moe_token_dispatcher_type={dispatcher.kind} needs tokens cut over every axis of the experts, and they are"
            f" not over {whole[0]}; set sequence_parallel=True or use allgather"
        )
    for dim, entry in enumerate(token_spec):
        shards = math.prod(mesh.shape[a] for a in _names(PartitionSpec(entry)))
        if x.shape[dim] % shards:
            raise ConfigError(
                f"the experts' input: dim {dim} has size {x.shape[dim]}, not divisible by the {shards} devices it is"
                " cut over; change the batch size, the sequence length or the mesh"
            )


def _local(
    x: Array,
    expert_ids: Array,
    probs: Array,
    params: Any,
    expert_fn: ExpertFn,
    num_experts: int,
    dispatcher: Dispatcher,
    axes: _Axes,
) -> Array:
    """What one device does."""
    x_TD, ids_TK, probs_TK = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, probs.astype(jnp.float32)))
    limit = None
    if dispatcher.capacity_factor is not None:
        limit = capacity(x_TD.shape[0], ids_TK.shape[1], num_experts, dispatcher.capacity_factor)
        ids_TK = drop(ids_TK, probs_TK, num_experts, limit, dispatcher.drop_policy)
    work = _Work(functools.partial(expert_fn, params), num_experts, limit, dispatcher, axes)
    how = {"allgather": _allgather, "alltoall": _alltoall, "ragged": _ragged}[dispatcher.kind]
    return how(x_TD, ids_TK, probs_TK, work).reshape(x.shape)


def _size(names: MeshAxes) -> int:
    return lax.axis_size(names) if names else 1


def _gather(x: Array, names: MeshAxes, dim: int = 0) -> Array:
    return lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def _sum_back(y: Array, axes: _Axes, group: MeshAxes, dim: int = 0) -> Array:
    """Adds the results of the devices of `group`; those that gathered different tokens keep only their own rows."""
    scattered, summed = axes.gathered(group), axes.summed(group)
    y = lax.psum_scatter(y, scattered, scatter_dimension=dim, tiled=True) if scattered else y
    return lax.psum(y, summed) if summed else y


def _exchange(x: Array, names: MeshAxes) -> Array:
    """Part i of the first dim goes to device i, and part i of the result came from device i."""
    return lax.all_to_all(x, names, 0, 0, tiled=True) if names else x


def _compute(x_ND: Array, ids_NK: Array, probs_NK: Array, work: _Work) -> Array:
    """Grouped by expert, computed, summed back to [N, D]. ids are of local experts, e of none."""
    experts, block = work.experts, work.dispatcher.block
    # However the router chooses: a token has at most one row with an expert, a group at most block - 1 rows too many.
    longest = x_ND.shape[0] * min(ids_NK.shape[1], experts) + experts * (block - 1)
    where, groups = place_grouped(ids_NK, experts, round_up(longest, block), block)
    return unpermute(work.fn(permute(x_ND, where), permute_choices(probs_NK, where), groups), where)


def _compute_padded(x_ND: Array, ids_NK: Array, probs_NK: Array, work: _Work, rows: int) -> Array:
    """The same with fixed shapes, `rows` rows an expert."""
    where = place(ids_NK, rows * jnp.arange(work.experts), work.experts * rows)
    x_RD, probs_R = permute(x_ND, where), permute_choices(probs_NK, where)
    y = work.fn(x_RD.reshape(work.experts, rows, -1), probs_R.reshape(work.experts, rows), None)
    return unpermute(y.reshape(x_RD.shape), where)


def _compute_arrived(x_ND: Array, routing_N2: Array, work: _Work) -> Array:
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


def _allgather(x_TD: Array, ids_TK: Array, probs_TK: Array, work: _Work) -> Array:
    """Every device of the group sees all tokens and works on those that chose its experts."""
    axes, experts = work.axes, work.experts
    group = axes.ep + axes.etp
    x_ND = _gather(x_TD, axes.gathered(group))
    mine = _gather(_routing(ids_TK, probs_TK), axes.gathered(group)) - jnp.array([0, experts * work.me])
    ids_NK, probs_NK = _unpack(mine, experts)
    if work.limit is not None and work.dispatcher.pad_to_capacity:
        y_ND = _compute_padded(x_ND, ids_NK, probs_NK, work, work.limit * _size(axes.gathered(group)))
    else:
        y_ND = _compute(x_ND, ids_NK, probs_NK, work)
    return _sum_back(y_ND, axes, group)


def _alltoall(x_TD: Array, ids_TK: Array, probs_TK: Array, work: _Work) -> Array:
    """Messages of a fixed length: C rows for each expert, or, dropless, the most rows that a device can be sent."""
    if work.limit is not None:
        return _alltoall_capacity(x_TD, ids_TK, probs_TK, work, work.limit)
    ep, shards, experts = work.axes.ep, work.shards, work.experts
    rows = x_TD.shape[0] * min(ids_TK.shape[1], experts)
    # Rows for one device lie behind each other.
    counts = expert_counts(ids_TK, work.num_experts).reshape(shards, experts)
    starts = rows * jnp.arange(shards)[:, None] + jnp.cumsum(counts, 1) - counts
    where = place(ids_TK, starts.reshape(-1), shards * rows)
    x_ND = _exchange(permute(x_TD, where), ep)
    routing_N2 = _exchange(permute_choices(_routing(ids_TK % experts, probs_TK), where), ep)
    y_ND = _compute_arrived(x_ND, routing_N2, work)
    return unpermute(_exchange(y_ND, ep), where)


def _alltoall_capacity(x_TD: Array, ids_TK: Array, probs_TK: Array, work: _Work, limit: int) -> Array:
    axes, shards, experts = work.axes, work.shards, work.experts
    where = place(ids_TK, limit * jnp.arange(work.num_experts), work.num_experts * limit)

    def to_experts(a: Array) -> Array:
        """[E * C, ...] to [e, rows of the whole group, ...]."""
        a = _exchange(a, axes.ep).reshape(shards, experts, limit, *a.shape[1:]).swapaxes(0, 1)
        return _gather(a.reshape(experts, shards * limit, *a.shape[3:]), axes.gathered(axes.etp), 1)

    y = work.fn(to_experts(permute(x_TD, where)), to_experts(permute_choices(probs_TK, where)), None)
    y = _sum_back(y, axes, axes.etp, dim=1)
    y = y.reshape(experts, shards, limit, -1).swapaxes(0, 1).reshape(work.num_experts * limit, -1)
    return unpermute(_exchange(y, axes.ep), where)


def _ragged(x_TD: Array, ids_TK: Array, probs_TK: Array, work: _Work) -> Array:
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
    y_ND = _compute_arrived(x_ND, routing_N2, work)
    return unpermute(_ragged_exchange(y_ND, tokens * top_k, back, ep), where)


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
