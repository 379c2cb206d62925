"""Bamba in Hugging Face's format: each of its layers is two of ours, a mixer or attention and an MLP."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row, Tensor, layer_reader, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields, positive_integer
from megajax.interop.hf_rope import read_rope, write_rope
from megajax.models.mamba.mamba_model import MambaModel
from megajax.models.mamba.mixer_hf import (
    PLAIN,
    expansion,
    hybrid,
    ignore,
    linear,
    mixer_rows,
    outer_rows,
    read_limits,
    require,
    write_limits,
)
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, MLP
from megajax.ssm.mamba_config import MambaConfig


def _read(fields: Fields) -> dict[str, Any]:
    ignore(fields, "num_logits_to_keep layers_block_type layer_types z_loss_coefficient")
    layers, hidden, heads = (fields.size(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    groups, attention = fields.take("num_key_value_heads"), fields.take("attn_layer_indices") or []
    if any(not isinstance(index, int) or not 0 <= index < layers for index in attention):
        raise ConfigError(
            f"config.json: attn_layer_indices={attention} must be numbers below num_hidden_layers={layers}"
        )
    expand, mixers, head_dim = fields.size("mamba_expand"), fields.size("mamba_n_heads"), fields.take("mamba_d_head")
    head_dim = expand * hidden // mixers if head_dim in ("auto", None) else positive_integer("mamba_d_head", head_dim)
    longest, epsilon = fields.size("max_position_embeddings"), fields.number("rms_norm_eps")
    bias = fields.flag("attention_bias")
    require(fields, "hidden_act", "silu", "swish")  # of the mixers, which have no other, and of the MLPs
    return {
        **PLAIN,
        "num_layers": 2 * layers,
        "hybrid_override_pattern": "".join((ATTENTION if i in attention else MAMBA) + MLP for i in range(layers)),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else positive_integer("num_key_value_heads", groups),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_mlp_bias": fields.flag("mlp_bias"),
        "add_qkv_bias": bias,
        "add_attention_proj_bias": bias,
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": longest,
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
        "layernorm_epsilon": epsilon,
        "mamba_norm_epsilon": epsilon,
        "init_method_std": fields.number("initializer_range"),
        "hidden_dropout": 0.0,
        "attention_dropout": fields.number("attention_dropout"),
        "mamba_num_heads": mixers,
        "mamba_head_dim": head_dim,
        "mamba_state_dim": fields.size("mamba_d_state"),
        "mamba_num_groups": fields.size("mamba_n_groups"),
        "mamba_d_conv": fields.size("mamba_d_conv"),
        "mamba_chunk_size": fields.size("mamba_chunk_size"),
        "mamba_conv_bias": fields.flag("mamba_conv_bias"),
        "mamba_proj_bias": fields.flag("mamba_proj_bias"),
        **read_limits(fields),
        **read_rope(fields, longest, partial=0.5),
    }


def _write(given: TransformerConfig) -> dict[str, Any]:
    config = hybrid(given)
    mixers = config.layer_pattern[::2]
    if config.layer_pattern != "".join(mixer + MLP for mixer in mixers) or not set(mixers) <= {MAMBA, ATTENTION}:
        raise ConfigError(f"hybrid_override_pattern={config.layer_pattern!r} does not alternate with MLPs")
    bias = bool(config.add_qkv_bias or config.add_bias_linear)
    return {
        "num_hidden_layers": config.num_layers // 2,
        "attn_layer_indices": [i for i, mixer in enumerate(mixers) if mixer == ATTENTION],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": ACTIVATION_NAMES[config.activation_func],
        "mlp_bias": config.add_mlp_bias,
        "attention_bias": bias,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "attention_dropout": config.attention_dropout,
        "mamba_expand": expansion(config),
        "mamba_n_heads": config.mamba_num_heads,
        "mamba_d_head": config.mamba_head_dim,
        "mamba_d_state": config.mamba_state_dim,
        "mamba_n_groups": config.mamba_num_groups,
        "mamba_d_conv": config.mamba_d_conv,
        "mamba_chunk_size": config.mamba_chunk_size,
        "mamba_conv_bias": config.mamba_conv_bias,
        "mamba_proj_bias": config.mamba_proj_bias,
        "time_step_limit": write_limits(config),
        **write_rope(config, partial=True),
    }


_MIXER_ROWS: tuple[Row, ...] = (
    *(Row("layers.{i}.input_layernorm.weight", (f"{norm}/scale",)) for norm in ("norm", "input_layernorm")),
    *mixer_rows("mamba"),
    *(row for part in "qkv" for row in linear(f"self_attn.{part}_proj", f"self_attention/linear_{part}")),
    *linear("self_attn.o_proj", "self_attention/linear_proj"),
)
_MLP_ROWS: tuple[Row, ...] = (
    Row("layers.{i}.pre_ff_layernorm.weight", ("pre_mlp_layernorm/scale",)),
    *linear("feed_forward.gate_proj", "mlp/linear_gate"),
    *linear("feed_forward.up_proj", "mlp/linear_fc1"),
    *linear("feed_forward.down_proj", "mlp/linear_fc2"),
)


def _plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    plan = rows_plan(architecture.rows, leaves, config, prefix)
    where = layer_reader(config, model.layer_specs)
    for i in range(config.num_layers):
        stack, row = where(i)
        rows = (_MIXER_ROWS, _MLP_ROWS)[i % 2]
        plan |= rows_plan(rows, leaves, config, prefix, folder=f"decoder/{stack}/", row=row, i=i // 2)
    return plan | rows_plan([architecture.head] if architecture.head else [], leaves, config)


BAMBA = Architecture(
    name="BambaForCausalLM",
    base="BambaModel",
    model_type="bamba",
    defaults={
        "vocab_size": 128000,
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "attention_dropout": 0.0,
        "attn_layer_indices": None,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [0.0, math.inf],
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
    },
    read=_read,
    write=_write,
    prefix="model.",
    build=MambaModel,
    config_type=MambaConfig,
    rows=outer_rows("embed_tokens", "final_layernorm"),
    plan=_plan,
)
