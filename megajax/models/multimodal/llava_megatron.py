"""LLaVA's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.megatron_config import megatron_settings
from megajax.interop.megatron_layouts import Path, Tensor, outer_tensors
from megajax.models.family import MegatronWeights
from megajax.models.gpt import gpt_megatron
from megajax.models.mamba import mamba_megatron
from megajax.models.multimodal.llava_config import LanguageModelType, LLaVAConfig, language_arguments, tower_arguments
from megajax.models.multimodal.llava_model import LLaVAModel
from megajax.models.vision import clip_megatron, radio_megatron
from megajax.models.vision.clip_megatron import lifted, nested, vision_arguments
from megajax.models.vision.image_tokens import CLASS_TOKENS
from megajax.models.vision.radio_config import RADIOConfig

_OWN = ("drop_vision_class_token", "pixel_shuffle", "image_token_index", "vision_projection_type")
_LANGUAGE = {
    "language_vocab_size": "vocab_size",
    "language_max_sequence_length": "max_sequence_length",
    "language_position_embedding_type": "position_embedding_type",
    "language_rotary_percent": "rotary_percent",
    "language_rotary_base": "rotary_base",
    "language_rope_scaling": "rope_scaling",
    "language_rope_scaling_factor": "rope_scaling_factor",
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
    "fp16_lm_cross_entropy": "fp16_lm_cross_entropy",
    "parallel_output": "parallel_output",
    "pre_process": "pre_process",
    "post_process": "post_process",
    "pg_collection": "pg_collection",
    "vp_stage": "vp_stage",
}
"""Arguments of Megatron's LLaVAModel -> those of its language model."""
_PLUMBING = (
    *("language_transformer_layer_spec", "vision_transformer_layer_spec", "vision_projection_layer_spec"),
    *("add_encoder", "add_decoder", "allow_missing_vision_projection_checkpoint"),
    *("max_num_tiles", "tokenizer_type", "use_vision_backbone_fp8_arch"),
)
LANGUAGE_WEIGHTS: Mapping[LanguageModelType, MegatronWeights] = {
    "gpt": gpt_megatron.MEGATRON,
    "mamba": mamba_megatron.MEGATRON,
}
_HYBRID_TYPES = ("nemotron5-hybrid", "nemotron6")
"""What the `language_model_type` of Megatron's hybrids begins with."""
_CONFIGS = {
    "vision_config": ("vision_config", "vision_transformer_config"),
    "projection_config": ("projection_config", "vision_projection_config"),
}
_NOT_THERE = {"vision_feature_layer": None, "image_placeholders": "one", "seq_len_interpolation_factor": None}
_FC1 = "vision_projection.encoder.linear_fc1."


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> LLaVAConfig:
    """See `MegatronWeights.read_config`. The constructor's other two configs are `vision_config` (or
    `vision_transformer_config`) and `projection_config` among its arguments, dicts of fields."""
    given = dict(model_kwargs)
    vision_fields, projection_fields = (_config_in(given, name, keys) for name, keys in _CONFIGS.items())
    language = _language(fields, given, tensors)
    _restore_norm(tensors)
    vision_type = vision_fields.pop("vision_model_type", None) or "clip"
    if vision_type not in CLASS_TOKENS:
        raise ConfigError(f"vision_model_type={vision_type!r} is not supported; use one of {', '.join(CLASS_TOKENS)}")
    tags = given.pop("tile_tags", None)
    own = {name: given.pop(name) for name in _OWN if name in given}
    sizes = {name: given.pop(name) for name in ("img_h", "img_w", "patch_dim") if name in given}
    tower = _tower(vision_type, vision_fields, sizes, tensors)
    if given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"{name}={value!r} is not a Megatron model argument that megajax knows; remove it")
    return LLaVAConfig(
        **language_arguments(language),
        **tower_arguments(tower, vision_type),
        **_projection(projection_fields, tensors),
        **own,
        tile_tags=None if tags is None else tuple(tuple(tag) for tag in tags),
    )


def _config_in(given: dict[str, Any], name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    found = [given.pop(key) for key in keys if key in given]
    if len(found) != 1 or not isinstance(found[0], Mapping):
        raise ConfigError(f"model_kwargs needs {name}, a dict of Megatron config fields; add it")
    return dict(found[0])


def _language(fields: Mapping[str, Any], given: dict[str, Any], tensors: dict[str, np.ndarray]) -> TransformerConfig:
    for name in _PLUMBING:
        given.pop(name, None)
    fields = dict(fields)
    kind = str(fields.pop("language_model_type", None) or "")
    if kind.startswith("hf://"):
        raise ConfigError(f"language_model_type={kind!r} is not supported for family 'llava'; use a GPT or a hybrid")
    fields.pop("vision_model_type", None)
    arguments = {_LANGUAGE[name]: given.pop(name) for name in list(given) if name in _LANGUAGE}
    is_hybrid = kind.startswith(_HYBRID_TYPES)
    weights = LANGUAGE_WEIGHTS["mamba" if is_hybrid else "gpt"]
    names = mamba_megatron.OWN_ARGUMENTS if is_hybrid else mamba_megatron.PATTERN_ARGUMENTS
    of_hybrids = {name: given.pop(name) for name in list(given) if name in names}
    if is_hybrid:
        arguments |= of_hybrids
    elif of_hybrids.get("hybrid_override_pattern"):
        raise ConfigError(
            f"hybrid_override_pattern has no effect with language_model_type={kind!r}; Megatron's hybrids are called"
            f" {_HYBRID_TYPES[0]}..."
        )
    prefix = "language_model."
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    names = set(own)
    config = weights.read_config(fields, arguments, own)
    for name in names - set(own):  # a copy of tied weights
        del tensors[prefix + name]
    return config


def _tower(
    vision_type: str, fields: dict[str, Any], sizes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Any:
    fields.pop("language_model_type", None)
    own = {n.removeprefix("vision_model."): a for n, a in tensors.items() if n.startswith("vision_model.")}
    arguments: dict[str, Any] = dict(sizes)
    if "radio" not in vision_type:
        arguments |= {"model_subtype": vision_type, "class_token_len": CLASS_TOKENS[vision_type]}
        arguments |= {"add_class_token": CLASS_TOKENS[vision_type] > 0}
        return clip_megatron.read_config(fields, arguments, own)
    length = len(own["class_token"]) if "class_token" in own else 0
    longest = 1792 if vision_type == "radio-g" else 2048
    arguments |= {"class_token_len": length, "add_class_token": length > 0, "max_img_h": longest, "max_img_w": longest}
    arguments |= {"embedder_bias": "embedder.bias" in own, "use_mask_token": "mask_token" in own}
    return radio_megatron.read_config(fields, arguments, own)


def _projection(fields: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name in ("vision_model_type", "language_model_type"):
        fields.pop(name, None)
    arguments = vision_arguments(fields, {}, {}, "llava")
    has_norm = "vision_projection.layernorm.weight" in tensors
    return {
        "projection_ffn_hidden_size": arguments.get("ffn_hidden_size"),
        "projection_activation_func": arguments.get("activation_func", "gelu"),
        "projection_gated_linear_unit": arguments.get("gated_linear_unit", False),
        "projection_add_bias_linear": arguments.get("add_bias_linear", True),
        "projection_normalization": arguments.get("normalization", "LayerNorm") if has_norm else "none",
    }


def _restore_norm(tensors: dict[str, np.ndarray]) -> None:
    """Transformer Engine keeps the norm in front of the projection inside of its first linear map."""
    for leaf in ("weight", "bias"):
        for name in (f"{_FC1}layer_norm_{leaf}", f"vision_projection.encoder.layer_norm_{leaf}"):
            if name in tensors:
                tensors[f"vision_projection.layernorm.{leaf}"] = tensors.pop(name)


def write_config(config: LLaVAConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `read_config`.

    Raises:
      ConfigError: Megatron has no setting for an option.
    """
    for name, only in _NOT_THERE.items():
        if getattr(config, name) != only:
            raise ConfigError(f"{name}={getattr(config, name)!r} cannot be expressed in a Megatron config")
    fields, language = LANGUAGE_WEIGHTS[config.language_model_type].write_config(config.language_config)
    tower = config.vision_config
    write_tower = radio_megatron.write_config if isinstance(tower, RADIOConfig) else clip_megatron.write_config
    vision_fields, vision = write_tower(tower)  # type: ignore[arg-type]
    projection, _ = megatron_settings(config.projection_config.replace(vocab_size=1))
    names = {inner: outer for outer, inner in _LANGUAGE.items()}
    arguments = {names[name]: value for name, value in language.items() if name in names}
    if config.language_model_type == "mamba":
        fields["language_model_type"] = _HYBRID_TYPES[0]
        arguments |= {name: value for name, value in language.items() if name in mamba_megatron.OWN_ARGUMENTS}
    arguments |= {name: vision[name] for name in ("img_h", "img_w", "patch_dim")}
    arguments |= {name: getattr(config, name) for name in _OWN}
    arguments |= {
        "vision_config": vision_fields | {"vision_model_type": config.vision_model_type},
        "projection_config": projection,
        "tile_tags": None if config.tile_tags is None else [list(tag) for tag in config.tile_tags],
    }
    return fields, arguments


def tensors(config: LLaVAConfig, model: Any, params: Mapping[Path, Any]) -> Iterator[Tensor]:
    """Megatron's tensors."""
    tower = config.vision_config
    of_tower = radio_megatron.tower_tensors if isinstance(tower, RADIOConfig) else clip_megatron.tower_tensors
    yield from lifted("vision_model", of_tower(tower, model.build_tower(), nested("vision_model", params)))  # type: ignore[arg-type]
    yield from _projection_tensors(nested("vision_projection", params))
    of_language = LANGUAGE_WEIGHTS[config.language_model_type].tensors
    language = of_language(config.language_config, model.build_language_model(), nested("language_model", params))
    yield from lifted("language_model", language)


def _projection_tensors(params: Mapping[Path, Any]) -> Iterator[Tensor]:
    yield from lifted("vision_projection", outer_tensors(params, [path for path in params if path[0] == "layernorm"]))
    # The MLP of a layer, which tells how gate and up projection share a tensor, by another name.
    mlp = {("mlp", *path[1:]): leaf for path, leaf in params.items() if path[0] == "encoder"}
    for tensor in outer_tensors(mlp, list(mlp)):
        parts = tuple(part._replace(path=("vision_projection", "encoder", *part.path[1:])) for part in tensor.parts)
        yield tensor._replace(name=tensor.name.replace("mlp", "vision_projection.encoder", 1), parts=parts)


MEGATRON = MegatronWeights(read_config, write_config, LLaVAModel, tensors)
