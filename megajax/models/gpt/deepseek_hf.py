"""DeepSeek-V2 and DeepSeek-V3 in Hugging Face's format: latent attention, and experts in groups."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row
from megajax.interop.hf_fields import Fields, positive_integer
from megajax.models.gpt.experts_hf import EXPERT_ROWS, QWEN_ROWS, RMS_GATED, experts_plan, reader, shared_rows, writer
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.gpt.llama_hf import DEFAULTS, ROWS, Dialect, linear

_LATENT_EPSILON = 1e-6
"""Of the latents' norms, whatever `rms_norm_eps` says about the others."""


def _read(fields: Fields, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What both versions have."""
    layers, dense = arguments["num_layers"], int(fields.take("first_k_dense_replace"))
    width, rank = fields.size("moe_intermediate_size"), fields.take("q_lora_rank")
    if fields.take("moe_layer_freq") != 1:
        raise ConfigError("config.json: moe_layer_freq must be 1; other values are not supported")
    # Said twice, about training, or about modules that transformers leaves out, too.
    for name in ("num_nextn_predict_layers", "qk_head_dim", "scoring_func", "ep_size", "aux_loss_alpha", "seq_aux"):
        fields.optional(name)
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "latent_layernorm_epsilon": _LATENT_EPSILON,
        "kv_channels": None,
        "num_query_groups": None,
        "q_lora_rank": None if rank is None else positive_integer("q_lora_rank", rank),
        "kv_lora_rank": fields.size("kv_lora_rank"),
        "qk_head_dim": fields.size("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": fields.size("qk_rope_head_dim"),
        "v_head_dim": fields.size("v_head_dim"),
        "num_moe_experts": fields.size("n_routed_experts"),
        "moe_layer_freq": tuple(int(i >= dense) for i in range(layers)),
        "moe_router_topk": fields.size("num_experts_per_tok"),
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * fields.size("n_shared_experts"),
        "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor"),
    }


def _groups(fields: Fields, top_k: int, best: int) -> dict[str, Any]:
    """The groups that a token's experts lie in, each rated by its `best` experts."""
    groups, chosen = fields.size("n_group"), fields.size("topk_group")
    if groups == 1:
        return {}
    usual = max(1, top_k // chosen)  # what is rated by when nothing is said
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": chosen,
        "moe_router_group_score_topk": None if best == usual else best,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    shared, width = config.moe_shared_expert_intermediate_size or 0, config.moe_ffn_hidden_size or 1
    dense = next((i for i in range(config.num_layers) if config.is_moe_layer(i)), config.num_layers)
    return {
        "head_dim": config.qk_pos_emb_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_head_dim,
        "qk_rope_head_dim": config.qk_pos_emb_head_dim,
        "qk_head_dim": config.qk_head_dim + config.qk_pos_emb_head_dim,
        "v_head_dim": config.v_head_dim,
        "n_routed_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "first_k_dense_replace": dense,
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
    }


# Version 2: a softmax over all experts; greedy, or within groups that are as good as their best expert.


def _read_v2(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    method = fields.take("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"config.json: topk_method={method!r} is not supported; use greedy or group_limited_greedy")
    fields.optional("norm_topk_prob")  # transformers reads it and then does nothing with it
    latent = _read(fields, arguments)
    grouped = method == "group_limited_greedy"
    if not grouped:
        for name in ("n_group", "topk_group"):
            fields.optional(name)
    return latent | {
        "moe_router_pre_softmax": True,
        **(_groups(fields, latent["moe_router_topk"], best=1) if grouped else {}),
    }


def _write_v2(config: TransformerConfig) -> dict[str, Any]:
    grouped = config.moe_router_num_groups is not None
    return _write(config) | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "norm_topk_prob": False,
        "mlp_bias": False,
    }


# Version 3: sigmoids, a bias that balances, and groups that are as good as their two best experts.


def _read_v3(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    fields.optional("topk_method")  # there is one
    latent, normalized = _read(fields, arguments), fields.flag("norm_topk_prob")
    if normalized and latent["moe_router_topk"] == 1:
        raise ConfigError("config.json: num_experts_per_tok=1 with norm_topk_prob=true gives every expert the weight 1")
    return latent | {
        "qk_pos_emb_interleaved": fields.flag("rope_interleave"),
        "moe_router_score_function": "sigmoid",
        "moe_router_norm_topk_prob": normalized,
        "moe_router_enable_expert_bias": True,
        **_groups(fields, latent["moe_router_topk"], best=2),
    }


def _write_v3(config: TransformerConfig) -> dict[str, Any]:
    return _write(config) | {
        "rope_interleave": config.qk_pos_emb_interleaved,
        "norm_topk_prob": config.moe_router_norm_topk_prob,
    }


_LAYER_ROWS: tuple[Row, ...] = (
    *(row for row in QWEN_ROWS if "_norm." not in row.name),  # which here belong to latents
    Row("layers.{i}.mlp.gate.e_score_correction_bias", ("mlp/router/expert_bias",)),
    *shared_rows("mlp.shared_experts"),
    *(
        row
        for name, part in (
            ("q_proj", "linear_q_proj"),
            ("q_a_proj", "linear_q_down_proj"),
            ("q_b_proj", "linear_q_up_proj"),
            ("kv_a_proj_with_mqa", "linear_kv_down_proj"),
            ("kv_b_proj", "linear_kv_up_proj"),
        )
        for row in linear(f"self_attn.{name}", f"self_attention/{part}")
    ),
    Row("layers.{i}.self_attn.q_a_layernorm.weight", ("self_attention/q_layernorm/scale",)),
    Row("layers.{i}.self_attn.kv_a_layernorm.weight", ("self_attention/kv_layernorm/scale",)),
)
_DIALECT = Dialect(RMS_GATED, attention_bias=True)
DEEPSEEK_V2 = Architecture(
    name="DeepseekV2ForCausalLM",
    base="DeepseekV2Model",
    model_type="deepseek_v2",
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "q_lora_rank": 1536,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    },
    read=reader(_DIALECT, _read_v2),
    write=writer(_DIALECT, _write_v2),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=_LAYER_ROWS,
    plan=partial(experts_plan, EXPERT_ROWS),
)
DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    base="DeepseekV3Model",
    model_type="deepseek_v3",
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    },
    read=reader(_DIALECT, _read_v3),
    write=writer(_DIALECT, _write_v3),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=_LAYER_ROWS,
    plan=partial(experts_plan, EXPERT_ROWS),
)

DEEPSEEK = (DEEPSEEK_V2, DEEPSEEK_V3)
