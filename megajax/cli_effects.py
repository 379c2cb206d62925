"""When a flag has no effect, as a table: settings that nothing would read."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set

from megajax.config import Config, LatentAttentionConfig, MoEConfig
from megajax.config_kernels import Fp8LayersConfig


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """Flags (or the fields they set) that do something only when `works(config)`; `fix` says how to get there."""

    names: tuple[str, ...]
    works: Callable[[Config], bool]
    fix: str


def _rotary(c: Config) -> bool:
    return c.model.position_embedding_type in ("rope", "yarn", "mrope")


def _plain_rope(c: Config) -> bool:
    return c.model.position_embedding_type == "rope"


def _warms_up(c: Config) -> bool:
    return bool(c.optimizer.lr_warmup_iters or c.optimizer.lr_warmup_samples or c.optimizer.lr_warmup_fraction)


NO_EFFECT: tuple[NoEffect, ...] = (
    NoEffect(
        ("expert_model_parallel_size", "expert_tensor_parallel_size"),
        lambda c: (
            c.model.num_moe_experts is not None
            or (c.parallel.expert_model_parallel_size == 1 and c.parallel.expert_tensor_parallel_size is None)
        ),
        "the model has no experts; it needs --num-moe-experts",
    ),
    NoEffect(
        ("grouped_gemm_backend", *(name for name in MoEConfig.__dataclass_fields__ if name != "num_moe_experts")),
        lambda c: c.model.num_moe_experts is not None,
        "the model has no experts; it needs --num-moe-experts",
    ),
    NoEffect(
        ("moe_router_bias_update_rate",),
        lambda c: c.model.moe_router_enable_expert_bias,
        "it needs --moe-router-enable-expert-bias",
    ),
    NoEffect(
        tuple(name for name in LatentAttentionConfig.__dataclass_fields__ if name != "multi_latent_attention"),
        lambda c: c.model.multi_latent_attention,
        "it needs --multi-latent-attention",
    ),
    NoEffect(
        ("fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
        lambda c: c.kernels.fp8_format is not None,
        "it needs --fp8-format",
    ),
    NoEffect(
        tuple(Fp8LayersConfig.__dataclass_fields__),
        lambda c: c.kernels.fp8_format is not None,
        "it needs --fp8-format",
    ),
    NoEffect(
        ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        lambda c: c.model.first_last_layers_bf16,
        "it needs --first-last-layers-bf16",
    ),
    NoEffect(
        ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
        lambda c: c.kernels.fp8_recipe == "delayed",
        "it needs --fp8-recipe delayed",
    ),
    NoEffect(("mtp_loss_scaling_factor",), lambda c: c.model.mtp_num_layers is not None, "it needs --mtp-num-layers"),
    NoEffect(
        ("cp_comm_type",), lambda c: c.parallel.context_parallel_size > 1, "it needs --context-parallel-size above 1"
    ),
    NoEffect(
        ("rotary_base", "rotary_percent", "no_rope_freq"), _rotary, "it needs --position-embedding-type rope or yarn"
    ),
    NoEffect(
        ("rotary_interleaved", "seq_len_interpolation_factor", "rope_scaling_type"),
        _plain_rope,
        "it needs --position-embedding-type rope",
    ),
    NoEffect(
        ("rope_scaling_factor", "rope_original_max_position_embeddings"),
        lambda c: _plain_rope(c) and c.model.rope_scaling_type != "none",
        "it needs --position-embedding-type rope and --rope-scaling-type",
    ),
    NoEffect(
        ("rope_low_freq_factor", "rope_high_freq_factor"),
        lambda c: _plain_rope(c) and c.model.rope_scaling_type == "llama3",
        "it needs --position-embedding-type rope and --rope-scaling-type llama3",
    ),
    NoEffect(
        ("rope_short_factor", "rope_long_factor"),
        lambda c: _plain_rope(c) and c.model.rope_scaling_type == "longrope",
        "it needs --position-embedding-type rope and --rope-scaling-type longrope",
    ),
    NoEffect(
        ("rope_attention_factor",),
        lambda c: (
            c.model.position_embedding_type == "yarn" or (_plain_rope(c) and c.model.rope_scaling_type == "longrope")
        ),
        "it needs --position-embedding-type yarn or --rope-scaling-type longrope",
    ),
    NoEffect(
        (
            *("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"),
            *("yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim", "yarn_correction_range_round_to_int"),
        ),
        lambda c: c.model.position_embedding_type == "yarn",
        "it needs --position-embedding-type yarn",
    ),
    NoEffect(
        ("reset_position_ids",),
        lambda c: c.model.position_embedding_type != "none",
        "there are no positions; it needs another --position-embedding-type than none",
    ),
    NoEffect(
        ("--no-position-embedding",),
        lambda c: c.model.position_embedding_type != "learned_absolute",
        "it needs --position-embedding-type rope, yarn or none",
    ),
    NoEffect(
        ("--group-query-attention",),
        lambda c: "num_query_groups" not in c.model._derived,
        "it needs --num-query-groups",
    ),
    NoEffect(
        ("add_qkv_bias",),
        lambda c: not c.model.add_bias_linear,
        "every linear layer has a bias already; add --no-add-bias-linear",
    ),
    NoEffect(
        ("glu_linear_offset", "activation_func_clamp_value"),
        lambda c: c.model.gated_linear_unit,
        "it needs --gated-linear-unit",
    ),
    NoEffect(
        ("fp32_residual_connection",),
        lambda c: c.model.compute_dtype != "float32",
        "everything is float32 already; it needs --bf16 or --fp16",
    ),
    NoEffect(
        ("recompute_modules",),
        lambda c: c.model.recompute_granularity == "selective",
        "it needs --recompute-granularity selective",
    ),
    NoEffect(
        ("adam_beta1", "adam_beta2", "adam_eps"),
        lambda c: (
            c.optimizer.optimizer == "adam"
            or (c.optimizer.optimizer == "muon" and c.optimizer.muon_scalar_optimizer == "adam")
        ),
        "it needs --optimizer adam, or muon with --muon-scalar-optimizer adam",
    ),
    NoEffect(
        ("lion_beta1", "lion_beta2"),
        lambda c: (
            c.optimizer.optimizer == "lion"
            or (c.optimizer.optimizer == "muon" and c.optimizer.muon_scalar_optimizer == "lion")
        ),
        "it needs --optimizer lion, or muon with --muon-scalar-optimizer lion",
    ),
    NoEffect(("sgd_momentum",), lambda c: c.optimizer.optimizer == "sgd", "it needs --optimizer sgd"),
    NoEffect(
        (
            *("muon_momentum", "muon_use_nesterov", "muon_num_ns_steps", "muon_coefficient_type"),
            *("muon_scale_mode", "muon_extra_scale_factor", "muon_scalar_optimizer"),
        ),
        lambda c: c.optimizer.optimizer == "muon",
        "it needs --optimizer muon",
    ),
    NoEffect(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        lambda c: c.model.fp16,
        "it needs --fp16",
    ),
    NoEffect(
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        lambda c: c.optimizer.loss_scale is None,
        "--loss-scale makes the scale constant; drop one",
    ),
    NoEffect(
        ("min_lr",),
        lambda c: c.optimizer.lr_decay_style != "constant",
        "--lr-decay-style constant never decays; drop one",
    ),
    NoEffect(
        ("lr_decay_iters", "lr_decay_samples"),
        lambda c: c.optimizer.lr_decay_style != "constant" or c.optimizer.lr_warmup_fraction is not None,
        "--lr-decay-style constant never decays; drop one",
    ),
    NoEffect(("lr_wsd_decay_style",), lambda c: c.optimizer.lr_decay_style == "WSD", "it needs --lr-decay-style WSD"),
    NoEffect(("lr_warmup_init",), _warms_up, "it needs --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction"),
    NoEffect(("decoupled_min_lr",), lambda c: c.optimizer.decoupled_lr is not None, "it needs --decoupled-lr"),
    NoEffect(
        ("weight_decay",),
        lambda c: c.optimizer.weight_decay_incr_style == "constant",
        "--weight-decay-incr-style replaces it; use --start-weight-decay and --end-weight-decay",
    ),
    NoEffect(
        ("start_weight_decay", "end_weight_decay"),
        lambda c: c.optimizer.weight_decay_incr_style != "constant",
        "it needs --weight-decay-incr-style linear or cosine",
    ),
    NoEffect(
        ("apply_wd_to_qk_layernorm",), lambda c: c.model.qk_layernorm, "there is no such norm; it needs --qk-layernorm"
    ),
    NoEffect(
        ("train_iters",),
        lambda c: c.train.train_samples is None,
        "--train-samples already says how long to train; drop one",
    ),
    NoEffect(
        ("--tokenizer-type",), lambda c: c.data.tokenizer != "byte", "it needs --tokenizer-model, the path of its file"
    ),
    NoEffect(
        ("json_key",),
        lambda c: any(path.endswith(".jsonl") for path in c.data.data),
        "it needs a .jsonl file in --data",
    ),
    NoEffect(("profile_step_end",), lambda c: c.train.profile_step_start is not None, "it needs --profile-step-start"),
    NoEffect(
        ("sample_prompt",), lambda c: c.train.sample_tokens > 0, "no text is printed; it needs --sample-tokens above 0"
    ),
)
"""Settings that a user gives and nothing would read are mistakes. Leaving something off is none."""


def what_is_missing(names: Set[str], config: Config) -> str | None:
    """How to make these settings do something; None: they do."""
    rows = (row for row in NO_EFFECT if not names.isdisjoint(row.names) and not row.works(config))
    return next((row.fix for row in rows), None)
