"""What one Hugging Face architecture is: how its config reads, and which of its tensors hold which parameters."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_fields import Fields
from megajax.interop.hf_safetensors import LazyTensor, TensorEntry
from megajax.models.gpt.gpt_model import GPTModel
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
    """One architecture. A new one is one more record in `hf.ARCHITECTURES`.

    Attributes:
      name: class with the language model head, as `architectures` of config.json has it.
      base: class without the head.
      model_type: config.json's `model_type`.
      defaults: value of each field that config.json may leave out.
      read: fields -> arguments of `TransformerConfig`.
      write: config -> fields. May write what is nearest: the caller compares what `read` makes of it.
      prefix: what the names of all but the head's tensors start with; files of `base` leave it out.
      rows: tensors outside the layers, without the prefix. layer_rows: those of each layer.
      head: the output layer's tensor.
      ignored: pattern of names, without the prefix, that hold no weights.
    """

    name: str
    base: str
    model_type: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    prefix: str
    rows: tuple[Row, ...]
    layer_rows: tuple[Row, ...]
    head: Row = HEAD
    ignored: str = r"(?!)"

    def read_config(self, values: Mapping[str, Any]) -> TransformerConfig:
        """config.json -> TransformerConfig; every field is mapped, plumbing, or refused."""
        fields = Fields(values, self.defaults)
        config = TransformerConfig(**self.read(fields))
        fields.finish()
        return config

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """TransformerConfig -> config.json. The token ids are unknown here, and null is better than a wrong default."""
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {"architectures": [self.name], "model_type": self.model_type} | self.write(config) | tokens

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of the file is a buffer: masks and inverse frequencies that follow from the config."""
        return re.fullmatch(self.ignored, name.removeprefix(self.prefix)) is not None


def layer_reader(config: TransformerConfig, layer_specs: Sequence[Builder]) -> Callable[[int], tuple[str, int]]:
    """Layer number -> (name of the stack that holds its parameters, row in it)."""
    segments = stack_layout(config, layer_specs)
    return lambda layer: locate(segments, layer)


def abstract_leaves(model: GPTModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, without making any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda key, ids: model.init(key, ids)["params"], jax.random.key(0), tokens)
    leaves: dict[str, Any] = dict(flatten_dict(nn.unbox(boxed), sep="/"))
    return leaves


class Part(NamedTuple):
    """A parameter, or one row of a stacked one."""

    path: str
    row: int | None
    shape: tuple[int, ...]

    def of(self, leaves: Leaves) -> np.ndarray:
        """The values, on the host."""
        leaf = leaves[self.path]
        return np.asarray(leaf if self.row is None else leaf[self.row])


class Tensor(NamedTuple):
    """One tensor of the file with the parameters it holds."""

    parts: tuple[Part, ...]
    transposed: bool
    vocab_size: int | None
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        width = sum(part.shape[-1] for part in self.parts)
        shape = (*self.parts[0].shape[:-1], width)
        shape = shape[::-1] if self.transposed else shape
        return shape if self.vocab_size is None else (self.vocab_size, *shape[1:])

    def lazy(self, leaves: Leaves) -> LazyTensor:
        """The tensor, made from the parameters when it is written."""

        def make() -> np.ndarray:
            arrays = [part.of(leaves) for part in self.parts]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
            array = array.T if self.transposed else array
            return array if self.vocab_size is None else array[: self.vocab_size]

        return LazyTensor(self.dtype, self.shape, make)

    def store(self, array: np.ndarray, leaves: Leaves) -> None:
        """Puts what the file holds into `leaves`; rows that pad the vocabulary keep what they have."""
        array = array.T if self.transposed else array
        start = 0
        for part in self.parts:
            target = leaves[part.path] if part.row is None else leaves[part.path][part.row]
            piece = array[..., start : start + part.shape[-1]]
            target[tuple(slice(size) for size in piece.shape)] = piece
            start += part.shape[-1]


def tensor_plan(
    architecture: Architecture, model: GPTModel, leaves: Mapping[str, jax.ShapeDtypeStruct], prefix: str
) -> dict[str, Tensor]:
    """Every tensor that a file of this model has. Rows whose parameters the model lacks (biases, say) drop out.

    Args:
      leaves: `abstract_leaves(model)`.
      prefix: what the file's names start with.

    Raises:
      ConfigError: the model has parameters that the architecture has no tensor for.
    """
    config = model.resolved_config
    where = layer_reader(config, model.layer_specs)
    plan: dict[str, Tensor] = {}

    def add(name: str, row: Row, folder: str, index: int | None) -> None:
        paths = [folder + part for part in row.parts]
        present = [path for path in paths if path in leaves]
        if len(present) != len(paths):
            return
        cut = 0 if index is None else 1
        parts = tuple(Part(path, index, leaves[path].shape[cut:]) for path in paths)
        vocab = config.vocab_size if row.vocabulary else None
        plan[name] = Tensor(parts, row.transposed, vocab, np.dtype(leaves[paths[0]].dtype))

    for row in architecture.rows:
        add(prefix + row.name, row, "", None)
    for i in range(config.num_layers):
        stack, index = where(i)
        for row in architecture.layer_rows:
            add(prefix + row.name.format(i=i), row, f"decoder/{stack}/", index)
    add(architecture.head.name, architecture.head, "", None)
    held = {(part.path, part.row) for tensor in plan.values() for part in tensor.parts}
    lost = sorted(set(leaves) - {path for path, _ in held})
    if lost:
        raise ConfigError(f"{architecture.name} has no tensor for {_first(lost)}")
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
        if not jnp.issubdtype(table[name].dtype, jnp.floating):
            raise ConfigError(f"{name} is {table[name].dtype}; quantised weights are not supported")


def _first(names: Sequence[str], count: int = 4) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
