"""Hugging Face checkpoints in and out: `load` a folder with config.json and safetensors, `save` one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Tensor, abstract_leaves, check_names, tensor_plan
from megajax.interop.hf_choice import choose
from megajax.interop.hf_fields import PLUMBING, read_config
from megajax.interop.hf_safetensors import MAX_SHARD_SIZE, TensorEntry, tensor_table, write_checkpoint
from megajax.interop.pretrained import Pretrained
from megajax.models.registry import FAMILIES

Path = str | os.PathLike[str]


def architectures(family: str | None = None) -> tuple[tuple[str, Architecture], ...]:
    """(family, architecture) of every one that is read and written, or of one family's. Where several can express a
    model, the first is written."""
    chosen = [record for name, record in FAMILIES.items() if family in (None, name)]
    return tuple((record.name, architecture) for record in chosen for architecture in record.hf())


def load(path: Path, *, make_vocab_size_divisible_by: int = 1) -> Pretrained:
    """Reads a model from a folder with config.json and model.safetensors (or shards and their index).

    The weights keep the files' dtype (float32 where files mix several), which becomes `params_dtype`. They are read
    one tensor at a time into NumPy arrays: move them to devices, sharded or not, as you need.

    Args:
      make_vocab_size_divisible_by: pads the vocabulary's tables with zeros to a multiple of this; padding ids have no
        logits.

    Raises:
      ConfigError: the folder is no complete checkpoint, or its architecture or one of its options is not supported.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the folder with config.json and model.safetensors")
    values = read_config(folder)
    family, architecture, is_base = _named(values)
    if (
        is_base and architecture.head is not None
    ):  # no head in the file: logits, if anyone asks for them, come from the embedding
        values["tie_word_embeddings"] = True
    table = {architecture.current_name(name): entry for name, entry in tensor_table(folder).items()}
    values |= architecture.told_by_names(table)
    if _has_own_head(architecture, table):
        values["tie_word_embeddings"] = False
    config = architecture.read_config(values).replace(make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    config = config.replace(params_dtype=_common_dtype(architecture, table))
    model = architecture.build(config)
    prefix = architecture.prefix if any(name.startswith(architecture.prefix) for name in table) else ""
    shapes = abstract_leaves(model, architecture.example_inputs(config))
    plan = tensor_plan(architecture, config, model, shapes, prefix)
    second_head = _second_head(architecture, config, table)
    check_names(architecture, plan, table, prefix)
    leaves = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    for name, entry in table.items():
        if name in plan:
            plan[name].store(entry.read(), leaves)
    if second_head is not None and architecture.head is not None:
        _require_tied(architecture.head.name, second_head, leaves["embedding/word_embeddings/embedding"])
    return Pretrained(family, config, model, unflatten_dict(leaves, sep="/"))


def save(pretrained: Pretrained, path: Path, *, like: Path | None = None, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a folder that transformers loads: config.json and safetensors, in the parameters' dtype.

    The architecture is the first of the family's whose config.json can express every option that matters. Padding
    of the vocabulary is cut off. A checkpoint that already lies in the folder is replaced once the new one is complete;
    other files stay.

    Args:
      like: folder of the Hugging Face checkpoint the model came from. Its architecture is used, and its token ids,
        tokenizer and generation settings are carried over. Without it, config.json has no token ids.
      max_shard_size: bytes; more is split into several files with an index.

    Raises:
      ConfigError: no architecture can express the model, or the folder cannot be written.
    """
    model = pretrained.model
    candidates = tuple(architecture for _, architecture in architectures(pretrained.family))
    if not candidates:
        raise ConfigError(f"family={pretrained.family!r} has no Hugging Face counterpart here")
    config = FAMILIES[pretrained.family].config_of(model)
    source = {} if like is None else read_config(pathlib.Path(like))
    architecture = choose(config, (_named(source)[1],) if source else candidates)
    shapes = abstract_leaves(model, architecture.example_inputs(config))
    plan = tensor_plan(architecture, config, model, shapes, architecture.prefix)
    leaves: dict[str, Any] = dict(flatten_dict(nn.unbox(pretrained.params), sep="/"))
    _check_leaves(shapes, leaves)
    dtypes = {name: jnp.dtype(leaf.dtype) for name, leaf in leaves.items()}
    tensors = {name: tensor._replace(dtype=_dtype(tensor, dtypes)).lazy(leaves) for name, tensor in plan.items()}
    values = architecture.write_config(config)
    values |= {name: value for name, value in source.items() if name in PLUMBING}
    values |= {"architectures": [architecture.name], "torch_dtype": str(next(iter(dtypes.values())))}
    values.pop("dtype", None)
    companions = [] if like is None else _companions(pathlib.Path(like))
    write_checkpoint(pathlib.Path(path), tensors, values, companions=companions, max_shard_size=max_shard_size)


def _named(values: Mapping[str, Any]) -> tuple[str, Architecture, bool]:
    """(family, the architecture that config.json names, whether it is the one without a head)."""
    names = values.get("architectures") or []
    for family, architecture in architectures():
        if architecture.name in names or architecture.base in names:
            return family, architecture, architecture.name not in names
        if not names and values.get("model_type") == architecture.model_type:
            return family, architecture, False
    known = ", ".join(architecture.name for _, architecture in architectures())
    stated = f"architectures={names}" if names else f"model_type={values.get('model_type')!r}"
    raise ConfigError(f"config.json: {stated} is not supported; known: {known}")


def _common_dtype(architecture: Architecture, table: Mapping[str, TensorEntry]) -> Any:
    dtypes = {entry.dtype for name, entry in table.items() if not architecture.is_ignored(name)}
    name = str(dtypes.pop()) if len(dtypes) == 1 else "float32"
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _second_head(
    architecture: Architecture, config: TransformerConfig, table: dict[str, TensorEntry]
) -> TensorEntry | None:
    """Takes a tied model's copy of the embedding out of `table`."""
    head = architecture.head
    return table.pop(head.name, None) if head is not None and config.share_embeddings_and_output_weights else None


def _has_own_head(architecture: Architecture, table: Mapping[str, TensorEntry]) -> bool:
    """Whether the file holds an output layer of its own, whatever its config.json says."""
    names = (architecture.head and architecture.head.name, architecture.tied_to)
    head, embedding = (table.get(name or "") for name in names)
    return head is not None and embedding is not None and not np.array_equal(head.read(), embedding.read())


def _require_tied(name: str, head: TensorEntry, embedding: np.ndarray) -> None:
    values = head.read().astype(embedding.dtype)
    if not np.array_equal(values, embedding[: values.shape[0]]):
        raise ConfigError(
            f"config.json: tie_word_embeddings=true, but {name} differs from the embedding; set it to false"
        )


def _companions(folder: pathlib.Path) -> list[pathlib.Path]:
    """The small files beside a checkpoint's weights: tokenizer and generation settings."""
    patterns = ("*token*.json", "*.model", "merges.txt", "vocab.*", "generation_config.json", "chat_template.*")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _check_leaves(expected: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    odd = sorted(set(expected) ^ set(leaves))
    if odd:
        raise ConfigError(f"the parameters do not fit their model: {odd[0]} is on one side only")
    for name, leaf in leaves.items():
        if tuple(leaf.shape) != expected[name].shape:
            raise ConfigError(f"{name} has shape {tuple(leaf.shape)}, but its model makes it {expected[name].shape}")


def _dtype(tensor: Tensor, dtypes: Mapping[str, np.dtype]) -> np.dtype:
    return dtypes[tensor.parts[0].path] if tensor.parts else tensor.dtype
