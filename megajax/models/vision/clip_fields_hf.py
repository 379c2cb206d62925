"""config.json of CLIP's and SigLIP's towers and pairs of towers, read and written."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megajax.config import ConfigError
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields
from megajax.models.vision.clip_config import CLIPConfig


def _sides(value: Any, name: str) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, list) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"config.json: {name}={value!r} must be one or two whole numbers above 0")
    return sides


def read_tower(fields: Fields) -> dict[str, Any]:
    """What all towers' configs have in common."""
    height, width = _sides(fields.take("image_size"), "image_size")
    patch, other = _sides(fields.take("patch_size"), "patch_size")
    if patch != other:
        raise ConfigError(f"config.json: patch_size={[patch, other]} is not supported; patches must be squares")
    return {
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": fields.size("hidden_size"),
        "num_attention_heads": fields.size("num_attention_heads"),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "num_channels": fields.size("num_channels"),
        "img_h": height,
        "img_w": width,
        "patch_dim": patch,
        "crop_to_patches": height % patch > 0 or width % patch > 0,
        "activation_func": fields.activation("hidden_act"),
        "layernorm_epsilon": fields.number("layer_norm_eps"),
        "hidden_dropout": 0.0,
    }


def write_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_tower`."""
    size = config.img_h if config.img_h == config.img_w else [config.img_h, config.img_w]
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "num_channels": config.num_channels,
        "image_size": size,
        "patch_size": config.patch_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation_func],
        "layer_norm_eps": config.layernorm_epsilon,
    }


def read_clip_tower(fields: Fields) -> dict[str, Any]:
    """config.json of a CLIPVisionModel -> arguments of CLIPConfig."""
    fields.optional("projection_dim")  # of the pair that the tower was a part of
    fields.number("initializer_factor")
    return read_tower(fields) | {
        "ln_pre": True,
        "ln_post": "pooled",
        "pooler": "class_token",
        "attention_dropout": fields.number("attention_dropout"),
        "init_method_std": fields.number("initializer_range"),
    }


def write_clip_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_clip_tower`."""
    return write_tower(config) | {
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "initializer_factor": 1.0,
    }


def read_projected_tower(fields: Fields) -> dict[str, Any]:
    """config.json of a CLIPVisionModelWithProjection -> arguments of CLIPConfig."""
    size = fields.size("projection_dim")
    return read_clip_tower(fields) | {"projection_dim": size}


def write_projected_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_projected_tower`."""
    return write_clip_tower(config) | {"projection_dim": config.projection_dim}


def read_siglip_tower(fields: Fields) -> dict[str, Any]:
    """config.json of a SiglipVisionModel -> arguments of CLIPConfig."""
    return read_tower(fields) | {
        "class_token_len": 0,
        "embedder_bias": True,
        "ln_post": "tokens",
        "pooler": "attention" if fields.flag("vision_use_head") else "none",
        "attention_dropout": fields.number("attention_dropout"),
    }


def write_siglip_tower(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_siglip_tower`."""
    head = {"vision_use_head": config.pooler == "attention", "attention_dropout": config.attention_dropout}
    return write_tower(config) | head


CLIP_TOWER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
}
SIGLIP_TOWER_DEFAULTS: dict[str, Any] = CLIP_TOWER_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
    "eos_token_id": 49407,
}
_SIGLIP_TEXT_DEFAULTS: dict[str, Any] = TEXT_DEFAULTS | {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}


def part_of(fields: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """The config of one part, an object inside config.json."""
    values = fields.take(name)
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"config.json: {name} must be an object, not {values!r}")
    return Fields(values or {}, defaults)


def read_text(fields: Fields) -> dict[str, Any]:
    """config.json of a text tower -> arguments of CLIPConfig."""
    for name in ("attention_dropout", "initializer_range", "initializer_factor"):
        fields.number(name)  # of training; the image tower's count for both
    fields.optional("projection_dim")
    return {
        "text_num_layers": fields.size("num_hidden_layers"),
        "text_hidden_size": fields.size("hidden_size"),
        "text_num_attention_heads": fields.size("num_attention_heads"),
        "text_ffn_hidden_size": fields.size("intermediate_size"),
        "text_activation_func": fields.activation("hidden_act"),
        "text_layernorm_epsilon": fields.number("layer_norm_eps"),
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": fields.size("max_position_embeddings"),
        "share_embeddings_and_output_weights": True,
    }


def write_text(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_text`."""
    if config.text_num_layers is None:
        raise ConfigError("text_num_layers=None: it needs a text tower")
    text = config.text_config
    return {
        "num_hidden_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.ffn_hidden_size,
        "hidden_act": ACTIVATION_NAMES[text.activation_func],
        "layer_norm_eps": text.layernorm_epsilon,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_sequence_length,
        "attention_dropout": text.attention_dropout,
    }


def read_pooling(fields: Fields) -> dict[str, Any]:
    """Which token stands for a text."""
    eos = fields.take("eos_token_id")
    # Files that say 2 are older than the rule; their texts end with the highest id.
    return {"text_pooling": "highest"} if eos == 2 else {"text_pooling": "eos", "eos_token_id": eos}


def written_eos(config: CLIPConfig) -> int | None:
    """Inverse of `read_pooling`."""
    return 2 if config.text_pooling == "highest" else config.eos_token_id


def read_clip(fields: Fields) -> dict[str, Any]:
    """config.json of a CLIPModel -> arguments of CLIPConfig."""
    vision, text = (
        part_of(fields, name, defaults)
        for name, defaults in (("vision_config", CLIP_TOWER_DEFAULTS), ("text_config", TEXT_DEFAULTS))
    )
    for name in ("vision_config_dict", "text_config_dict"):
        fields.optional(name)  # repeats the objects above
    fields.number("initializer_factor")
    arguments = read_clip_tower(vision) | read_text(text)
    pooling = read_pooling(text)
    vision.finish()
    text.finish()
    scale = fields.number("logit_scale_init_value")
    return arguments | pooling | {"projection_dim": fields.size("projection_dim"), "logit_scale_init": scale}


def write_clip(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_clip`."""
    eos = written_eos(config)
    projection = {"projection_dim": config.projection_dim}
    return {
        "vision_config": {"model_type": "clip_vision_model"} | write_clip_tower(config) | projection,
        "text_config": {"model_type": "clip_text_model"} | write_text(config) | projection | {"eos_token_id": eos},
        "logit_scale_init_value": config.logit_scale_init,
        **projection,
    }


def read_siglip(fields: Fields) -> dict[str, Any]:
    """config.json of a SiglipModel -> arguments of CLIPConfig."""
    vision = part_of(fields, "vision_config", SIGLIP_TOWER_DEFAULTS)
    text = part_of(fields, "text_config", _SIGLIP_TEXT_DEFAULTS)
    fields.number("initializer_factor")
    arguments = read_siglip_tower(vision) | read_text(text)
    size = text.take("projection_size")
    if size not in (None, arguments["hidden_size"]):
        raise ConfigError(
            f"config.json: projection_size={size} must be the vision tower's hidden_size={arguments['hidden_size']}"
        )
    text.optional("eos_token_id")
    vision.finish()
    text.finish()
    return arguments | {"text_causal": False, "text_pooling": "last", "contrastive_loss": "sigmoid"}


def write_siglip(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `read_siglip`."""
    text = write_text(config) | {"projection_size": config.hidden_size}
    return {
        "vision_config": {"model_type": "siglip_vision_model"} | write_siglip_tower(config),
        "text_config": {"model_type": "siglip_text_model"} | text,
    }
