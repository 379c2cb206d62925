"""How Megatron's tensors and megajax's parameters hold the same numbers: names, transposes, fused projections."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.codec import Codec
from megajax.spec import Builder
from megajax.transformer.block import stack_layout
from megajax.transformer.stack import locate

Path = tuple[str, ...]
Shape = tuple[int, ...]
StateDict = Mapping[str, np.ndarray]

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_FUSED = {
    "self_attention": ("linear_qkv", ("linear_q", "linear_gate", "linear_k", "linear_v")),
    "cross_attention": ("linear_kv", ("linear_k", "linear_v")),
    "mlp": ("linear_fc1", ("linear_gate", "linear_fc1")),
}
"""Sublayer -> Megatron's fused linear, and the linears it holds, in the order of its rows."""

_TE_NAMES = (
    (r"\.self_attention\.(?:linear_qkv\.)?layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mixer\.in_proj\.layer_norm_(weight|bias)$", r".norm.\1"),
    (r"\.mlp\.(?:linear_fc1\.)?layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
    (r"\.self_attention\.linear_(q|kv)_up_proj\.layer_norm_(weight|bias)$", r".self_attention.\1_layernorm.\2"),
    (r"\.experts\.linear_fc([12])\.(weight|bias)(\d+)$", r".experts.local_experts.\3.linear_fc\1.\2"),
)
"""Transformer Engine keeps a norm inside the linear that follows it; the local layers, whose names are used here, do
not."""


class Part(NamedTuple):
    """One parameter, or a row of a stacked one: its layer, or (layer, expert), or (layer, layer inside of it).

    shape: of the row.
    """

    path: Path
    row: int | tuple[int, ...] | None
    shape: Shape

    @property
    def transposed(self) -> bool:
        """Kernels are [in, out] here and [out, in] in Megatron."""
        return self.path[-1] == "kernel"

    @property
    def megatron_shape(self) -> Shape:
        """Shape with Megatron's dims."""
        return self.shape[::-1] if self.transposed else self.shape


class Tensor(NamedTuple):
    """One Megatron tensor: the rows of its parts, interleaved by group.

    `linear_qkv` holds, for each group of query heads that share keys and values, their queries, then their gates if
    there are any, the key and the value. Everything else has one group: `linear_fc1` of a gated MLP is [gate; up]. A
    codec, where there is one, says all this instead.
    """

    name: str
    parts: tuple[Part, ...]
    groups: int = 1
    codec: Codec | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the whole."""
        if self.codec is not None:
            return self.codec.shape
        shapes = [part.megatron_shape for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def split(self, whole: np.ndarray) -> list[np.ndarray]:
        """The tensor to its parts, each with the dims it has here."""
        if self.codec is not None:
            return list(self.codec.split(whole))
        grouped = whole.reshape(self.groups, -1, *whole.shape[1:])
        ends = np.cumsum([part.megatron_shape[0] // self.groups for part in self.parts])[:-1]
        pieces = [
            piece.reshape(part.megatron_shape)
            for part, piece in zip(self.parts, np.split(grouped, ends, axis=1), strict=True)
        ]
        return [piece.T if part.transposed else piece for part, piece in zip(self.parts, pieces, strict=True)]

    def join(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        if self.codec is not None:
            return np.ascontiguousarray(self.codec.join(pieces))
        rows = [piece.T if part.transposed else piece for part, piece in zip(self.parts, pieces, strict=True)]
        grouped = [piece.reshape(self.groups, piece.shape[0] // self.groups, *piece.shape[1:]) for piece in rows]
        return np.ascontiguousarray(np.concatenate(grouped, axis=1).reshape(self.shape))


def abstract_params(model: nn.Module, inputs: tuple[Any, ...]) -> dict[Path, Any]:
    """Shape and dtype of every parameter, by path. inputs: arguments of `model.init`."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return flatten(variables["params"])


def flatten(params: Any) -> dict[Path, Any]:
    """A parameter tree, boxed or not, by path."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(nn.unbox(params))
    return flat


def decoder_tensors(config: TransformerConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors of embedding, decoder and output layer, in the order of its modules.

    params: anything with shapes, by path.
    """
    yield from outer_tensors(params, [path for path in params if path[0] == "embedding"])
    yield from layer_tensors(config, model.layer_specs, params)
    last = [path for path in params if path[:2] == ("decoder", "final_layernorm")]
    yield from further_tensors(config, params)
    yield from outer_tensors(params, [*last, *(path for path in params if path[0] == "output_layer")])


def further_tensors(config: TransformerConfig, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """The modules of multi-token prediction, `mtp_<k>` here and `mtp.layers.<k>` in Megatron."""
    groups = config.for_layer(config.num_layers - 1).num_query_groups or 1
    for depth in range(config.mtp_num_layers or 0):
        leaves = [(path[1:], path, leaf.shape) for path, leaf in params.items() if path[0] == f"mtp_{depth}"]
        for inner, skip in (("", 1), ("transformer_layer.", 2)):
            own = [(path, shape) for rest, path, shape in leaves if (rest[0] == "transformer_layer") is bool(inner)]
            parts = [part for path, shape in own for part in _parts(path, None, shape)]
            yield from tensors_of(f"mtp.layers.{depth}.{inner}", parts, skip=skip, query_groups=groups)


def outer_tensors(params: Mapping[Path, Any], paths: Iterable[Path]) -> Iterator[Tensor]:
    """Parameters outside of stacks of layers, which Megatron calls as they are called here."""
    return tensors_of("", [Part(path, None, params[path].shape) for path in paths])


def layer_tensors(
    config: TransformerConfig, layer_specs: Sequence[Builder], params: Mapping[Path, Any], block: str = "decoder"
) -> Iterator[Tensor]:
    """The tensors of each layer of a `TransformerBlock` called `block`, which Megatron calls `<block>.layers.<i>`."""
    segments = stack_layout(config, layer_specs)
    for layer in range(config.num_layers):
        stack, row = locate(segments, layer)
        prefix = (block, stack)
        leaves = [(path, leaf.shape[1:]) for path, leaf in params.items() if path[:2] == prefix]
        parts = [part for path, shape in leaves for part in _parts(path, row, shape)]
        groups = config.for_layer(layer).num_query_groups or 1
        yield from tensors_of(f"{block}.layers.{layer}.", parts, skip=2, query_groups=groups)


def _parts(path: Path, row: int | None, shape: Shape) -> list[Part]:
    """A layer's row of a parameter; those of all its experts have one part each."""
    if "experts" not in path:
        return [Part(path, row, shape)]
    of_layer = () if row is None else (row,)
    return [Part(path, (*of_layer, expert), shape[1:]) for expert in range(shape[0])]


def tensors_of(prefix: str, parts: Iterable[Part], *, skip: int = 0, query_groups: int = 1) -> Iterator[Tensor]:
    """The tensors that `parts` make up. The first `skip` names of their paths are replaced by `prefix`."""
    named: dict[str, dict[int, Part]] = {}
    for part in parts:
        name, position = _megatron_name(_own_path(part)[skip:])
        named.setdefault(name, {})[position] = part
    for name, positions in named.items():
        groups = query_groups if re.search(r"(^|\.)linear_q?kv\.", name) else 1
        yield Tensor(prefix + name, tuple(positions[i] for i in sorted(positions)), groups)


def _own_path(part: Part) -> Path:
    """The path of a parameter, with the number of its expert."""
    if not isinstance(part.row, tuple) or "experts" not in part.path:
        return part.path
    at = part.path.index("experts") + 1
    return (*part.path[:at], "local_experts", str(part.row[-1]), *part.path[at:])


def _megatron_name(path: Path) -> tuple[str, int]:
    """(Megatron's name of a parameter, its place among those that share the name)."""
    *modules, leaf = path
    position = 0
    if modules[0] in _FUSED:
        fused, members = _FUSED[modules[0]]
        if modules[-1] in members:
            position, modules[-1] = members.index(modules[-1]), fused
        elif modules[1:] == ["shared_expert_gate"]:
            return "mlp.shared_experts.gate_weight", 0
        elif modules[1:] == ["linear"]:  # a linear map in place of the whole sublayer
            modules = modules[:1]
    return ".".join([*modules, LEAVES.get(leaf, leaf)]), position


def canonical(state_dict: StateDict) -> dict[str, np.ndarray]:
    """The tensors by their local names: Transformer Engine's names translated, its `_extra_state` dropped."""
    result = {}
    for name, value in state_dict.items():
        if "_extra_state" in name or name.endswith("tokens_per_expert"):
            continue
        for pattern, local in _TE_NAMES:
            name = re.sub(pattern, local, name)
        result[name] = value
    return result


def to_params(
    state_dict: StateDict, wanted: Sequence[Tensor], abstract: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """The parameter tree, stacked, in the dtypes of `abstract`. state_dict has canonical names.

    Raises:
      ConfigError: tensors that are missing, that the model does not have, or that have another shape.
    """
    _require_same_names(state_dict, [tensor.name for tensor in wanted])
    flat = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    for tensor in wanted:
        value = np.asarray(state_dict[tensor.name])
        if value.shape != tensor.shape:
            raise ConfigError(f"{tensor.name} has shape {value.shape}; this config needs {tensor.shape}")
        for part, piece in zip(tensor.parts, tensor.split(value), strict=True):
            flat[part.path][... if part.row is None else part.row] = piece
    return traverse_util.unflatten_dict(flat)


def from_params(params: Mapping[Path, Any], tensor: Tensor) -> np.ndarray:
    """One of Megatron's tensors; params by path."""
    pieces = [params[part.path] if part.row is None else params[part.path][part.row] for part in tensor.parts]
    return tensor.join([np.asarray(piece) for piece in pieces])


def _require_same_names(state_dict: StateDict, wanted: Sequence[str]) -> None:
    for what, names in (
        ("lacks", [name for name in wanted if name not in state_dict]),
        ("has tensors that this config does not:", sorted(set(state_dict) - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"the Megatron state dict {what} {', '.join(names[:3])}{more}")
