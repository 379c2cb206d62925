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
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from megajax.config import ConfigError
from megajax.ops.grouped import LOOP, DropPolicy, Groups, block_for, capacity, drop
from megajax.parallel.expert_exchange import Axes, Exchange, MeshAxes, Sent, Work, exchange_of
from megajax.parallel.gradient_sums import whole_in_region
from megajax.parallel.replicas import manual_part

Array = jax.Array

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
    of the grouped layout is rounded up to, at least, and most_rows at most (`megajax.ops.grouped.block_for`).
    """

    kind: Literal["allgather", "alltoall", "ragged"] = "allgather"
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"
    pad_to_capacity: bool = False
    block: int = 128
    most_rows: int = LOOP.most_rows

    @property
    def pads(self) -> bool:
        """Whether experts read fixed shapes, and not groups."""
        return self.pad_to_capacity or (self.kind == "alltoall" and self.capacity_factor is not None)

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

    It opens `shard_map`s over all axes named here, in the mesh of the context, also inside one that is manual over
    other axes, or over some of these: then x and params are what a replica has of them. Without a mesh everything is
    local. Gradients are exact for x, probs and params. Sums over devices are
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
    steps = ExpertSteps.of(
        x, params, expert_fn, num_experts=num_experts, dispatcher=dispatcher, token_spec=token_spec, ep=ep, etp=etp,
        param_specs=param_specs,
    )  # fmt: skip
    top_k = expert_ids.shape[-1]
    sent = steps.compute(params, steps.send(x, expert_ids, probs), top_k=top_k)
    return steps.collect(sent, x.shape, top_k=top_k)


@dataclasses.dataclass(frozen=True)
class ExpertSteps:
    """`dispatch` in three steps, each a manual region of its own, so that a schedule can overlap the exchange.

    What goes from step to step holds, for each device, its own part: leaves are cut over all manual axes at dim 0.
    """

    axes: Axes
    token_spec: PartitionSpec
    param_specs: Any
    manual: MeshAxes
    tokens: int
    """Of one device."""
    expert_fn: ExpertFn
    num_experts: int
    dispatcher: Dispatcher
    dtype: Any
    widened: bool
    """XLA:CPU aborts on a sum of bf16 over devices: x and parameters cross in fp32."""

    @classmethod
    def of(
        cls,
        x: Any,
        params: Any,
        expert_fn: ExpertFn,
        *,
        num_experts: int,
        dispatcher: Dispatcher,
        token_spec: PartitionSpec = PartitionSpec(),
        ep: MeshAxes = (),
        etp: MeshAxes = (),
        param_specs: Any = None,
    ) -> "ExpertSteps":
        """Arguments as for `dispatch`; of x and params only shapes and dtypes matter."""
        mesh = jax.sharding.get_abstract_mesh()
        # Axes of one device need no collective, and XLA would keep their sums.
        token_spec = _several(token_spec, mesh)
        specs = PartitionSpec(ep or None) if param_specs is None else param_specs
        specs = jax.tree.map(lambda s: _several(s, mesh), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        axes = Axes(*(_names(_several(PartitionSpec(group), mesh)) for group in (_names(token_spec), ep, etp)))
        several = {*axes.token, *axes.ep, *axes.etp, *_names_of_tree(specs)}
        widened = bool(several) and _platform(mesh) == "cpu"
        if axes.ep:
            _check_platform(dispatcher, mesh)
        if widened:
            expert_fn = _narrowed(expert_fn, x.dtype, jax.tree.map(lambda a: a.dtype, params))
        manual = tuple(axis for axis in mesh.axis_names if axis in several and axis not in mesh.manual_axes)
        token_spec, specs = manual_part((token_spec, specs), manual)
        if several:
            _check(x, token_spec, axes, num_experts, dispatcher, mesh)
        cut = math.prod(mesh.shape[axis] for axis in _names(token_spec))
        return cls(
            axes, token_spec, specs, manual,
            math.prod(x.shape[:-1]) // cut, expert_fn, num_experts, dispatcher, x.dtype, widened,
        )  # fmt: skip

    def send(self, x: Array, expert_ids: Array, probs: Array) -> Sent:
        """Tokens to the devices of their experts."""
        tokens = self._tokens(x.ndim)
        return self._region(self._send, (tokens,) * 3, self._own)(self._wide(x), expert_ids, probs)

    def compute(self, params: Any, sent: Sent, *, top_k: int) -> Sent:
        """Through the experts."""

        def region(params: Any, sent: Sent) -> Sent:
            return self._compute(params, sent, top_k)

        return self._region(region, (self.param_specs, self._own), self._own)(self._wide(params), sent)

    def collect(self, sent: Sent, shape: tuple[int, ...], *, top_k: int) -> Array:
        """Results back to their tokens, and summed: [..., D]. shape: of x."""
        spec, mesh = self._tokens(len(shape)), jax.sharding.get_abstract_mesh()
        cuts = [math.prod(mesh.shape[axis] for axis in _names(PartitionSpec(entry))) for entry in spec]
        local = tuple(size // cut for size, cut in zip(shape, cuts, strict=True))
        run = self._region(lambda sent: self._collect(sent, local, top_k), (self._own,), spec)
        return run(sent).astype(self.dtype)

    @property
    def _own(self) -> PartitionSpec:
        return PartitionSpec(self.manual)

    def _tokens(self, ndim: int) -> PartitionSpec:
        return PartitionSpec(*self.token_spec, *(None,) * (ndim - len(self.token_spec)))

    def _region(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        if not self.manual:
            return function
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.manual), check_vma=False
        )

    def _wide(self, tree: Any) -> Any:
        if not self.widened:
            return tree
        return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)

    def _work(self, top_k: int, params: Any = None) -> tuple[Exchange, Work]:
        dispatcher, limit = self.dispatcher, None
        if dispatcher.capacity_factor is not None:
            limit = capacity(self.tokens, top_k, self.num_experts, dispatcher.capacity_factor)
        gathered = self.axes.gathered((*self.axes.ep, *self.axes.etp))
        mesh = jax.sharding.get_abstract_mesh()
        rows = self.tokens * math.prod(mesh.shape[axis] for axis in gathered) * top_k // self.num_experts
        block = block_for(rows, dispatcher.block, dispatcher.most_rows)
        return exchange_of(dispatcher.kind, limit), Work(
            self.expert_fn, params, self.num_experts, limit, rows, block, dispatcher.pad_to_capacity, self.axes
        )

    def _send(self, x: Array, expert_ids: Array, probs: Array) -> Sent:
        x_TD, ids_TK, probs_TK = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, probs.astype(jnp.float32)))
        exchange, work = self._work(ids_TK.shape[1])
        if work.limit is not None:
            ids_TK = drop(ids_TK, probs_TK, self.num_experts, work.limit, self.dispatcher.drop_policy)
        return exchange.send(x_TD, ids_TK, probs_TK, work)

    def _compute(self, params: Any, sent: Sent, top_k: int) -> Sent:
        shared = tuple(axis for axis in self.manual if axis not in self.axes.ep)
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: whole_in_region(path, leaf, shared), params)
        exchange, work = self._work(top_k, params)
        return sent._replace(payload=exchange.compute(sent.payload, work))

    def _collect(self, sent: Sent, shape: tuple[int, ...], top_k: int) -> Array:
        exchange, work = self._work(top_k)
        return exchange.collect(sent, work).reshape(shape)


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
    x: Array, token_spec: PartitionSpec, axes: Axes, num_experts: int, dispatcher: Dispatcher, mesh: AbstractMesh
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
