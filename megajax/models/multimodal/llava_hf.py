"""LLaVA in Hugging Face's format: a CLIP or SigLIP tower, a two-layer projection, and a descendant of Llama."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from megajax.config import ConfigError, to_tuple
from megajax.interop.hf_architecture import Architecture, Tensor, decoder_plan, rows_plan
from megajax.interop.hf_choice import choose
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields
from megajax.models.gpt.llama_hf import LLAMA_LIKE
from megajax.models.multimodal.llava_config import LLaVAConfig, tower_arguments
from megajax.models.multimodal.llava_model import LLaVAModel
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_fields_hf import part_of
from megajax.models.vision.clip_hf import CLIP_TOWER, SIGLIP_TOWER, below, lifted, linear_rows, tower_plan

_TOWERS: Mapping[str, tuple[str, Architecture]] = {
    "clip_vision_model": ("clip", CLIP_TOWER),
    "siglip_vision_model": ("siglip", SIGLIP_TOWER),
}
"""`model_type` of vision_config -> (`vision_model_type`, how it reads)."""
_VICUNA_TOWER = {
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""What a vision_config that is left out means."""
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
"""What published files leave out of text_config."""
_HAS_HEAD = "has_head"
_DEFAULTS: dict[str, Any] = {
    "vision_config": None,
    "text_config": None,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def _read(fields: Fields) -> dict[str, Any]:
    kind, tower = _read_tower(fields)
    text = _read_text(fields)
    layer = to_tuple(fields.take("vision_feature_layer"))
    strategy = fields.take("vision_feature_select_strategy")
    if strategy not in ("default", "full") or (strategy == "default" and tower.class_token_len == 0):
        raise ConfigError(
            f"config.json: vision_feature_select_strategy={strategy!r} is not possible for a {kind} tower"
        )
    fields.optional("image_seq_length")  # follows from the tower
    fields.optional("vocab_size")  # repeats text_config's
    index = fields.optional("image_token_id")
    text["hidden_dropout"] = 0.0
    # Published files do not agree on where it stands; a head in the file settles it.
    said, has_head = fields.flag("tie_word_embeddings"), bool(fields.optional(_HAS_HEAD))
    tied = (said or text["share_embeddings_and_output_weights"]) and not has_head
    return text | {
        **tower_arguments(tower, kind),
        "vision_feature_layer": layer,
        "drop_vision_class_token": strategy == "default",
        "image_token_index": fields.take("image_token_index") if index is None else index,
        "image_placeholders": "each",
        "projection_activation_func": fields.activation("projector_hidden_act"),
        "projection_add_bias_linear": fields.flag("multimodal_projector_bias"),
        "share_embeddings_and_output_weights": tied,
    }


def _told_by_names(names: Collection[str]) -> dict[str, Any]:
    return {_HAS_HEAD: "language_model.lm_head.weight" in names}


def _read_tower(fields: Fields) -> tuple[Any, CLIPConfig]:
    values = fields.take("vision_config")
    given: dict[str, Any] = {"model_type": "clip_vision_model"} | (_VICUNA_TOWER if values is None else dict(values))
    if given["model_type"] not in _TOWERS:
        raise ConfigError(
            f"config.json: vision_config.model_type={given['model_type']!r} is not supported; known:"
            f" {', '.join(_TOWERS)}"
        )
    kind, architecture = _TOWERS[given["model_type"]]
    defaults = {**architecture.defaults, **(_VICUNA_TOWER if kind == "clip" else {})}
    for name in ("vocab_size", "projection_dim"):  # of the pair that the tower was a part of
        given.pop(name, None)
    part = Fields(given, defaults)
    arguments = architecture.read(part)
    part.finish()
    return kind, CLIPConfig(**arguments)


def _read_text(fields: Fields) -> dict[str, Any]:
    part = part_of(fields, "text_config", {})
    kind = part.optional("model_type") or "llama"
    known = {architecture.model_type: architecture for architecture in LLAMA_LIKE}
    if kind not in known:
        raise ConfigError(f"config.json: text_config.model_type={kind!r} is not supported; known: {', '.join(known)}")
    defaults = _LLAMA_DEFAULTS | dict(known[kind].defaults)
    part.set_defaults(defaults)
    arguments = known[kind].read(part)
    part.finish()
    return arguments


def _write(config: LLaVAConfig) -> dict[str, Any]:
    language, tower = config.language_config, config.vision_config
    text = choose(language, LLAMA_LIKE)
    kind, architecture = next((k, a) for k, (name, a) in _TOWERS.items() if name == _type_in_files(config))
    layer = config.vision_feature_layer
    return {
        "vision_config": {"model_type": kind} | architecture.write(tower),
        "text_config": {"model_type": text.model_type} | text.write(language),
        "image_token_index": config.image_token_index,
        "image_seq_length": config.img_seq_len,
        "projector_hidden_act": ACTIVATION_NAMES[config.projection_activation_func],
        "multimodal_projector_bias": config.projection_add_bias_linear,
        "vision_feature_layer": -1 if layer is None else layer,
        "vision_feature_select_strategy": "default" if config.drop_vision_class_token else "full",
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def _type_in_files(config: LLaVAConfig) -> str:
    known = [name for name, _ in _TOWERS.values()]
    if config.vision_model_type not in known:
        raise ConfigError(f"vision_model_type={config.vision_model_type!r}, which is none of {', '.join(known)}")
    return config.vision_model_type


def _plan(
    architecture: Architecture, config: LLaVAConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    del architecture, prefix
    folders = {name: f"{name}/" for name in ("vision_model", "language_model")}
    tower = tower_plan(
        config.vision_config,  # type: ignore[arg-type]
        model.build_tower().layer_specs,
        below(folders["vision_model"], leaves),
        "vision_tower.",
    )
    language = decoder_plan(
        LLAMA_LIKE[0],
        config.language_config,
        model.build_language_model(),
        below(folders["language_model"], leaves),
        "language_model.model.",
    )
    head = "lm_head.weight"
    language = {f"language_model.{name}" if name == head else name: tensor for name, tensor in language.items()}
    rows = [
        *linear_rows("multi_modal_projector.linear_1", "vision_projection/encoder/linear_fc1"),
        *linear_rows("multi_modal_projector.linear_2", "vision_projection/encoder/linear_fc2"),
    ]
    plan = lifted(folders["vision_model"], tower) | lifted(folders["language_model"], language)
    return plan | rows_plan(rows, leaves, config)


def _example_inputs(config: LLaVAConfig) -> tuple[Any, ...]:
    images = jax.ShapeDtypeStruct((1, config.vision_num_channels, config.img_h, config.img_w), jnp.float32)
    return images, jax.ShapeDtypeStruct((1, 1), jnp.int32)


LLAVA_HF = Architecture(
    name="LlavaForConditionalGeneration",
    base=None,
    model_type="llava",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,  # type: ignore[arg-type]
    prefix="",
    build=LLaVAModel,
    head=None,
    config_type=LLaVAConfig,
    example_inputs=_example_inputs,
    plan=_plan,
    told_by_names=_told_by_names,
    older_names=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
    ignored=r"(vision_tower\.embeddings\.position_ids|language_model\.model\..*rotary_emb\.inv_freq)",
)
