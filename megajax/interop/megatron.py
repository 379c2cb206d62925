"""Megatron-LM weights in and out: state dicts, tensor-parallel shards, torch_dist checkpoints."""

# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop import megatron_checkpoint, megatron_layouts
from megajax.interop.hf_safetensors import LazyTensor, tensor_table, write_checkpoint
from megajax.interop.megatron_layouts import StateDict
from megajax.interop.megatron_shards import merge_tensor_parallel, split_tensor_parallel
from megajax.interop.pretrained import Pretrained
from megajax.models.family import MegatronWeights
from megajax.models.registry import FAMILIES

__all__ = [
    "load",
    "load_checkpoint",
    "load_folder",
    "merge_tensor_parallel",
    "save",
    "save_folder",
    "split_tensor_parallel",
]


def load(state_dict: StateDict, family: str, config: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> Pretrained:
    """Megatron-Core weights to a model.

    Args:
      state_dict: Megatron's names (of its local or its Transformer Engine layers) to arrays, unsharded.
      family: name in `megajax.models.registry`.
      config: fields of Megatron's TransformerConfig, and the attributes it reads beside them (`yarn_*`); dtypes and
        functions as objects or as text. Fields that steer processes and kernels are ignored.
      model_kwargs: arguments of Megatron's model. `vocab_size` and `max_sequence_length` default to the tables'
        rows. More rows than `vocab_size` are padding of the vocabulary.

    Returns:
      The model with its parameters as numpy arrays in the config's `params_dtype`.

    Raises:
      ConfigError: a field that is unknown or asks for something unsupported; tensors missing, surplus or misshapen.
    """
    weights, tensors = _weights(family), megatron_layouts.canonical(state_dict)
    cfg = weights.read_config(config, model_kwargs, tensors)
    model = weights.build(cfg)
    abstract = megatron_layouts.abstract_params(model, FAMILIES[family].example_inputs(cfg, 1, 1))
    wanted = list(weights.tensors(cfg, model, abstract))
    return Pretrained(family, cfg, model, megatron_layouts.to_params(tensors, wanted, abstract))


def _weights(family: str) -> MegatronWeights:
    known = {name: record.megatron for name, record in FAMILIES.items()}
    weights = known.get(family)
    if weights is None:
        can = ", ".join(name for name, it in known.items() if it is not None)
        raise ConfigError(f"family={family!r} has no Megatron weights here; use one of {can}")
    return weights()


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
    return {name: tensor.make() for name, tensor in lazy_tensors(pretrained).items()}


def lazy_tensors(pretrained: Pretrained) -> dict[str, LazyTensor]:
    """What `save` returns, each tensor made on demand: a model that nearly fills the memory can still be written."""
    weights, config = _weights(pretrained.family), FAMILIES[pretrained.family].config_of(pretrained.model)
    params = megatron_layouts.flatten(pretrained.params)
    return {
        tensor.name: LazyTensor(
            np.dtype(params[tensor.parts[0].path].dtype),
            tensor.shape,
            partial(megatron_layouts.from_params, params, tensor),
        )
        for tensor in weights.tensors(config, pretrained.model, params)
    }


def load_folder(path: str | Path, family: str = "gpt") -> Pretrained:
    """Reads a folder with safetensors and a config.json `{"transformer_config": fields, "model_args": arguments}`, or a
    torch_dist checkpoint, beside which such a config.json may lie.

    Raises:
      ConfigError: as for `load` and `load_checkpoint`.
    """
    folder = Path(path)
    config = model_kwargs = None
    if (folder / "config.json").is_file():
        config, model_kwargs = _read_settings(folder / "config.json")
    if (folder / "latest_checkpointed_iteration.txt").is_file() or (folder / ".metadata").is_file():
        return load_checkpoint(folder, family, config, model_kwargs)
    if config is None:
        raise ConfigError(f"{folder}: holds neither config.json nor a torch_dist checkpoint; give the folder of one")
    tensors = {name: entry.read() for name, entry in tensor_table(folder).items()}
    return load(tensors, family, config, model_kwargs or {})


def _read_settings(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict) or "transformer_config" not in settings:
        raise ConfigError(f"{file}: has no 'transformer_config'; it must hold transformer_config and model_args")
    return settings["transformer_config"], settings.get("model_args") or {}


def save_folder(pretrained: Pretrained, path: str | Path) -> None:
    """Writes what `load_folder` reads: model.safetensors and config.json, by the names of Megatron's local layers.

    Raises:
      ConfigError: a Megatron config cannot express the model, or the folder cannot be written.
    """
    fields, arguments = _weights(pretrained.family).write_config(pretrained.config)
    write_checkpoint(Path(path), lazy_tensors(pretrained), {"transformer_config": fields, "model_args": arguments})
