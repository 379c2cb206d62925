"""Gemma and Gemma 2 in Hugging Face's format: scaled embeddings, norms that start at 0, soft caps, windows."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

from megajax.config import TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row
from megajax.interop.hf_fields import Fields
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.gpt.llama_hf import DEFAULTS, LAYER_ROWS, ROWS, Dialect, windowed_layers, write_windows

_COMMON = {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True, "gated_linear_unit": True}
_GEMMA = Dialect(_COMMON, attention_bias=True)
_GEMMA2 = Dialect(_COMMON | {"sandwich_norm": True}, attention_bias=True, activation="hidden_activation")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_BESIDE = ("hidden_act", "hidden_activation", "cache_implementation", "sliding_window_size")
"""What published files have beside the fields that transformers reads."""


def _read_gemma(fields: Fields) -> dict[str, Any]:
    read = _GEMMA.read(fields)
    if read["activation_func"] == "gelu":  # so the first files spelled the approximation that the weights are for
        read["activation_func"] = "gelu_tanh"
    return _with_embedding(fields, read)


def _with_embedding(fields: Fields, read: dict[str, Any]) -> dict[str, Any]:
    for name in _BESIDE:
        fields.optional(name)
    return read | {"embedding_multiplier": math.sqrt(read["hidden_size"])}


def _read_gemma2(fields: Fields) -> dict[str, Any]:
    read = _GEMMA2.read(fields)
    layers = read["num_layers"]
    caps = {name: None if (cap := fields.take(name)) is None else float(cap) for name in _CAPS}
    scale = {"softmax_scale": fields.number("query_pre_attn_scalar") ** -0.5}
    windows = windowed_layers(fields, layers, lambda on: [on and i % 2 == 0 for i in range(layers)])
    return _with_embedding(fields, read | caps | scale | windows)


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    scale = config.softmax_scale or (config.kv_channels or 1) ** -0.5
    windows = write_windows(config)
    del windows["use_sliding_window"]
    caps = {name: vars(config)[name] for name in _CAPS}
    return _GEMMA2.write(config) | windows | caps | {"query_pre_attn_scalar": round(scale**-2)}


_DEFAULTS = DEFAULTS | {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_DEFAULTS2 = _DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_NORMS2 = {
    "layers.{i}.post_attention_layernorm.weight": "post_self_attn_layernorm/scale",
    "layers.{i}.pre_feedforward_layernorm.weight": "pre_mlp_layernorm/scale",
    "layers.{i}.post_feedforward_layernorm.weight": "post_mlp_layernorm/scale",
}
_LAYER_ROWS2 = (
    *(row for row in LAYER_ROWS if "post_attention_layernorm" not in row.name),
    *(Row(name, (part,)) for name, part in _NORMS2.items()),
)

GEMMA = (
    Architecture(
        name="GemmaForCausalLM",
        base="GemmaModel",
        model_type="gemma",
        defaults=_DEFAULTS | {"num_key_value_heads": 16},
        read=_read_gemma,
        write=_GEMMA.write,
        prefix="model.",
        build=GPTModel,
        rows=ROWS,
        layer_rows=LAYER_ROWS,
        ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.\w+",
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        base="Gemma2Model",
        model_type="gemma2",
        defaults=_DEFAULTS2,
        read=_read_gemma2,
        write=_write_gemma2,
        prefix="model.",
        build=GPTModel,
        rows=ROWS,
        layer_rows=_LAYER_ROWS2,
    ),
)
