"""Llama and its descendants in Hugging Face's format: one set of tensor names, configs that differ in a few fields."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields, positive_integer
from megajax.interop.hf_rope import read_rope, write_rope
from megajax.models.gpt.gpt_model import GPTModel


@dataclasses.dataclass(frozen=True)
class Dialect:
    """In what a descendant of Llama differs from the others.

    Attributes:
      fixed: options that the architecture sets and config.json does not mention.
      epsilon, activation: names of the fields with the norms' epsilon and the MLP's activation function.
      attention_bias, mlp_bias: whether config.json decides on these biases (else `fixed` does).
      partial: default part of a head that is rotated, where config.json decides on it.
      read_layers, write_layers: the fields that make layers differ.
    """

    fixed: Mapping[str, Any]
    epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    attention_bias: bool = False
    mlp_bias: bool = False
    partial: float | None = None
    read_layers: Callable[[Fields, int], dict[str, Any]] = lambda fields, layers: {}
    write_layers: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Fields of config.json -> arguments of TransformerConfig."""
        layers, heads, hidden = (
            fields.size(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        groups, head_dim = fields.take("num_key_value_heads"), fields.take("head_dim")
        longest = fields.size("max_position_embeddings")
        biases: dict[str, Any] = {}
        if self.attention_bias:
            bias = fields.flag("attention_bias")
            biases |= {"add_qkv_bias": bias, "add_attention_proj_bias": bias}
        if self.mlp_bias:
            biases |= {"add_mlp_bias": fields.flag("mlp_bias")}
        return {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": heads if groups is None else positive_integer("num_key_value_heads", groups),
            "kv_channels": None if head_dim is None else positive_integer("head_dim", head_dim),
            "ffn_hidden_size": fields.size("intermediate_size"),
            "vocab_size": fields.size("vocab_size"),
            "max_sequence_length": longest,
            "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
            "activation_func": fields.activation(self.activation),
            "layernorm_epsilon": fields.number(self.epsilon),
            "attention_dropout": fields.number("attention_dropout"),
            "hidden_dropout": 0.0,
            "init_method_std": fields.number("initializer_range"),
            "add_bias_linear": False,
            **self.fixed,
            **biases,
            **read_rope(fields, longest, partial=self.partial),
            **self.read_layers(fields, layers),
        }

    def write(self, config: TransformerConfig) -> dict[str, Any]:
        """TransformerConfig -> fields of config.json."""
        biases: dict[str, Any] = {}
        if self.attention_bias:
            biases |= {"attention_bias": config.add_qkv_bias or config.add_bias_linear}
        if self.mlp_bias:
            biases |= {"mlp_bias": config.add_mlp_bias}
        return {
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_query_groups,
            "head_dim": config.kv_channels,
            "intermediate_size": config.ffn_hidden_size,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.share_embeddings_and_output_weights,
            self.activation: ACTIVATION_NAMES[config.activation_func],
            self.epsilon: config.layernorm_epsilon,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.init_method_std,
            **biases,
            **write_rope(config, partial=self.partial is not None),
            **self.write_layers(config),
        }


def _window(size: Any) -> tuple[int, int]:
    # There the window counts the query's own position, here only its neighbours.
    return (positive_integer("sliding_window", size) - 1, 0)


def _read_mistral(fields: Fields, layers: int) -> dict[str, Any]:
    size = fields.take("sliding_window")
    return {} if size is None else {"window_size": _window(size)}


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": None if config.window_size is None else config.window_size[0] + 1}


def windowed_layers(fields: Fields, layers: int, default: Callable[[bool], list[bool]]) -> dict[str, Any]:
    """Which layers have a window: what `layer_types` says, else `default(whether there is a window)`."""
    on, size, kinds = fields.flag("use_sliding_window"), fields.take("sliding_window"), fields.optional("layer_types")
    if kinds is None:
        windowed = default(on and size is not None)
    else:
        known = isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}
        if not known or len(kinds) != layers:
            raise ConfigError(
                f"config.json: layer_types={kinds} must name full_attention or sliding_attention for each of"
                f" num_hidden_layers={layers}"
            )
        windowed = [kind == "sliding_attention" for kind in kinds]
    if not any(windowed):
        return {}
    if not on or size is None:
        raise ConfigError(
            f"config.json: layer_types has sliding_attention, which use_sliding_window={on} with"
            f" sliding_window={size} contradicts"
        )
    return {"window_size": _window(size), "window_attn_skip_freq": tuple(int(w) for w in windowed)}


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `windowed_layers`."""
    sizes = [config.for_layer(i).window_size for i in range(config.num_layers)]
    window = next((size for size in sizes if size is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": None if window is None else window[0] + 1,
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in sizes],
    }


def _read_qwen(fields: Fields, layers: int) -> dict[str, Any]:
    first = fields.number("max_window_layers")
    return windowed_layers(fields, layers, lambda on: [on and i >= first for i in range(layers)])


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    windows = write_windows(config)
    first = next((i for i, kind in enumerate(windows["layer_types"]) if kind == "sliding_attention"), config.num_layers)
    return windows | {"max_window_layers": first}


def _read_smollm3(fields: Fields, layers: int) -> dict[str, Any]:
    fields.optional("max_window_layers")  # published configs have it, but nothing reads it
    every, rotated = fields.size("no_rope_layer_interval"), fields.take("no_rope_layers")
    if rotated is None:  # 1 means that the layer has a rotary embedding, in spite of the field's name
        rotated = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise ConfigError(f"config.json: no_rope_layers={rotated} must have num_hidden_layers={layers} entries")
    skipped = tuple(int(not value) for value in rotated[:layers])
    pattern = {"no_rope_freq": skipped} if any(skipped) else {}
    return pattern | windowed_layers(fields, layers, lambda on: [on and bool(skip) for skip in skipped])


def _write_smollm3(config: TransformerConfig) -> dict[str, Any]:
    rotated = [int(config.for_layer(i).no_rope_freq is None) for i in range(config.num_layers)]
    return write_windows(config) | {"no_rope_layers": rotated}


_RMS_GATED = {"normalization": "RMSNorm", "gated_linear_unit": True}
_LLAMA = Dialect(_RMS_GATED, attention_bias=True, mlp_bias=True)
_MISTRAL = Dialect(_RMS_GATED, read_layers=_read_mistral, write_layers=_write_mistral)
_QWEN2 = Dialect(
    _RMS_GATED | {"add_qkv_bias": True, "add_attention_proj_bias": False},
    read_layers=_read_qwen,
    write_layers=_write_qwen,
)
_QWEN3 = Dialect(
    _RMS_GATED | {"qk_layernorm": True}, attention_bias=True, read_layers=_read_qwen, write_layers=_write_qwen
)
_SMOLLM3 = Dialect(
    _RMS_GATED, attention_bias=True, mlp_bias=True, read_layers=_read_smollm3, write_layers=_write_smollm3
)
_NEMOTRON = Dialect(
    {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    epsilon="norm_eps",
    attention_bias=True,
    mlp_bias=True,
    partial=0.5,
)

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_WINDOWS: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def linear(name: str, *parts: str) -> tuple[Row, Row]:
    """The tensors of a linear layer: weight and bias."""
    weights = tuple(f"{part}/kernel" for part in parts)
    biases = tuple(f"{part}/bias" for part in parts)
    return Row(f"layers.{{i}}.{name}.weight", weights, transposed=True), Row(f"layers.{{i}}.{name}.bias", biases)


LAYER_ROWS: tuple[Row, ...] = (
    Row("layers.{i}.input_layernorm.weight", ("input_layernorm/scale",)),
    Row("layers.{i}.input_layernorm.bias", ("input_layernorm/bias",)),
    *linear("self_attn.q_proj", "self_attention/linear_q"),
    *linear("self_attn.k_proj", "self_attention/linear_k"),
    *linear("self_attn.v_proj", "self_attention/linear_v"),
    *linear("self_attn.o_proj", "self_attention/linear_proj"),
    Row("layers.{i}.self_attn.q_norm.weight", ("self_attention/q_layernorm/scale",)),
    Row("layers.{i}.self_attn.k_norm.weight", ("self_attention/k_layernorm/scale",)),
    Row("layers.{i}.post_attention_layernorm.weight", ("pre_mlp_layernorm/scale",)),
    Row("layers.{i}.post_attention_layernorm.bias", ("pre_mlp_layernorm/bias",)),
    *linear("mlp.gate_proj", "mlp/linear_gate"),
    *linear("mlp.up_proj", "mlp/linear_fc1"),
    *linear("mlp.down_proj", "mlp/linear_fc2"),
)
ROWS: tuple[Row, ...] = (
    Row("embed_tokens.weight", ("embedding/word_embeddings/embedding",), vocabulary=True),
    Row("norm.weight", ("decoder/final_layernorm/scale",)),
    Row("norm.bias", ("decoder/final_layernorm/bias",)),
)


def _architecture(family: str, model_type: str, dialect: Dialect, defaults: Mapping[str, Any]) -> Architecture:
    return Architecture(
        name=f"{family}ForCausalLM",
        base=f"{family}Model",
        model_type=model_type,
        defaults={**DEFAULTS, **defaults},
        read=dialect.read,
        write=dialect.write,
        prefix="model.",
        build=GPTModel,
        rows=ROWS,
        layer_rows=LAYER_ROWS,
        ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.\w+",
    )


_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False}
_SMOLLM3_DEFAULTS = {
    "rope_theta": 2e6,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "sliding_window": None,
}
_NEMOTRON_DEFAULTS = {
    "hidden_act": "relu2",
    "norm_eps": 1e-5,
    "initializer_range": 0.0134,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN2_DEFAULTS = _WINDOWS | {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN3_DEFAULTS = _QWEN2_DEFAULTS | {"head_dim": 128, "attention_bias": False}

LLAMA_LIKE = (
    _architecture("Llama", "llama", _LLAMA, _LLAMA_DEFAULTS),
    _architecture("Mistral", "mistral", _MISTRAL, _MISTRAL_DEFAULTS),
    _architecture("Qwen2", "qwen2", _QWEN2, _QWEN2_DEFAULTS),
    _architecture("Qwen3", "qwen3", _QWEN3, _QWEN3_DEFAULTS),
    _architecture("SmolLM3", "smollm3", _SMOLLM3, _SMOLLM3_DEFAULTS),
    _architecture("Nemotron", "nemotron", _NEMOTRON, _NEMOTRON_DEFAULTS),
)
