"""BERT's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.interop.megatron_config import config_arguments, megatron_settings
from megajax.interop.megatron_fields import MODEL_ARGUMENTS, Mapped, Refused, Rule
from megajax.interop.megatron_layouts import Path, Tensor, layer_tensors, outer_tensors
from megajax.interop.megatron_tables import fitted_to_tables, with_sizes_of_tables
from megajax.models.bert.bert_config import BertConfig
from megajax.models.bert.bert_model import BertModel
from megajax.models.family import MegatronWeights

_ARGUMENTS: Mapping[str, Rule] = MODEL_ARGUMENTS | {  # pyright: ignore
    "num_tokentypes": Mapped(lambda value, _: {"num_tokentypes": value}),
    "add_binary_head": Mapped(lambda value, _: {"add_binary_head": value}),
    "apply_lm_head": Mapped(lambda value, _: {"transform_lm_head": value}),
    "output_layer_bias": Mapped(lambda value, _: {"output_layer_bias": value}),
    "return_embeddings": Refused((False,)),
}


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> BertConfig:
    """See `MegatronWeights.read_config`."""
    types = tensors.get("embedding.tokentype_embeddings.weight")
    defaults = {
        "num_tokentypes": 0 if types is None else len(types),
        "add_binary_head": "binary_head.weight" in tensors,
    }
    arguments = with_sizes_of_tables(defaults | dict(model_kwargs), tensors)
    config = BertConfig(**config_arguments(fields, arguments, family="bert", argument_rules=_ARGUMENTS))
    return fitted_to_tables(config, tensors)


def write_config(config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron's model has no such options.
    """
    expressible = {
        "add_lm_head": True,
        "lm_head_activation": "gelu",
        "add_pooler": config.add_binary_head,
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
    return fields, {name: value for name, value in arguments.items() if name not in fixed} | {
        "num_tokentypes": config.num_tokentypes,
        "add_binary_head": config.add_binary_head,
        "apply_lm_head": config.transform_lm_head,
        "output_layer_bias": config.output_layer_bias,
    }


def tensors(config: BertConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors, in the order of its modules."""
    for module in ("embedding", "encoder", "lm_head", "output_layer", "binary_head", "pooler"):
        if module == "encoder":
            yield from layer_tensors(config, model.layer_specs, params, "encoder")
            yield from outer_tensors(params, [path for path in params if path[:2] == ("encoder", "final_layernorm")])
        else:
            yield from outer_tensors(params, [path for path in params if path[0] == module])


MEGATRON = MegatronWeights(read_config, write_config, BertModel, tensors)
