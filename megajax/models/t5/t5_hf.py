"""T5 1.0, 1.1 and mT5 in Hugging Face's format, and T5's encoder alone."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import HEAD, Architecture, Row, Tensor, layer_plan, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, ACTIVATIONS, Fields, positive_integer
from megajax.models.t5.t5_config import T5Config
from megajax.models.t5.t5_model import T5Model

_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}
_MT5_DEFAULTS = _DEFAULTS | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_GATED = "gated-"


def _read(fields: Fields, *, add_decoder: bool, may_scale: bool) -> dict[str, Any]:
    for name in ("dense_act_fn", "is_gated_act", "n_positions", "is_encoder_decoder"):
        fields.optional(name)  # follow from the others, or say nothing about the weights
    fields.number("initializer_factor")
    encoder, decoder = fields.size("num_layers"), fields.take("num_decoder_layers")
    if not add_decoder:
        decoder = encoder
    tied, scaled = fields.flag("tie_word_embeddings"), fields.optional("scale_decoder_outputs")
    gated, activation = _activation(fields.take("feed_forward_proj"))
    dropout = fields.number("dropout_rate")
    return {
        "num_layers": encoder if decoder is None else positive_integer("num_decoder_layers", decoder),
        "encoder_num_layers": encoder,
        "add_decoder": add_decoder,
        "hidden_size": fields.size("d_model"),
        "num_attention_heads": fields.size("num_heads"),
        "kv_channels": fields.size("d_kv"),
        "ffn_hidden_size": fields.size("d_ff"),
        "vocab_size": fields.size("vocab_size"),
        "share_embeddings_and_output_weights": tied or not add_decoder,
        "output_layer_bias": False,
        "scale_decoder_outputs": add_decoder and may_scale and bool(tied if scaled is None else scaled),
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": fields.size("relative_attention_num_buckets"),
        "relative_attention_max_distance": fields.size("relative_attention_max_distance"),
        "gated_linear_unit": gated,
        "activation_func": activation,
        "softmax_scale": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields.number("layer_norm_epsilon"),
        "add_bias_linear": False,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
    }


def _activation(value: str) -> tuple[bool, str]:
    """(whether the MLP is gated, its activation function)."""
    name = value.removeprefix(_GATED)
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: feed_forward_proj={value!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return value != name, "gelu_tanh" if value == "gated-gelu" else ACTIVATIONS[name]


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert isinstance(config, T5Config)
    if config.position_embedding_type != "relative":
        raise ConfigError(f"position_embedding_type={config.position_embedding_type!r}: only 'relative' exists there")
    function = ACTIVATION_NAMES[config.activation_func]
    if config.gated_linear_unit:
        function = {"gelu_new": "gelu", "gelu": "gelu_python"}.get(function, function)
    return {
        "num_layers": config.encoder_num_layers,
        "num_decoder_layers": config.num_layers,
        "is_encoder_decoder": config.add_decoder,
        "d_model": config.hidden_size,
        "d_kv": config.kv_channels,
        "d_ff": config.ffn_hidden_size,
        "num_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": config.hidden_dropout,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "feed_forward_proj": (_GATED if config.gated_linear_unit else "") + function,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "scale_decoder_outputs": config.scale_decoder_outputs,
    }


def _kernel(name: str, part: str) -> Row:
    return Row(f"{name}.weight", (f"{part}/kernel",), transposed=True)


def _attention(name: str, part: str) -> tuple[Row, ...]:
    pairs = (("q", "linear_q"), ("k", "linear_k"), ("v", "linear_v"), ("o", "linear_proj"))
    return tuple(_kernel(f"{name}.{theirs}", f"{part}/{ours}") for theirs, ours in pairs)


def _layer_rows(stack: str, *, gated: bool, cross: bool) -> tuple[Row, ...]:
    layer, mlp = f"{stack}.block.{{i}}.layer", 2 if cross else 1
    inner = f"{layer}.{mlp}.DenseReluDense"
    between = (
        Row(f"{layer}.1.layer_norm.weight", ("pre_cross_attn_layernorm/scale",)),
        *_attention(f"{layer}.1.EncDecAttention", "cross_attention"),
    )
    first = (
        (_kernel(f"{inner}.wi_0", "mlp/linear_gate"), _kernel(f"{inner}.wi_1", "mlp/linear_fc1"))
        if gated
        else (_kernel(f"{inner}.wi", "mlp/linear_fc1"),)
    )
    return (
        Row(f"{layer}.0.layer_norm.weight", ("input_layernorm/scale",)),
        *_attention(f"{layer}.0.SelfAttention", "self_attention"),
        *(between if cross else ()),
        Row(f"{layer}.{mlp}.layer_norm.weight", ("pre_mlp_layernorm/scale",)),
        *first,
        _kernel(f"{inner}.wo", "mlp/linear_fc2"),
    )


def _outer_rows(stack: str) -> tuple[Row, ...]:
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(table, (f"{stack}_relative_pos_emb/relative_attention_bias/embedding",)),
        Row(f"{stack}.final_layer_norm.weight", (f"{stack}/final_layernorm/scale",)),
    )


_SHARED = Row("shared.weight", ("embedding/word_embeddings/embedding",), vocabulary=True)


def _plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    assert isinstance(config, T5Config)
    gated = config.gated_linear_unit
    plan = rows_plan((_SHARED, *_outer_rows("encoder")), leaves, config, prefix)
    rows = _layer_rows("encoder", gated=gated, cross=False)
    specs = model.encoder_layer_specs
    plan |= layer_plan(rows, leaves, config.encoder_config, specs, prefix, block="encoder")
    if config.add_decoder:
        plan |= rows_plan(_outer_rows("decoder"), leaves, config, prefix)
        rows = _layer_rows("decoder", gated=gated, cross=True)
        plan |= layer_plan(rows, leaves, config, model.layer_specs, prefix, block="decoder")
    return plan | rows_plan([architecture.head] if architecture.head else [], leaves, config)


def _example_inputs(config: TransformerConfig) -> tuple[Any, ...]:
    del config
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return tokens, tokens


# The embedding under its other names, and a table of cross-attention that files have but no model reads.
_UNUSED = (
    r"(en|de)coder\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
_OF_DECODER = (r"decoder\..*", r"lm_head\.weight")


def _architecture(kind: str, base: str | None, *, add_decoder: bool = True, **parts: Any) -> Architecture:
    return Architecture(
        name=kind,
        base=base,
        read=partial(_read, add_decoder=add_decoder, may_scale=parts["model_type"] == "t5"),
        write=_write,
        prefix="",
        build=T5Model,
        config_type=T5Config,
        plan=_plan,
        example_inputs=_example_inputs,
        head=HEAD if add_decoder else None,
        tied_to="shared.weight",
        ignored="|".join(_UNUSED if add_decoder else _UNUSED + _OF_DECODER),
        **parts,
    )


ARCHITECTURES = (
    _architecture("T5ForConditionalGeneration", "T5Model", model_type="t5", defaults=_DEFAULTS),
    _architecture("MT5ForConditionalGeneration", "MT5Model", model_type="mt5", defaults=_MT5_DEFAULTS),
    _architecture("T5EncoderModel", None, add_decoder=False, model_type="t5", defaults=_DEFAULTS),
    _architecture("MT5EncoderModel", None, add_decoder=False, model_type="mt5", defaults=_MT5_DEFAULTS),
)
