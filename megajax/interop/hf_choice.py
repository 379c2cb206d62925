"""Which Hugging Face architecture can express a config: the one whose config.json reads back as the same function."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megajax.config import ConfigError, LatentAttentionConfig, TransformerConfig
from megajax.interop.hf_architecture import Architecture
from megajax.interop.hf_rope import position_key
from megajax.ops.rope import yarn_mscale

# These change how a model is trained or with what precision it runs, not the function its weights stand for.
_NOT_THE_FUNCTION = """hidden_dropout attention_dropout init_method_std embedding_init_method_std bf16 fp16 params_dtype
recompute_granularity recompute_method recompute_num_layers recompute_modules label_smoothing z_loss_coeff
make_vocab_size_divisible_by attention_softmax_in_fp32 apply_query_key_layer_scaling fp32_residual_connection
moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_router_load_balancing_type moe_router_bias_update_rate
moe_token_dispatcher_type mtp_loss_scaling_factor freeze_language_model freeze_vision_model freeze_vision_projection
mask_prob short_seq_prob vocab_extra_ids decoder_seq_length mamba_expand mamba_chunk_size mamba_a_init_range
mamba_dt_min mamba_dt_max mamba_dt_init_floor mamba_conv_init _derived"""
_EXPERTS_ONLY = ("moe_", "num_moe_")
_LATENT_ONLY = (*tuple(LatentAttentionConfig.__dataclass_fields__)[1:], "latent_temperature")
_NOT_LATENT = ("kv_channels", "num_query_groups", "softmax_scale")
_POSITIONS = ("position_embedding_type", "max_sequence_length", "seq_len_interpolation_factor")
_POSITION_PREFIXES = ("rope_", "rotary_", "yarn_")
_GATED_ONLY = ("glu_linear_offset", "activation_func_clamp_value")


def choose(config: TransformerConfig, architectures: Sequence[Architecture]) -> Architecture:
    """The first architecture that expresses `config`.

    Raises:
      ConfigError: there is none; names the options that stand in the way of the nearest one.
    """
    nearest: tuple[Architecture, list[str]] | None = None
    for architecture in architectures:
        obstacles = _obstacles(config, architecture)
        if not obstacles:
            return architecture
        if nearest is None or len(obstacles) < len(nearest[1]):
            nearest = architecture, obstacles
    assert nearest is not None
    raise ConfigError(
        f"no Hugging Face architecture can express this model; the nearest, {nearest[0].name}, has no "
        + ", ".join(nearest[1])
    )


def _obstacles(config: TransformerConfig, architecture: Architecture) -> list[str]:
    try:
        back = architecture.read_config(architecture.write_config(config))
    except ConfigError as error:
        return [f"way to hold it ({error})"]
    for i in range(config.num_layers):
        ours, theirs = _function(config, i), _function(back, i)
        differing = [name for name in ours if ours[name] != theirs.get(name)]
        if differing:
            return [f"{name}={ours[name]!r}" for name in differing]
    return []


def _function(config: TransformerConfig, index: int) -> dict[str, Any]:
    """Everything that decides what layer `index` and the model around it compute, each thing in one form only."""
    layer = config.for_layer(index)
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    dropped = {*_NOT_THE_FUNCTION.split(), *_POSITIONS, *(() if layer.gated_linear_unit else _GATED_ONLY)}
    values = {
        name: value for name, value in values.items() if name not in dropped and not name.startswith(_POSITION_PREFIXES)
    }
    values["add_qkv_bias"] = values.pop("add_bias_linear") or layer.add_qkv_bias
    values["latent_layernorm_epsilon"] = layer.latent_layernorm_epsilon or layer.layernorm_epsilon
    values["latent_temperature"] = yarn_mscale(layer.yarn_rotary_scaling_factor, layer.yarn_mscale_all_dim or 0.0)
    values["moe_router_group_score_topk"] = layer.group_score_topk
    values["softmax_scale"] = layer.softmax_scale or (layer.kv_channels or 1) ** -0.5
    for name in _NOT_LATENT if layer.multi_latent_attention else _LATENT_ONLY:
        values.pop(name, None)
    if layer.num_moe_experts is None:
        values = {name: value for name, value in values.items() if not name.startswith(_EXPERTS_ONLY)}
    left = -1 if layer.window_size is None else layer.window_size[0]
    values["window_size"] = None if left < 0 else (left, 0)
    positions = position_key(layer)
    values["position_embedding_type"] = positions
    values["no_rope_freq"] = layer.no_rope_freq if "rope" in positions[0] or "yarn" in positions[0] else None
    if config.heterogeneous_layers is not None:
        kind = config.heterogeneous_layers[index]
        if (kind.attention, kind.mlp) != ("normal", "normal"):
            values["heterogeneous_layers"] = kind
    return values
