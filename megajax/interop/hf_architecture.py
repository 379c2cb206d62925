"""What one Hugging Face architecture is: how its config reads, and which of its tensors hold which parameters."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.codec import Codec
from megajax.interop.hf_fields import Fields
from megajax.interop.hf_safetensors import LazyTensor, TensorEntry
from megajax.spec import Builder
from megajax.transformer.block import stack_layout
from megajax.transformer.stack import locate

Leaves = Mapping[str, Any]
"""Parameters by path, "decoder/layers/mlp/linear_fc1/kernel"."""


class Row(NamedTuple):
    """One tensor of the file, and the parameters it holds side by side along its output features.

    name, parts: `{i}` of the name is the layer's number; parts of a layer are paths inside the layer.
    transposed: the file has [out, in] (torch's Linear), megajax [in, out].
    vocabulary: its first dim is the vocabulary, which megajax may pad.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    vocabulary: bool = False


HEAD = Row("lm_head.weight", ("output_layer/kernel",), transposed=True, vocabulary=True)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture. A new one is one more record of its family's.

    Attributes:
      name: class with the language model head, as `architectures` of config.json has it.
      base: class without the head; None if there is none.
      model_type: config.json's `model_type`.
      defaults: value of each field that config.json may leave out.
      read: fields -> arguments of `TransformerConfig`.
      write: config -> fields. May write what is nearest: the caller compares what `read` makes of it.
      prefix: what the names of all but the head's tensors start with; files of `base` leave it out.
      rows: tensors outside the layers, without the prefix. layer_rows: those of each layer.
      head: the output layer's tensor.
      tied_to: the embedding's tensor, where files say that the head is tied to it even if it is not: if a head is there
        and differs, it is not.
      ignored: pattern of names, without the prefix, that hold no weights.
      told_by_names: names of a file's tensors, as they are read here -> fields that config.json leaves open.
      older_names: (pattern, replacement) of names in files that other versions wrote, to those that are read here.
      config_type: what `read` gives the arguments of.
      build: config -> model.
      example_inputs: config -> arguments of `model.init`.
      plan: (architecture, config, model, shapes of the parameters by path, prefix) -> the tensors of a file by name;
        None is a decoder's, by the rows above.
    """

    name: str
    base: str | None
    model_type: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    prefix: str
    build: Callable[[Any], nn.Module]
    rows: tuple[Row, ...] = ()
    layer_rows: tuple[Row, ...] = ()
    head: Row | None = HEAD
    tied_to: str | None = None
    ignored: str = r"(?!)"
    told_by_names: Callable[[Collection[str]], dict[str, Any]] = lambda names: {}
    older_names: tuple[tuple[str, str], ...] = ()
    config_type: type[TransformerConfig] = TransformerConfig
    example_inputs: Callable[[Any], tuple[Any, ...]] = lambda config: (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
    plan: Callable[[Architecture, Any, Any, Mapping[str, Any], str], dict[str, Tensor]] | None = None

    def read_config(self, values: Mapping[str, Any]) -> TransformerConfig:
        """config.json -> TransformerConfig; every field is mapped, plumbing, or refused."""
        fields = Fields(values, self.defaults)
        config = self.config_type(**self.read(fields))
        fields.finish()
        return config

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """TransformerConfig -> config.json. Token ids that a model does not read are unknown here, and null is better
        than a wrong default."""
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {"architectures": [self.name], "model_type": self.model_type} | tokens | self.write(config)

    def current_name(self, name: str) -> str:
        """The name that a tensor of a file has in `plan`."""
        for pattern, replacement in self.older_names:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of the file is a buffer: masks and inverse frequencies that follow from the config."""
        return re.fullmatch(self.ignored, name.removeprefix(self.prefix)) is not None


def layer_reader(config: TransformerConfig, layer_specs: Sequence[Builder]) -> Callable[[int], tuple[str, int]]:
    """Layer number -> (name of the stack that holds its parameters, row in it)."""
    segments = stack_layout(config, layer_specs)
    return lambda layer: locate(segments, layer)


def abstract_leaves(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, without making any. inputs: arguments of `model.init`."""
    boxed = jax.eval_shape(lambda key, *args: model.init(key, *args)["params"], jax.random.key(0), *inputs)
    leaves: dict[str, Any] = dict(flatten_dict(nn.unbox(boxed), sep="/"))
    return leaves


class Part(NamedTuple):
    """A parameter, or a row of a stacked one: its layer, or (layer, expert)."""

    path: str
    row: int | tuple[int, ...] | None
    shape: tuple[int, ...]

    def of(self, leaves: Leaves) -> np.ndarray:
        """The values, on the host."""
        leaf = leaves[self.path]
        return np.asarray(leaf if self.row is None else leaf[self.row])


class Tensor(NamedTuple):
    """One tensor of the file with the parameters it holds, if any. A codec, where there is one, says how."""

    parts: tuple[Part, ...]
    transposed: bool
    vocab_size: int | None
    dtype: np.dtype
    codec: Codec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        if self.codec is not None:
            return self.codec.shape
        width = sum(part.shape[-1] for part in self.parts)
        shape = (*self.parts[0].shape[:-1], width)
        shape = shape[::-1] if self.transposed else shape
        return shape if self.vocab_size is None else (self.vocab_size, *shape[1:])

    def lazy(self, leaves: Leaves) -> LazyTensor:
        """The tensor, made from the parameters when it is written."""

        def make() -> np.ndarray:
            arrays = [part.of(leaves) for part in self.parts]
            if self.codec is not None:
                return np.ascontiguousarray(self.codec.join(arrays)).reshape(self.shape)  # no dims stay none
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
            array = array.T if self.transposed else array
            return array if self.vocab_size is None else array[: self.vocab_size]

        return LazyTensor(self.dtype, self.shape, make)

    def store(self, array: np.ndarray, leaves: Leaves) -> None:
        """Puts what the file holds into `leaves`; rows that pad the vocabulary keep what they have."""
        if self.codec is not None:
            for part, piece in zip(self.parts, self.codec.split(array), strict=True):
                leaves[part.path][... if part.row is None else part.row] = piece
            return
        array = array.T if self.transposed else array
        start = 0
        for part in self.parts:
            target = leaves[part.path] if part.row is None else leaves[part.path][part.row]
            piece = array[..., start : start + part.shape[-1]]
            target[tuple(slice(size) for size in piece.shape)] = piece
            start += part.shape[-1]


def tensor_plan(
    architecture: Architecture, config: TransformerConfig, model: nn.Module, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    """Every tensor that a file of this model has. Rows whose parameters the model lacks (biases, say) drop out.

    Args:
      leaves: `abstract_leaves(model)`.
      prefix: what the file's names start with.

    Raises:
      ConfigError: the model has parameters that the architecture has no tensor for.
    """
    make = architecture.plan or decoder_plan
    plan = make(architecture, config, model, leaves, prefix)
    held = {part.path for tensor in plan.values() for part in tensor.parts}
    lost = sorted(set(leaves) - held)
    if lost:
        raise ConfigError(f"{architecture.name} has no tensor for {_first(lost)}")
    return plan


def decoder_plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    """The tensors of a model with one stack of layers, "decoder", by the architecture's rows."""
    plan = rows_plan(architecture.rows, leaves, config, prefix)
    plan |= layer_plan(architecture.layer_rows, leaves, config, model.layer_specs, prefix)
    return plan | rows_plan([architecture.head] if architecture.head else [], leaves, config)


def rows_plan(
    rows: Iterable[Row],
    leaves: Mapping[str, Any],
    config: TransformerConfig,
    prefix: str = "",
    *,
    folder: str = "",
    row: int | tuple[int, ...] | None = None,
    **numbers: int,
) -> dict[str, Tensor]:
    """The tensors of rows whose parameters the model has, all of each row's.

    Args:
      folder: what the paths of the parts start with. row: their row there. numbers: what `{i}` in the names stands for.
    """
    plan: dict[str, Tensor] = {}
    cut = 0 if row is None else 1 if isinstance(row, int) else len(row)
    for it in rows:
        paths = [folder + part for part in it.parts]
        if all(path in leaves for path in paths):
            parts = tuple(Part(path, row, leaves[path].shape[cut:]) for path in paths)
            vocab = config.vocab_size if it.vocabulary else None
            dtype = np.dtype(leaves[paths[0]].dtype)
            plan[prefix + it.name.format(**numbers)] = Tensor(parts, it.transposed, vocab, dtype)
    return plan


def layer_plan(
    rows: Sequence[Row],
    leaves: Mapping[str, Any],
    config: TransformerConfig,
    layer_specs: Sequence[Builder],
    prefix: str = "",
    *,
    block: str = "decoder",
) -> dict[str, Tensor]:
    """`rows_plan` of each layer of a `TransformerBlock` whose parameters lie in `block`."""
    where = layer_reader(config, layer_specs)
    plan: dict[str, Tensor] = {}
    for i in range(config.num_layers):
        stack, row = where(i)
        plan |= rows_plan(rows, leaves, config, prefix, folder=f"{block}/{stack}/", row=row, i=i)
    return plan


def check_names(
    architecture: Architecture, plan: Mapping[str, Tensor], table: Mapping[str, TensorEntry], prefix: str
) -> None:
    """Refuses a file that lacks tensors, has others than the config says, or has them in other shapes."""
    missing = [name for name in plan if name not in table]
    surplus = [name for name in table if name not in plan and not architecture.is_ignored(name)]
    if missing:
        raise ConfigError(f"the checkpoint lacks {_first(missing)}, which its config.json asks for")
    if surplus:
        raise ConfigError(f"the checkpoint holds {_first(surplus)}, which its config.json does not account for")
    for name, tensor in plan.items():
        if table[name].shape != tensor.shape:
            raise ConfigError(
                f"{name} has shape {list(table[name].shape)}, but config.json makes it {list(tensor.shape)}"
            )
        if tensor.parts and not jnp.issubdtype(table[name].dtype, jnp.floating):
            raise ConfigError(f"{name} is {table[name].dtype}; quantised weights are not supported")


def _first(names: Sequence[str], count: int = 4) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
