"""ViT in Hugging Face's format: the tower, and a classifier of images."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megajax.config import ConfigError
from megajax.interop.hf_architecture import Row, Tensor, layer_plan, rows_plan
from megajax.interop.hf_fields import Fields, positive_integer
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_fields_hf import CLIP_TOWER_DEFAULTS, read_tower, write_tower
from megajax.models.vision.clip_hf import (
    Shapes,
    below,
    layer_rows,
    lifted,
    linear_rows,
    norm_rows,
    patch_kernel,
    reshaped,
    vision_architecture,
)
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
from megajax.models.vision.image_classifier import ImageClassifier

_LAYER = layer_rows(
    "encoder.layer.{i}.",
    {
        "input_layernorm": "layernorm_before",
        "self_attention/linear_q": "attention.attention.query",
        "self_attention/linear_k": "attention.attention.key",
        "self_attention/linear_v": "attention.attention.value",
        "self_attention/linear_proj": "attention.output.dense",
        "pre_mlp_layernorm": "layernorm_after",
        "mlp/linear_fc1": "intermediate.dense",
        "mlp/linear_fc2": "output.dense",
    },
)
_ROWS = (
    Row("embeddings.patch_embeddings.projection.bias", ("conv1/bias",)),
    *norm_rows("layernorm", "ln_post"),
    *linear_rows("pooler.dense", "dense_pooler"),
)


def _plan(architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str) -> dict[str, Tensor]:
    del architecture
    D = config.hidden_size
    return {
        f"{prefix}embeddings.cls_token": reshaped("class_token", leaves, (1, 1, D)),
        f"{prefix}embeddings.position_embeddings": reshaped(
            "position_embeddings", leaves, (1, config.num_image_tokens, D)
        ),
        f"{prefix}embeddings.patch_embeddings.projection.weight": patch_kernel("conv1/kernel", leaves, config),
        **rows_plan(_ROWS, leaves, config, prefix),
        **layer_plan(_LAYER, leaves, config, model.layer_specs, prefix),
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.optional("encoder_stride")  # of a decoder that is not in this model
    arguments = read_tower(fields)
    for name, only in (("pooler_act", "tanh"), ("pooler_output_size", arguments["hidden_size"])):
        value = fields.take(name)
        if value not in (None, only):
            raise ConfigError(f"config.json: {name}={value!r} is not supported; it must be {only!r}")
    biases = {} if fields.flag("qkv_bias") else {"add_bias_linear": False, "add_attention_proj_bias": True}
    return arguments | {
        "embedder_bias": True,
        "ln_post": "tokens",
        "pooler": "dense" if fields.flag("add_pooling_layer") else "none",
        "hidden_dropout": fields.number("hidden_dropout_prob"),
        "attention_dropout": fields.number("attention_probs_dropout_prob"),
        "init_method_std": fields.number("initializer_range"),
        **({} if not biases else biases | {"add_mlp_bias": True}),
    }


def _write(config: CLIPConfig) -> dict[str, Any]:
    return write_tower(config) | {
        "qkv_bias": config.add_bias_linear,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_method_std,
        # transformers takes it as an argument, not from here.
        "add_pooling_layer": config.pooler == "dense",
    }


def _classifier_plan(
    architecture: Any, config: CLIPConfig, model: Any, leaves: Shapes, prefix: str
) -> dict[str, Tensor]:
    tower = CLIPVisionTransformer(config, backend=model.backend)
    plan = _plan(architecture, config, tower, below("vision_model/", leaves), f"{prefix}vit.")
    head = linear_rows("classifier", "classifier")
    return lifted("vision_model/", plan) | rows_plan(head, leaves, config, prefix)


def _read_classifier(fields: Fields) -> dict[str, Any]:
    labels, count = fields.optional("id2label"), fields.optional("num_labels")
    count = len(labels) if labels else 2 if count is None else positive_integer("num_labels", count)
    return _read(fields) | {"pooler": "class_token", "num_classes": count}


def _write_classifier(config: CLIPConfig) -> dict[str, Any]:
    if config.num_classes is None:
        raise ConfigError("num_classes=None: it needs a classifier")
    values = _write(config)
    del values["add_pooling_layer"]
    names = [f"LABEL_{number}" for number in range(config.num_classes)]
    labels = {"id2label": {str(number): name for number, name in enumerate(names)}}
    return values | labels | {"label2id": {name: number for number, name in enumerate(names)}}


def _told_by_names(names: Collection[str]) -> dict[str, Any]:
    return {"add_pooling_layer": any(name.startswith("pooler.") for name in names)}


_DEFAULTS: dict[str, Any] = CLIP_TOWER_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "qkv_bias": True,
    "pooler_act": "tanh",
    "pooler_output_size": None,
    "add_pooling_layer": True,
}
VIT = vision_architecture(
    "ViTModel", "vit", defaults=_DEFAULTS, read=_read, write=_write, build=CLIPVisionTransformer, plan=_plan,
    older_names=((r"^vit\.", ""),), told_by_names=_told_by_names,
)  # fmt: skip
VIT_CLASSIFIER = vision_architecture(
    "ViTForImageClassification", "vit", defaults=_DEFAULTS, read=_read_classifier, write=_write_classifier,
    build=ImageClassifier, plan=_classifier_plan,
)  # fmt: skip
