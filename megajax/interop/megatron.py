"""Megatron-LM weights in and out: state dicts, tensor-parallel shards, torch_dist checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop import megatron_checkpoint, megatron_layouts
from megajax.interop.megatron_config import transformer_config
from megajax.interop.megatron_layouts import StateDict
from megajax.interop.megatron_shards import merge_tensor_parallel, split_tensor_parallel
from megajax.interop.pretrained import Pretrained
from megajax.models.gpt.gpt_model import GPTModel

__all__ = ["load", "load_checkpoint", "merge_tensor_parallel", "save", "split_tensor_parallel"]

FAMILIES = ("gpt",)
"""Families that can be read and written."""


def load(state_dict: StateDict, family: str, config: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> Pretrained:
    """Megatron-Core weights to a model.

    Args:
      state_dict: Megatron's names (of its local or its Transformer Engine layers) to arrays, unsharded.
      family: "gpt".
      config: fields of Megatron's TransformerConfig, and the attributes it reads beside them (`yarn_*`); dtypes and
        functions as objects or as text. Fields that steer processes and kernels are ignored.
      model_kwargs: arguments of Megatron's GPTModel. `vocab_size` and `max_sequence_length` default to the tables'
        rows. More rows than `vocab_size` are padding of the vocabulary.

    Returns:
      The model with its parameters as numpy arrays in the config's `params_dtype`.

    Raises:
      ConfigError: a field that is unknown or asks for something unsupported; tensors missing, surplus or misshapen.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"family={family!r} cannot be read from Megatron weights yet; use one of {', '.join(FAMILIES)}"
        )
    tensors = megatron_layouts.canonical(state_dict)
    rows = megatron_layouts.vocabulary_rows(tensors)
    model_kwargs = {"vocab_size": rows, **model_kwargs}
    positions = tensors.get("embedding.position_embeddings.weight")
    if positions is not None and model_kwargs.get("max_sequence_length") is None:
        model_kwargs["max_sequence_length"] = len(positions)
    cfg = transformer_config(config, model_kwargs)
    if rows > cfg.padded_vocab_size:
        cfg = cfg.replace(make_vocab_size_divisible_by=rows)
    if cfg.share_embeddings_and_output_weights:
        _drop_tied_copy(tensors)
    model = GPTModel(cfg)
    abstract = megatron_layouts.abstract_params(model)
    wanted = list(megatron_layouts.tensors(cfg, model, abstract))
    return Pretrained(family, cfg, model, megatron_layouts.to_params(tensors, wanted, abstract))


def _drop_tied_copy(tensors: dict[str, np.ndarray]) -> None:
    """The last pipeline stage of a tied model keeps the embedding a second time, as its output layer."""
    copy = tensors.pop("output_layer.weight", None)
    if copy is not None and not np.array_equal(copy, tensors["embedding.word_embeddings.weight"]):
        raise ConfigError(
            "output_layer.weight differs from the embedding although share_embeddings_and_output_weights=True;"
            " set it to False"
        )


def load_checkpoint(
    path: str | Path,
    family: str = "gpt",
    config: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Reads the newest checkpoint of a folder that Megatron wrote in its torch_dist format.

    Needs torch (`pip install 'megajax[megatron]'`). Pickled parts are read with restrictions: anything in them that
    is not part of a checkpoint is refused.

    Args:
      path: folder with `latest_checkpointed_iteration.txt`, or one `iter_*` folder.
      config: as for `load`; None takes the training arguments that the checkpoint keeps.
      model_kwargs: as for `load`.

    Raises:
      ConfigError: as for `load`; no such checkpoint, torch is missing, or a file is damaged or dangerous.
    """
    folder = megatron_checkpoint.iteration_folder(path)
    if config is None:
        config, arguments = megatron_checkpoint.read_settings(folder)
        model_kwargs = {**arguments, **(model_kwargs or {})}
    return load(megatron_checkpoint.read_tensors(folder), family, config, model_kwargs or {})


def save(pretrained: Pretrained) -> dict[str, np.ndarray]:
    """The inverse of `load`: tensors by the names of Megatron's local layers, numpy, in the parameters' dtypes.

    Any tree of the parameters' structure can stand in for them, such as gradients.
    """
    if not isinstance(pretrained.model, GPTModel):
        raise ConfigError(f"family={pretrained.family!r} cannot be written as Megatron weights; use one of {FAMILIES}")
    params = megatron_layouts.flatten(pretrained.params)
    config = pretrained.model.resolved_config
    return megatron_layouts.to_state_dict(params, megatron_layouts.tensors(config, pretrained.model, params))
