"""T5's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop.megatron_config import config_arguments, megatron_settings
from megajax.interop.megatron_fields import MODEL_ARGUMENTS, Mapped, Plumbing, Refused, Rule
from megajax.interop.megatron_layouts import Path, Tensor, layer_tensors, outer_tensors
from megajax.interop.megatron_tables import fitted_to_tables, with_sizes_of_tables
from megajax.models.family import MegatronWeights
from megajax.models.t5.t5_config import T5Config
from megajax.models.t5.t5_model import T5Model

_SAME = ("encoder_num_layers", "relative_attention_num_buckets", "relative_attention_max_distance", "add_decoder")
_PLUMBING = ("encoder_config", "transformer_encoder_layer_spec", "transformer_decoder_layer_spec")


_SECOND_NAMES = {
    "output_layer.weight": "lm_head.output_layer.weight",
    "output_layer.bias": "lm_head.output_layer.bias",
    "position_embeddings.weight": "embedding.position_embeddings.weight",
}
"""Tensors that Megatron's module holds in two places."""


def _same(name: str) -> Mapped:
    return Mapped(lambda value, _: {name: value})


_ARGUMENTS: Mapping[str, Rule] = {
    **MODEL_ARGUMENTS,
    **{name: _same(name) for name in _SAME},
    **{name: Plumbing() for name in _PLUMBING},
    "add_encoder": Refused((True,)),
}


def read_config(fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> T5Config:
    """See `MegatronWeights.read_config`. The encoder's layers are counted where `encoder_num_layers` is not given."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    _complete(tensors)
    arguments = {"encoder_num_layers": len(layers), **with_sizes_of_tables(model_kwargs, tensors)}
    relative = "relative" in (arguments.get("position_embedding_type"), fields.get("position_embedding_type"))
    if relative:  # the common rules know positions of decoders only
        arguments = arguments | {"position_embedding_type": "none"}
        fields = {name: value for name, value in fields.items() if name != "position_embedding_type"}
    options = config_arguments(fields, arguments, family="t5", argument_rules=_ARGUMENTS)
    if relative:
        options["position_embedding_type"] = "relative"
    config = T5Config(**options)
    if config.share_embeddings_and_output_weights:
        tensors.pop("lm_head.output_layer.weight", None)
    return fitted_to_tables(config, tensors)


def _complete(tensors: dict[str, np.ndarray]) -> None:
    """Gives a tensor both of its names, one of which a file may leave out."""
    for second, first in _SECOND_NAMES.items():
        for name, other in ((second, first), (first, second)):
            if name in tensors:
                tensors.setdefault(other, tensors[name])
        if second in tensors and not np.array_equal(tensors[second], tensors[first]):
            raise ConfigError(f"{second} differs from {first}, which is the same tensor; drop one of them")


def write_config(config: T5Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron's model has no such options.
    """
    tied = config.share_embeddings_and_output_weights
    expressible = {
        "output_layer_bias": tied,
        "scale_decoder_outputs": False,
        "rope_scaling_type": "none",
        "rotary_base": 10000.0,
    }
    for name, only in expressible.items():
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} cannot be expressed in a Megatron config, which has {only!r}"
            )
    fields, arguments = megatron_settings(config)
    fixed = ("rotary_base", "rope_scaling", "rope_scaling_factor")
    arguments = {name: value for name, value in arguments.items() if name not in fixed}
    return fields, arguments | {name: getattr(config, name) for name in _SAME}


def tensors(config: T5Config, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors, in the order of its modules."""

    def outer(*prefix: str) -> Iterator[Tensor]:
        return outer_tensors(params, [path for path in params if path[: len(prefix)] == prefix])

    for tensor in outer("embedding"):
        yield tensor
        yield from (tensor._replace(name=second) for second, first in _SECOND_NAMES.items() if first == tensor.name)
    yield from outer("encoder_relative_pos_emb")
    yield from outer("decoder_relative_pos_emb")
    yield from layer_tensors(config.encoder_config, model.encoder_layer_specs, params, "encoder")
    yield from outer("encoder", "final_layernorm")
    if config.add_decoder:
        yield from layer_tensors(config, model.layer_specs, params)
        yield from outer("decoder", "final_layernorm")
    for tensor in outer("output_layer"):
        yield tensor._replace(name=f"lm_head.{tensor.name}")
        yield tensor


MEGATRON = MegatronWeights(read_config, write_config, T5Model, tensors)
