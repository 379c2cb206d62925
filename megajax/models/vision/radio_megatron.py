"""RADIO's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megajax.interop.megatron_fields import Rule
from megajax.interop.megatron_layouts import Path, Tensor, layer_tensors, outer_tensors
from megajax.models.family import MegatronWeights
from megajax.models.vision.clip_megatron import VISION_ARGUMENTS, nothing, same, vision_arguments, vision_fields, whole
from megajax.models.vision.radio import RADIOModel
from megajax.models.vision.radio_config import RADIOConfig

_SAME = ("max_img_h", "max_img_w", "has_cpe", "pos_dropout", "use_mask_token", "embedder_bias")
_RULES: Mapping[str, Rule] = {
    **{name: rule for name, rule in VISION_ARGUMENTS.items() if name != "model_subtype"},
    **{name: same(name) for name in _SAME},
    "interpolate_align_corners": nothing(),
}


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> RADIOConfig:
    """See `MegatronWeights.read_config`. Norms before and after the layers are there if their tensors are."""
    arguments = vision_arguments(fields, model_kwargs, _RULES, "radio")
    length = model_kwargs.get("class_token_len", 8) if model_kwargs.get("add_class_token", True) else 0
    options = {
        "class_token_len": length,
        "ln_pre": "ln_pre.weight" in tensors,
        "ln_post": "tokens" if "ln_post.weight" in tensors else "none",
        "interpolate_align_corners": model_kwargs.get("interpolate_align_corners", True),
        "summary_idxs": (0,) if length else (),
    }
    return RADIOConfig(**(arguments | options))


def write_config(config: RADIOConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`."""
    names = ("img_h", "img_w", "patch_dim", "class_token_len", *_SAME)
    arguments = {name: getattr(config, name) for name in names}
    if not config.interpolate_align_corners:
        arguments["interpolate_align_corners"] = False
    return vision_fields(config), arguments | {"add_class_token": config.class_token_len > 0}


def tower_tensors(config: RADIOConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors."""
    shape = (1, math.prod(config.position_grid), config.hidden_size)
    for name in ("class_token", "mask_token"):
        if (name,) in params:
            yield whole(name, (name,), params, params[(name,)].shape)
    yield whole("position_embeddings", ("position_embeddings",), params, shape)
    outer = ("ln_pre", "ln_post", "embedder", "classifier")
    yield from outer_tensors(params, [path for path in params if path[0] in outer])
    yield from layer_tensors(config, model.layer_specs, params)


MEGATRON = MegatronWeights(read_config, write_config, RADIOModel, tower_tensors)
