"""CLIP's text tower alone, projected or not, in Hugging Face's format."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from megajax.config import ConfigError
from megajax.interop.hf_architecture import Tensor, rows_plan
from megajax.interop.hf_fields import Fields
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_fields_hf import TEXT_DEFAULTS, read_pooling, read_text, write_text, written_eos
from megajax.models.vision.clip_hf import Shapes, below, lifted, linear_rows, text_plan, vision_architecture
from megajax.models.vision.clip_model import CLIPTextModelWithProjection, CLIPTextTransformer, text_layer_specs


def _read(fields: Fields) -> dict[str, Any]:
    training = {"attention_dropout": fields.number("attention_dropout"), "hidden_dropout": 0.0}
    training["init_method_std"] = fields.number("initializer_range")
    text = read_text(fields)
    sizes = {name: text[f"text_{name}"] for name in ("num_layers", "hidden_size", "num_attention_heads")}
    return {"text_only": True, **training, **sizes, **text, **read_pooling(fields)}


def _write(config: CLIPConfig) -> dict[str, Any]:
    if not config.text_only:
        raise ConfigError("text_only=False: it has no image tower")
    own = {"initializer_range": config.init_method_std, "eos_token_id": written_eos(config)}
    return write_text(config) | own


def _read_projected(fields: Fields) -> dict[str, Any]:
    size = fields.size("projection_dim")
    return _read(fields) | {"projection_dim": size}


def _write_projected(config: CLIPConfig) -> dict[str, Any]:
    return _write(config) | {"projection_dim": config.projection_dim}


def _plan(architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str) -> dict[str, Tensor]:
    del architecture
    return text_plan(config, text_layer_specs(config, model.backend), leaves, prefix)


def _projected_plan(
    architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str
) -> dict[str, Tensor]:
    tower = _plan(architecture, config, model, below("text_model/", leaves), f"{prefix}text_model.")
    projection = rows_plan(linear_rows("text_projection", "text_projection"), leaves, config)
    return lifted("text_model/", tower) | projection


TEXT_TOWERS = (
    vision_architecture(
        "CLIPTextModel", "clip_text_model", defaults=TEXT_DEFAULTS, read=_read, write=_write,
        build=CLIPTextTransformer, plan=_plan, older_names=((r"^text_model\.", ""),),
        ignored=r"(text_model\.)?embeddings\.position_ids",
    ),
    vision_architecture(
        "CLIPTextModelWithProjection", "clip_text_model", defaults=TEXT_DEFAULTS | {"projection_dim": 512},
        read=_read_projected, write=_write_projected, build=CLIPTextModelWithProjection, plan=_projected_plan,
        ignored=r"text_model\.embeddings\.position_ids",
    ),
)  # fmt: skip
