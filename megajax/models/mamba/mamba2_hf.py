"""Mamba-2 in Hugging Face's format."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row
from megajax.interop.hf_fields import Fields
from megajax.models.mamba.mamba_model import MambaModel
from megajax.models.mamba.mixer_hf import (
    PLAIN,
    expansion,
    hybrid,
    ignore,
    mixer_rows,
    outer_rows,
    read_limits,
    require,
    write_limits,
)
from megajax.ssm.hybrid_layer_allocation import MAMBA
from megajax.ssm.mamba_config import MambaConfig


def _read_mamba2(fields: Fields) -> dict[str, Any]:
    require(fields, "hidden_act", "silu", "swish")
    require(fields, "rms_norm", True)
    ignore(fields, "time_step_rank rescale_prenorm_residual norm_before_gate")
    layers, heads, head_dim = (fields.size(name) for name in ("num_hidden_layers", "num_heads", "head_dim"))
    hidden, epsilon = fields.size("hidden_size"), fields.number("layer_norm_epsilon")
    if heads * head_dim != fields.number("expand") * hidden:
        raise ConfigError(f"config.json: num_heads={heads} times head_dim={head_dim} must be expand times hidden_size")
    return {
        **PLAIN,
        "num_layers": layers,
        "hybrid_override_pattern": MAMBA * layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": head_dim,
        "vocab_size": fields.size("vocab_size"),
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
        "layernorm_epsilon": epsilon,
        "mamba_norm_epsilon": epsilon,
        "fp32_residual_connection": fields.flag("residual_in_fp32"),
        "init_method_std": fields.number("initializer_range"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_state_dim": fields.size("state_size"),
        "mamba_num_groups": fields.size("n_groups"),
        "mamba_d_conv": fields.size("conv_kernel"),
        "mamba_chunk_size": fields.size("chunk_size"),
        "mamba_conv_bias": fields.flag("use_conv_bias"),
        "mamba_proj_bias": fields.flag("use_bias"),
        "mamba_dt_min": fields.number("time_step_min"),
        "mamba_dt_max": fields.number("time_step_max"),
        "mamba_dt_init_floor": fields.number("time_step_floor"),
        **read_limits(fields),
    }


def _write_mamba2(given: TransformerConfig) -> dict[str, Any]:
    config = hybrid(given)
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "residual_in_fp32": config.fp32_residual_connection,
        "initializer_range": config.init_method_std,
        "hidden_act": "silu",
        "rms_norm": True,
        "num_heads": config.mamba_num_heads,
        "head_dim": config.mamba_head_dim,
        "expand": expansion(config),
        "state_size": config.mamba_state_dim,
        "n_groups": config.mamba_num_groups,
        "conv_kernel": config.mamba_d_conv,
        "chunk_size": config.mamba_chunk_size,
        "use_conv_bias": config.mamba_conv_bias,
        "use_bias": config.mamba_proj_bias,
        "time_step_min": config.mamba_dt_min,
        "time_step_max": config.mamba_dt_max,
        "time_step_floor": config.mamba_dt_init_floor,
        "time_step_limit": write_limits(config),
    }


MAMBA2 = Architecture(
    name="Mamba2ForCausalLM",
    base="Mamba2Model",
    model_type="mamba2",
    defaults={
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "rms_norm": True,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "residual_in_fp32": True,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "time_step_limit": [0.0, math.inf],
        "chunk_size": 256,
        "tie_word_embeddings": False,
    },
    read=_read_mamba2,
    write=_write_mamba2,
    prefix="backbone.",
    build=MambaModel,
    config_type=MambaConfig,
    rows=outer_rows("embeddings", "norm_f"),
    layer_rows=(Row("layers.{i}.norm.weight", ("norm/scale",)), *mixer_rows("mixer")),
)
