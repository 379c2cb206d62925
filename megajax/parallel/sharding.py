"""The one table from logical axes to mesh axes, and what is done with it: constraints, shardings, validation."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from megajax.config import ConfigError, ParallelConfig, TransformerConfig
from megajax.parallel.expert_mesh import expand
from megajax.parallel.mesh import DATA_AXES, ZERO_AXES, refinement
from megajax.parallel.replicas import APART

Array = jax.Array
MeshAxes = tuple[str, ...]

_EXPERT_ZERO_AXES = tuple(axis for axis in ZERO_AXES if axis != "ep")  # which divides the experts


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axes: for parameters and activations (`table`), optimizer state and gradients.

    parameters: the logical axes of parameters. whole: those of parameters that every tensor-parallel device, and every
    device that ZeRO shards over, keeps a copy of on purpose.
    """

    table: Mapping[str, MeshAxes]
    optimizer_table: Mapping[str, MeshAxes]
    gradient_table: Mapping[str, MeshAxes]
    parameters: tuple[str, ...]
    whole: frozenset[str]


def axis_rules(parallel: ParallelConfig, model: TransformerConfig, devices: int) -> AxisRules:
    """The table, for a mesh of so many devices. Nothing else in megajax names a mesh axis for a tensor."""
    tp = parallel.tensor_model_parallel_size
    # Fewer key/value heads than shards: every shard keeps all of them and reads the one it needs.
    kv: MeshAxes = ("tp",) if (model.num_query_groups or tp) % tp == 0 else ()
    ssm_groups: MeshAxes = ("tp",) if (model.ssm_groups or tp) % tp == 0 else ()
    seq: MeshAxes = ("cp", "ulysses")
    activations: dict[str, MeshAxes] = {
        "batch": DATA_AXES,
        "seq": seq,
        "residual_seq": (*seq, "tp") if parallel.sequence_parallel else seq,
        "act_embed": (),
        "act_heads": ("tp",),
        "act_kv_heads": kv,
        "act_mlp": ("tp",),
        "act_ssm_heads": ("tp",),
        "act_ssm_groups": ssm_groups,
        "act_vocab": ("tp",),
        "zigzag": ("cp",) if parallel.zigzag else (),  # what divides sequences whose tokens lie in another order
        "stage": ("pp",) if parallel.stages_branch else (),  # work of one stage, of which others do nothing
    }
    parameters: dict[str, MeshAxes] = {
        "layers": ("pp",),
        "every_stage": (),  # layers beside those that a pipeline divides
        "inner_layers": (),  # a stack inside of a layer
        # Every stage of a pipeline does its share of embedding and loss.
        "vocab": ("pp", "tp") if parallel.pipeline_model_parallel_size > 1 else ("tp",),
        "embed": ZERO_AXES if parallel.zero == 3 else (),
        "heads": ("tp",),
        "kv_heads": kv,
        "mlp": ("tp",),
        "ssm_heads": ("tp",),
        "ssm_groups": ssm_groups,
        "experts": ("ep",),
        "expert_embed": _EXPERT_ZERO_AXES if parallel.zero == 3 else (),
        "expert_mlp": ("tp",),
        "expert_bias": (),
        "head_dim": (),
        "norm": (),
        "positions": (),
        "whole": (),  # for a dim that no mesh divides: says that this is meant, however large the parameter
    }
    table = activations | parameters
    repeated = {name for name, axes in (("kv_heads", kv), ("ssm_groups", ssm_groups)) if not axes}
    zeros = table | {"embed": ZERO_AXES, "expert_embed": _EXPERT_ZERO_AXES}
    # Where experts are laid out otherwise than attention, the rows of both are read in parts of these axes.
    refined = refinement(parallel, devices)
    table, zeros = expand(table, refined), expand(zeros, refined)
    return AxisRules(
        table,
        optimizer_table=zeros if parallel.zero >= 1 else table,
        gradient_table=zeros if parallel.zero >= 2 else table,
        parameters=tuple(parameters),
        whole=frozenset({"whole", "positions"} | repeated),
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """Tells XLA how x is laid out, one logical axis (or None) a dim. Does nothing without a mesh and a table."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(nn.get_logical_axis_rules())
    if mesh.empty or not rules:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, rules, where="an activation"))


def gathered(weight: Array, *axes: str) -> Array:
    """A weight with these logical axes as its product needs it: whole along "embed", which ZeRO-3 divides.

    Said here, not left to XLA, which at times finds it cheaper to move activations to where the weights lie. The
    gradient is laid out as the weight is.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    if math.prod(mesh.shape.get(axis, 1) for axis in rules.get("embed") or ()) == 1:
        return summed_as_it_lies(weight, *axes)
    whole = spec_of(tuple(None if axis == "embed" else axis for axis in axes), rules)
    return _laid_out(weight, whole, spec_of(axes, rules))


def summed_as_it_lies(weight: Array, *axes: str) -> Array:
    """A weight with these logical axes, whose gradient a stage that branches sums as it is: to divide it, XLA would
    permute, to which all stages would have to come."""
    return constrain_gradient(weight, *axes) if dict(nn.get_logical_axis_rules()).get("stage") else weight


def constrain_gradient(x: Array, *axes: str | None) -> Array:
    """x as it lies, while its gradient is laid out by these logical axes."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    return x if mesh.empty or not rules else _laid_out(x, None, spec_of(axes, rules, where="a gradient"))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _laid_out(x: Array, forward: PartitionSpec | None, backward: PartitionSpec) -> Array:
    return x if forward is None else jax.lax.with_sharding_constraint(x, forward)


def _laid_out_forward(x: Array, forward: PartitionSpec | None, backward: PartitionSpec) -> tuple[Array, None]:
    return _laid_out(x, forward, backward), None


def _laid_out_backward(forward: PartitionSpec | None, backward: PartitionSpec, _: None, d_x: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(d_x, backward),)


_laid_out.defvjp(_laid_out_forward, _laid_out_backward)


@contextlib.contextmanager
def residual_stream_of(tokens: int, *, whole: bool = False) -> Iterator[None]:
    """Where a sequence of so many tokens is not divided between layers if sequence parallelism cannot divide it evenly.

    For stacks beside the main one, such as a vision tower, whose lengths nobody can choose. whole: not in any case.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axes = rules.get("residual_seq") or ()
    if not whole and tokens % math.prod(mesh.shape.get(axis, 1) for axis in axes) == 0:
        yield
        return
    with nn.logical_axis_rules(tuple((rules | {"residual_seq": rules["seq"]}).items() if rules else ())):
        yield


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Where sequences are short and all context-parallel devices compute them whole, such as those of images.

    Sequence parallelism divides them still, between layers.
    """
    rules = dict(nn.get_logical_axis_rules())
    if not rules:
        yield
        return
    rest = tuple(axis for axis in rules["residual_seq"] or () if axis not in (rules["seq"] or ()))
    apart = {APART + name: () for name in ("seq", "residual_seq")}
    with nn.logical_axis_rules(tuple((rules | apart | {"seq": (), "residual_seq": rest}).items())):
        yield


def merge_tokens(x: Array) -> Array:
    """x [B, S, ...] -> [B S, ...], so that a weight gradient is one plain 2-D product.

    With two dims to contract, XLA:CPU writes transposed copies of both operands first, which costs a third of the step.
    x stays as it is where the mesh divides the sequence, if only between layers: two sharded dims do not become one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    seq = dict(nn.get_logical_axis_rules()).get("residual_seq") or ()
    if x.ndim < 3 or math.prod(mesh.shape.get(axis, 1) for axis in seq) > 1:
        return x
    return x.reshape(-1, *x.shape[2:])


def spec_of(axes: tuple[str | None, ...], table: Mapping[str, Any], *, where: str = "a parameter") -> PartitionSpec:
    """The partition spec of a tensor with these logical axes, one (or None) a dim; an unknown name raises."""
    unknown = [axis for axis in axes if axis is not None and axis not in table]
    if unknown:
        raise ConfigError(
            f"{where}: logical axis {unknown[0]!r} is not in the sharding table; known: {', '.join(table)}"
        )
    entries = [() if axis is None else table[axis] for axis in axes]
    return PartitionSpec(*(entry[0] if len(entry) == 1 else (entry or None) for entry in entries))


def specs_of_axes(axes: Any, table: Mapping[str, MeshAxes]) -> Any:
    """The partition spec of every leaf of a tree of logical axes, as `logical_axes` gives it."""
    return jax.tree.map(lambda names: spec_of(names, table), axes, is_leaf=lambda node: isinstance(node, tuple))


def logical_axes(boxed: Any) -> Any:
    """The tree of logical axis names of a boxed tree, as `model.init` returns it: a tuple of names for each leaf."""
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)


def is_box(leaf: Any) -> bool:
    """Whether `leaf` is a parameter that carries its logical axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def require_axes(params: Any) -> None:
    """Raises ConfigError for a parameter that does not say its logical axes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        if not is_box(leaf):
            raise ConfigError(
                f"{_name(path)}: has no logical axes; create it with nn.with_logical_partitioning(init, (axis of each"
                " dim, ...))"
            )


def partition_specs(boxed: Any, table: Mapping[str, MeshAxes], mesh: Mesh | AbstractMesh) -> Any:
    """The partition spec of every parameter.

    Linen alone would replicate a parameter whose axis is misspelt, and drop a mesh axis that is used twice; here both
    raise.

    Args:
      boxed: shapes and logical axes of the parameters: `jax.eval_shape(model.init, ...)` before `nn.unbox`.

    Raises:
      ConfigError: a parameter without axes, an unknown axis, a mesh axis used twice, or a size that does not divide.
    """
    require_axes(boxed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _parameter_spec(path, leaf, table, mesh), boxed, is_leaf=is_box
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _parameter_spec(path: Any, leaf: Any, table: Mapping[str, MeshAxes], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    where = _name(path)
    spec = spec_of(leaf.names, table, where=where)
    used: list[str] = []
    for dim, (axis, size) in enumerate(zip(leaf.names, leaf.value.shape, strict=True)):
        mesh_axes = () if axis is None else table[axis]
        shards = math.prod(mesh.shape[m] for m in mesh_axes)
        if size % shards:
            raise ConfigError(
                f"{where}: dim {dim} ({axis}) has size {size}, not divisible by {'x'.join(mesh_axes)}={shards};"
                " change the size or the mesh"
            )
        used += mesh_axes
    if len(set(used)) != len(used):
        raise ConfigError(f"{where}: logical axes {leaf.names} use a mesh axis twice; change the sharding table")
    return spec


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Partition specs to named shardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def validate_model(model: TransformerConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError where the model cannot be divided as `parallel` says."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.resolved_expert_tensor_parallel_size
    by = f"tensor_model_parallel_size={tp}"
    by_both = by if pp == 1 else f"{by} times pipeline_model_parallel_size={pp}"
    vocabulary = "the padded vocabulary (see make_vocab_size_divisible_by)"
    for name, size, shards, divisor in (
        ("num_attention_heads", model.num_attention_heads, tp, by),
        ("ffn_hidden_size", model.ffn_hidden_size, tp, by),
        ("num_moe_experts", model.num_moe_experts, ep, f"expert_model_parallel_size={ep}"),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, etp, f"expert_tensor_parallel_size={etp}"),
        (vocabulary, 0 if model.vocab_size is None else model.padded_vocab_size, tp * pp, by_both),
    ):
        if (size or 0) % shards:
            raise ConfigError(f"{name}={size} is not divisible by {divisor}; change one of them")
    _validate_dropout(model, parallel)
    _validate_experts(model, parallel)
    groups = model.num_query_groups or tp
    if groups % tp and tp % groups:
        raise ConfigError(
            f"num_query_groups={groups} neither divides nor is divided by tensor_model_parallel_size={tp};"
            " change one of them"
        )


def _validate_experts(model: TransformerConfig, parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.expert_model_parallel_size > 1 and model.num_moe_experts is None:
        raise ConfigError(
            f"expert_model_parallel_size={parallel.expert_model_parallel_size} has no effect without num_moe_experts;"
            " leave it out"
        )
    etp = parallel.expert_tensor_parallel_size
    if etp is not None and model.num_moe_experts is None:
        raise ConfigError(f"expert_tensor_parallel_size={etp} has no effect without num_moe_experts; leave it out")
    if model.num_moe_experts is not None and model.add_mlp_bias and tp > 1:
        raise ConfigError(
            f"tensor_model_parallel_size={tp} is not possible for experts with biases; set it to 1, or"
            " add_mlp_bias=False"
        )
    if model.mtp_num_layers and parallel.zigzag:
        raise ConfigError(
            f"mtp_num_layers={model.mtp_num_layers} is not possible with cp_comm_type={parallel.cp_comm_type!r}, whose"
            " tokens lie in another order; use all_gather or a2a"
        )
    if model.mtp_num_layers and pp > 1 and model.draws_noise:
        raise ConfigError(
            f"mtp_num_layers={model.mtp_num_layers} is not possible with dropout and pipeline_model_parallel_size={pp};"
            " set hidden_dropout and attention_dropout to 0"
        )


def _validate_dropout(model: TransformerConfig, parallel: ParallelConfig) -> None:
    """Dropout masks are the same on every mesh; a ring, whose tokens lie in another order, cannot draw them."""
    for name in ("hidden_dropout", "attention_dropout"):
        if parallel.zigzag and getattr(model, name):
            raise ConfigError(
                f"{name}={getattr(model, name)} is not possible with cp_comm_type={parallel.cp_comm_type!r}; set it to"
                " 0, or use all_gather or a2a"
            )
