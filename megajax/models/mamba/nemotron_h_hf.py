"""Nemotron-H (arXiv:2504.03624), and Nemotron 3 with experts, in Hugging Face's format."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row, Tensor, decoder_plan, layer_reader, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields, number, positive_integer
from megajax.models.mamba.mamba_model import MambaModel
from megajax.models.mamba.mixer_hf import PLAIN, expansion, hybrid, ignore, linear, mixer_rows, outer_rows, require
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, MLP, MOE, check_pattern
from megajax.ssm.mamba_config import MambaConfig

_BLOCKS = {"mamba": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION, "full_attention": ATTENTION}
_BLOCKS |= {"mlp": MLP, "moe": MOE}
_BLOCK_OF = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp", MOE: "moe"}


def _read_pattern(fields: Fields) -> str:
    """The layers: a list of their types since transformers 5, a pattern before."""
    kinds, pattern = fields.optional("layers_block_type"), fields.optional("hybrid_override_pattern")
    listed = fields.optional("layer_types")
    kinds = listed if kinds is None else kinds
    if kinds is not None:
        unknown = [kind for kind in kinds if kind not in _BLOCKS]
        if unknown:
            raise ConfigError(f"config.json: layers_block_type has {unknown[0]!r}; known: {', '.join(_BLOCKS)}")
        pattern = "".join(_BLOCKS[kind] for kind in kinds)
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError("config.json has no field layers_block_type, which this architecture needs")
    check_pattern(pattern)
    layers = fields.optional("num_hidden_layers")
    if layers not in (None, len(pattern)):
        raise ConfigError(f"config.json: num_hidden_layers={layers} with {len(pattern)} layers in the pattern")
    return pattern


_OLDER = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
}
"""Names of fields in older files, which win over the present ones."""


def _read_nemotron_h(fields: Fields) -> dict[str, Any]:
    older = {name: fields.optional(old) for old, name in _OLDER.items()}

    def take(name: str) -> Any:
        present = fields.take(name)
        return present if older.get(name) is None else older[name]

    require(fields, "mamba_hidden_act", "silu", "swish")
    ignore(fields, "use_mamba_kernels mamba_ssm_cache_dtype rescale_prenorm_residual num_logits_to_keep expand")
    ignore(fields, "mamba_proj_bias mtp_layers_block_type mtp_hybrid_override_pattern moe_shared_expert_overlap")
    ignore(fields, "rms_norm_eps time_step_rank attention_bias time_step_limit output_router_logits rope_theta")
    ignore(fields, "partial_rotary_factor moe_latent_overlap")
    least_step = number("time_step_min", take("time_step_min"))
    pattern, epsilon = _read_pattern(fields), fields.number("layer_norm_epsilon")
    biased = fields.flag("mlp_bias")
    if biased and MOE in pattern:
        raise ConfigError("config.json: mlp_bias=true is not supported beside experts, which have no biases there")
    heads, groups = fields.size("num_attention_heads"), fields.take("num_key_value_heads")
    return {
        **PLAIN,
        "num_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "hidden_size": fields.size("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else positive_integer("num_key_value_heads", groups),
        "kv_channels": positive_integer("head_dim", take("head_dim")),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "activation_func": fields.activation("mlp_hidden_act"),
        "add_mlp_bias": biased,
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": fields.size("max_position_embeddings"),
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
        "layernorm_epsilon": epsilon,
        "mamba_norm_epsilon": epsilon,
        "fp32_residual_connection": fields.flag("residual_in_fp32"),
        "init_method_std": fields.number("initializer_range"),
        "hidden_dropout": fields.number("hidden_dropout"),
        "attention_dropout": fields.number("attention_dropout"),
        "mamba_num_heads": fields.size("mamba_num_heads"),
        "mamba_head_dim": fields.size("mamba_head_dim"),
        "mamba_state_dim": fields.size("ssm_state_size"),
        "mamba_num_groups": positive_integer("n_groups", take("n_groups")),
        "mamba_d_conv": positive_integer("conv_kernel", take("conv_kernel")),
        "mamba_chunk_size": positive_integer("chunk_size", take("chunk_size")),
        "mamba_conv_bias": bool(take("use_conv_bias")),
        "mamba_proj_bias": fields.flag("use_bias"),
        "mamba_dt_min": least_step,
        "mamba_dt_max": number("time_step_max", take("time_step_max")),
        "mamba_dt_init_floor": number("time_step_floor", take("time_step_floor")),
        # Its mixers do not step by less than the least step of their first weights.
        "mamba_dt_clamp_min": least_step,
        **_read_experts(fields, MOE in pattern),
    }


_EXPERT_FIELDS = """n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size
moe_latent_size num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob"""


def _read_experts(fields: Fields, used: bool) -> dict[str, Any]:
    values = {name: fields.take(name) for name in _EXPERT_FIELDS.split()}
    if not used:
        return {}
    groups, chosen, top_k = values["n_group"], values["topk_group"], values["num_experts_per_tok"]
    normalized = bool(values["norm_topk_prob"])
    if normalized and top_k == 1:
        raise ConfigError("config.json: num_experts_per_tok=1 with norm_topk_prob=true gives every expert the weight 1")
    return {
        "num_moe_experts": values["n_routed_experts"],
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": values["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": values["moe_shared_expert_intermediate_size"],
        "moe_latent_size": values["moe_latent_size"],
        "moe_router_score_function": "sigmoid",
        "moe_router_norm_topk_prob": normalized,
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        # A group is rated by its best two experts.
        "moe_router_group_score_topk": 2 if groups > 1 and top_k // chosen != 2 else None,
        "moe_router_topk_scaling_factor": float(values["routed_scaling_factor"]),
    }


def _write_nemotron_h(given: TransformerConfig) -> dict[str, Any]:
    config = hybrid(given)
    if not set(config.layer_pattern) <= set(_BLOCK_OF):
        raise ConfigError(f"hybrid_override_pattern={config.layer_pattern!r} has layers other than {set(_BLOCK_OF)}")
    fields: dict[str, Any] = {
        "layers_block_type": [_BLOCK_OF[symbol] for symbol in config.layer_pattern],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "max_position_embeddings": config.max_sequence_length or 4096,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "intermediate_size": config.ffn_hidden_size,
        "mlp_hidden_act": ACTIVATION_NAMES[config.activation_func],
        "mlp_bias": config.add_mlp_bias,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "residual_in_fp32": config.fp32_residual_connection,
        "initializer_range": config.init_method_std,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "expand": expansion(config),
        "ssm_state_size": config.mamba_state_dim,
        "n_groups": config.mamba_num_groups,
        "conv_kernel": config.mamba_d_conv,
        "chunk_size": config.mamba_chunk_size,
        "use_conv_bias": config.mamba_conv_bias,
        "use_bias": config.mamba_proj_bias,
        "time_step_min": config.mamba_dt_clamp_min,
        "time_step_max": config.mamba_dt_max,
        "time_step_floor": config.mamba_dt_init_floor,
    }
    if config.num_moe_experts is None:
        return fields
    width = config.moe_shared_expert_intermediate_size
    return fields | {
        "n_routed_experts": config.num_moe_experts,
        "n_shared_experts": 0 if width is None else 1,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": width,
        "moe_latent_size": config.moe_latent_size,
        "num_experts_per_tok": config.moe_router_topk,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
        "norm_topk_prob": config.moe_router_norm_topk_prob,
    }


def _plan_with_experts(
    rows: Iterable[Row],
    architecture: Architecture,
    config: TransformerConfig,
    model: Any,
    leaves: Mapping[str, Any],
    prefix: str,
) -> dict[str, Tensor]:
    """A decoder's tensors, and `rows` of each expert."""
    plan = decoder_plan(architecture, config, model, leaves, prefix)
    where = layer_reader(config, model.layer_specs)
    for i in range(config.num_layers):
        stack, row = where(i)
        for expert in range(config.for_layer(i).num_moe_experts or 0):
            folder = f"decoder/{stack}/"
            plan |= rows_plan(rows, leaves, config, prefix, folder=folder, row=(row, expert), i=i, e=expert)
    return plan


_NORMS = ("norm", "input_layernorm", "pre_mlp_layernorm")
NEMOTRON_H = Architecture(
    name="NemotronHForCausalLM",
    base="NemotronHModel",
    model_type="nemotron_h",
    defaults={
        "vocab_size": 131072,
        "hidden_size": 4096,
        "tie_word_embeddings": False,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "intermediate_size": 21504,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "conv_kernel": 4,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "use_conv_bias": True,
        "chunk_size": 128,
        "use_bias": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "moe_latent_size": None,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    read=_read_nemotron_h,
    write=_write_nemotron_h,
    prefix="backbone.",
    tied_to="backbone.embeddings.weight",
    build=MambaModel,
    config_type=MambaConfig,
    older_names=((r"^model\.", "backbone."),),
    rows=outer_rows("embeddings", "norm_f"),
    layer_rows=(
        *(
            Row("layers.{i}.norm.weight", (f"{norm}/scale",))
            for norm in ("norm", "input_layernorm", "pre_mlp_layernorm")
        ),
        *mixer_rows("mixer"),
        *(row for part in "qkv" for row in linear(f"mixer.{part}_proj", f"self_attention/linear_{part}")),
        *linear("mixer.o_proj", "self_attention/linear_proj"),
        *linear("mixer.up_proj", "mlp/linear_fc1"),
        *linear("mixer.down_proj", "mlp/linear_fc2"),
        Row("layers.{i}.mixer.gate.weight", ("mlp/router/kernel",), transposed=True),
        Row("layers.{i}.mixer.gate.e_score_correction_bias", ("mlp/router/expert_bias",)),
        *linear("mixer.shared_experts.up_proj", "mlp/shared_experts/linear_fc1"),
        *linear("mixer.shared_experts.down_proj", "mlp/shared_experts/linear_fc2"),
        *linear("mixer.fc1_latent_proj", "mlp/fc1_latent_proj"),
        *linear("mixer.fc2_latent_proj", "mlp/fc2_latent_proj"),
    ),
    plan=partial(
        _plan_with_experts,
        tuple(
            Row(f"layers.{{i}}.mixer.experts.{{e}}.{name}.weight", (f"mlp/experts/{part}/kernel",), transposed=True)
            for name, part in (("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"))
        ),
    ),
)
