"""RETRO's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop.megatron_config import config_arguments, megatron_settings
from megajax.interop.megatron_fields import FIELDS, MODEL_ARGUMENTS, Mapped, Plumbing, Rule
from megajax.interop.megatron_layouts import Part, Path, Tensor, layer_tensors, outer_tensors, tensors_of
from megajax.interop.megatron_tables import fitted_to_tables, with_sizes_of_tables
from megajax.models.family import MegatronWeights
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.encoder_spec import get_retro_encoder_block_spec
from megajax.models.retro.model import RETROModel
from megajax.transformer.block import stack_layout
from megajax.transformer.stack import locate

_SAME = (
    "retro_chunk_length",
    "retro_num_neighbors",
    "retro_num_retrieved_chunks",
    "retro_encoder_num_layers",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
)
_PLUMBING = (
    "retro_project_dir",
    "retro_block_size",
    "retro_neighbor_dirs",
    "retro_retrieved_length",  # of the two lengths that make it up
    "retro_split_preprocessing",
    "retro_verify_neighbor_count",
)


def _same(name: str) -> Mapped:
    return Mapped(lambda value, _: {name: value})


_FIELDS: Mapping[str, Rule] = {
    **FIELDS,
    **{name: _same(name) for name in _SAME},
    **{name: Plumbing() for name in _PLUMBING},
}
_ARGUMENTS: Mapping[str, Rule] = {**MODEL_ARGUMENTS, "post_layer_norm": _same("post_layer_norm")}


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> RetroConfig:
    """See `MegatronWeights.read_config`. The weights say whether there is a norm after the last layer."""
    if fields.get("retro_chunk_length") is None:
        raise ConfigError("retro_chunk_length is missing from the Megatron config; add it")
    arguments = with_sizes_of_tables(model_kwargs, tensors)
    arguments["post_layer_norm"] = "decoder.final_layernorm.weight" in tensors
    rules: dict[str, Any] = {"field_rules": _FIELDS, "argument_rules": _ARGUMENTS}
    config = RetroConfig(**config_arguments(fields, arguments, family="retro", **rules))
    return fitted_to_tables(config, tensors)


def write_config(config: RetroConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron's model has no such option.
    """
    for name in ("retro_encoder_rotary", "retro_cross_attention_rotary"):
        if getattr(config, name):
            raise ConfigError(f"{name}=True cannot be expressed in a Megatron config, which has False")
    fields, arguments = megatron_settings(config)
    fields |= {name: getattr(config, name) for name in _SAME}
    # Megatron takes no config without it; it says nothing about the model.
    return fields | {"retro_split_preprocessing": "969,30,1"}, arguments


def tensors(config: RetroConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors, in the order of its modules but for the encoder, which follows the decoder's layers."""
    inner = {path: leaf for path, leaf in params.items() if path[2:4] == ("cross_attention", "encoder")}
    outer = {path: leaf for path, leaf in params.items() if path not in inner}
    yield from outer_tensors(outer, [path for path in outer if path[0] == "embedding"])
    yield from layer_tensors(config, model.layer_specs, outer)
    yield from _encoder_tensors(config, model, inner)
    yield from outer_tensors(outer, [path for path in outer if path[:2] == ("decoder", "final_layernorm")])
    yield from outer_tensors(outer, [path for path in outer if path[0] == "output_layer"])


def _encoder_tensors(config: RetroConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Those of the encoder, which lives in a row of a stack of the decoder, and is stacked itself."""
    layer, encoder = config.retro_layer_numbers[0] - 1, config.encoder_config
    stack, row = locate(stack_layout(config, model.layer_specs), layer)
    segments = stack_layout(encoder, get_retro_encoder_block_spec(config, model.backend))
    for inner in range(encoder.num_layers):
        inner_stack, inner_row = locate(segments, inner)
        prefix = ("decoder", stack, "cross_attention", "encoder", inner_stack)
        parts = [
            Part(path, (row, inner_row), leaf.shape[2:])
            for path, leaf in params.items()
            if path[: len(prefix)] == prefix
        ]
        name = f"decoder.layers.{layer}.cross_attention.encoder.layers.{inner}."
        yield from tensors_of(name, parts, skip=len(prefix), query_groups=config.num_attention_heads)


MEGATRON = MegatronWeights(read_config, write_config, RETROModel, tensors)
