"""RADIO in Hugging Face's format."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError
from megajax.interop.codec import Codec
from megajax.interop.hf_architecture import Architecture, Row, Tensor, layer_plan, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields
from megajax.models.vision.clip_hf import layer_rows, reshaped
from megajax.models.vision.radio import RADIOModel
from megajax.models.vision.radio_config import RADIOConfig

_BLOCK = "radio_model.model.blocks.{i}."
_GATED_LAYER = {
    "mlp/linear_gate": "mlp.gate_proj",
    "mlp/linear_fc1": "mlp.up_proj",
    "mlp/linear_fc2": "mlp.down_proj",
}
_PLAIN_LAYER = {"mlp/linear_fc1": "mlp.fc1", "mlp/linear_fc2": "mlp.fc2"}
_QKV = tuple(f"self_attention/linear_{name}" for name in "qkv")
_LAYER = (
    *layer_rows(
        _BLOCK,
        {
            "input_layernorm": "norm1",
            "self_attention/linear_proj": "attn.proj",
            "pre_mlp_layernorm": "norm2",
        },
    ),
    Row(f"{_BLOCK}attn.qkv.weight", tuple(f"{part}/kernel" for part in _QKV), transposed=True),
    Row(f"{_BLOCK}attn.qkv.bias", tuple(f"{part}/bias" for part in _QKV)),
    Row(f"{_BLOCK}layer_scale1.lambda1", ("self_attn_bda/scale",)),
    Row(f"{_BLOCK}layer_scale2.lambda1", ("mlp_bda/scale",)),
)
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "num_channels": 3,
    "patch_size": 16,
    "image_size": 224,
    "max_img_size": 2048,
    "num_cls_tokens": 3,
    "num_registers": 7,
    "summary_idxs": [0, 1],
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "norm_std": [0.26862954, 0.26130258, 0.27577711],
    "initializer_range": 0.02,
}


def _ffn_size(hidden: int, ratio: float, gated: bool) -> int:
    size = int(hidden * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def _read(fields: Fields) -> dict[str, Any]:
    for name in ("video_temporal_patch_size", "video_patch_dim", "drop_path_rate"):
        value = fields.optional(name)
        if value:
            raise ConfigError(f"config.json: {name}={value!r} is not supported by megajax")
    fields.optional("patch_dim")  # follows from patch_size
    fields.number("hidden_dropout_prob")  # no layer of the original reads it
    hidden, gated = fields.size("hidden_size"), fields.flag("use_swiglu_ffn")
    side, longest = fields.size("image_size"), fields.size("max_img_size")
    activation = fields.activation("hidden_act")
    arguments = {} if fields.flag("qkv_bias") else {"add_bias_linear": False, "add_attention_proj_bias": True}
    if arguments:
        arguments["add_mlp_bias"] = True
    return arguments | {
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": fields.size("num_attention_heads"),
        "ffn_hidden_size": _ffn_size(hidden, fields.number("mlp_ratio"), gated),
        "gated_linear_unit": gated,
        "activation_func": "silu" if gated else activation,
        "layernorm_epsilon": fields.number("layer_norm_eps"),
        "attention_dropout": fields.number("attention_probs_dropout_prob"),
        "hidden_dropout": 0.0,
        "init_method_std": fields.number("initializer_range"),
        "layer_scale_init": fields.number("layerscale_value"),
        "num_channels": fields.size("num_channels"),
        "patch_dim": fields.size("patch_size"),
        "img_h": side,
        "img_w": side,
        "max_img_h": longest,
        "max_img_w": longest,
        "class_token_len": fields.size("num_cls_tokens") + int(fields.number("num_registers")),
        "summary_idxs": tuple(fields.take("summary_idxs")),
        "image_mean": tuple(fields.take("norm_mean")),
        "image_std": tuple(fields.take("norm_std")),
        "interpolate_align_corners": False,
    }


def _write(config: RADIOConfig) -> dict[str, Any]:
    gated, hidden, ffn = config.gated_linear_unit, config.hidden_size, config.ffn_hidden_size or 0
    ratio = (ffn - 4) * 1.5 / hidden if gated else ffn / hidden
    summary = list(config.summary_idxs)
    tokens = min(max(summary, default=0) + 1, config.class_token_len)  # the others are registers
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": hidden,
        "num_attention_heads": config.num_attention_heads,
        "mlp_ratio": next((float(r) for r in (ratio, math.ceil(ratio)) if _ffn_size(hidden, r, gated) == ffn), ratio),
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else ACTIVATION_NAMES[config.activation_func],
        "layer_norm_eps": config.layernorm_epsilon,
        "attention_probs_dropout_prob": config.attention_dropout,
        "qkv_bias": config.add_bias_linear,
        "layerscale_value": config.layer_scale_init,
        "num_channels": config.num_channels,
        "patch_size": config.patch_dim,
        "image_size": config.img_h,
        "max_img_size": config.max_img_h,
        "num_cls_tokens": tokens,
        "num_registers": config.class_token_len - tokens,
        "summary_idxs": summary,
        "norm_mean": list(config.image_mean or ()),
        "norm_std": list(config.image_std or ()),
        "initializer_range": config.init_method_std,
    }


def _plan(
    architecture: Architecture, config: RADIOConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    del architecture, prefix
    D, positions = config.hidden_size, math.prod(config.position_grid)
    generator = "radio_model.model.patch_generator."
    rows = (
        Row(f"{generator}embedder.weight", ("embedder/kernel",), transposed=True),
        Row(f"{generator}cls_token.token", ("class_token",)),
    )
    mlp = layer_rows(_BLOCK, _GATED_LAYER if config.gated_linear_unit else _PLAIN_LAYER)
    plan = rows_plan(rows, leaves, config)
    plan[f"{generator}pos_embed"] = reshaped("position_embeddings", leaves, (1, positions, D))
    plan |= layer_plan((*_LAYER, *mlp), leaves, config, model.layer_specs)
    buffers = {"input_conditioner.norm_mean": config.image_mean, "input_conditioner.norm_std": config.image_std}
    plan |= {
        f"radio_model.{name}": _constant(np.array(values, np.float32)[:, None, None], name)
        for name, values in buffers.items()
    }
    plan["radio_model.summary_idxs"] = _constant(np.array(config.summary_idxs, np.int64), "summary_idxs")
    return plan


def _constant(value: np.ndarray, name: str) -> Tensor:
    """A tensor of the file that says what config.json says, too."""

    def check(array: np.ndarray) -> tuple[()]:
        if not np.allclose(array.astype(np.float32), value, atol=1e-2):
            raise ConfigError(f"{name} in the checkpoint differs from its config.json; make them equal")
        return ()

    return Tensor((), False, None, value.dtype, Codec(value.shape, lambda arrays: value, check))


def _example_inputs(config: RADIOConfig) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((1, config.num_channels, config.img_h, config.img_w), jnp.float32),)


RADIO_HF = Architecture(
    name="RadioModel",
    base=None,
    model_type="radio",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,  # type: ignore[arg-type]
    prefix="",
    build=RADIOModel,
    head=None,
    config_type=RADIOConfig,
    example_inputs=_example_inputs,
    plan=_plan,
)
