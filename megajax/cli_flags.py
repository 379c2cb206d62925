"""The flags of the command line as tables: fields, Megatron's other spellings, and when a flag has no effect."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megajax.config import Config, LatentAttentionConfig, MoEConfig, TransformerConfig
from megajax.config_kernels import Fp8LayersConfig


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of one config group; its flag is the name with hyphens."""

    name: str
    group: str
    """Field of `Config` that holds the group."""
    owner: type
    annotation: Any
    default: Any
    """What the dataclass says, not the model family."""

    @property
    def is_bool(self) -> bool:
        """Written `--flag` / `--no-flag`, without a value."""
        return bool in (self.annotation, *get_args(self.annotation))

    def is_off(self, value: Any) -> bool:
        """Whether `value` leaves a thing switched off that is off by default."""
        return self.default == value and (value is None or value is False or value == "none")

    @property
    def is_record(self) -> bool:
        """Holds dataclasses, which only a file can spell."""
        return record_type(self.annotation) is not None


def record_type(annotation: Any) -> type | None:
    """The dataclass inside `tuple[Record, ...] | None`, or None for plain types."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    return next((found for part in get_args(annotation) if (found := record_type(part)) is not None), None)


def group_types(config_type: type[TransformerConfig]) -> dict[str, type]:
    """Name in `Config` -> dataclass of each group, with the model's own config type."""
    hints = get_type_hints(Config).items()
    groups: dict[str, type] = {k: v for k, v in hints if isinstance(v, type) and dataclasses.is_dataclass(v)}
    return groups | {"model": config_type}


def flags_of(config_type: type[TransformerConfig]) -> dict[str, Flag]:
    """Every field of every group, by field name. Names are unique across the groups (a test checks it)."""
    flags = {}
    for group, owner in group_types(config_type).items():
        hints = get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if field.init:
                flags[field.name] = Flag(field.name, group, owner, hints[field.name], field.default)
    return flags


def spell(field: str) -> str:
    """Field name -> flag."""
    return "--" + field.replace("_", "-")


def describe(annotation: Any) -> str:
    """A type as a user reads it: `INT`, `adam|sgd`, `INT INT`, `INT ...`."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        return f"{describe(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(describe, inner))
    if annotation in (int, float, str, bool):
        return {int: "INT", float: "FLOAT", str: "TEXT", bool: "true or false"}[annotation]
    parts = [describe(part) for part in get_args(annotation) if part is not type(None)]
    parts = [part for part in parts if f"{part} ..." not in parts]  # one is a list of one
    return " or ".join(parts) or annotation.__name__


def meant(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message: what the user may have meant, else `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else otherwise


CONTROL: Mapping[str, str] = MappingProxyType(
    {
        "--model": "the model family",
        "--preset": "the shape of a published model",
        "--config": "the config.json (or the folder) of an earlier run, to start from",
        "--print-sharding": "print where every parameter lies and what it costs each device, of so many, and exit",
        "--help": "this text, with the defaults of the chosen model and preset",
        "--version": "the version of megajax",
    }
)

CONTROL_VALUES: Mapping[str, tuple[int, int, str]] = MappingProxyType(
    {
        "--print-sharding": (0, 1, "no value, or a number of devices"),
        "--help": (0, 0, "no value"),
        "--version": (0, 0, "no value"),
    }
)
"""Fewest and most values of a flag of `CONTROL`, and that in words; the others take one value."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "--tp": "tensor_model_parallel_size",
        "--pp": "pipeline_model_parallel_size",
        "--vpp": "num_virtual_stages_per_pipeline_rank",
        "--cp": "context_parallel_size",
        "--ep": "expert_model_parallel_size",
        "--etp": "expert_tensor_parallel_size",
        "--num-experts": "num_moe_experts",
        "--rotary-scaling-factor": "yarn_rotary_scaling_factor",
        "--original-max-position-embeddings": "yarn_original_max_position_embeddings",
        "--mscale": "yarn_mscale",
        "--mscale-all-dim": "yarn_mscale_all_dim",
        "--norm-epsilon": "layernorm_epsilon",
        "--max-position-embeddings": "max_sequence_length",
        "--rotary-seq-len-interpolation-factor": "seq_len_interpolation_factor",
        "--train-steps": "train_iters",
        "--data-path": "data",
        "--tokenizer-model": "tokenizer",
    }
)
"""Other names of a field."""

SWITCHES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--untie-embeddings-and-output-weights": {"share_embeddings_and_output_weights": False},
        "--swiglu": {"gated_linear_unit": True, "activation_func": "silu"},
        "--quick-geglu": {"gated_linear_unit": True, "activation_func": "quick_gelu"},
        "--squared-relu": {"gated_linear_unit": False, "activation_func": "squared_relu"},
        "--disable-bias-linear": {"add_bias_linear": False},
        "--apply-layernorm-1p": {"layernorm_zero_centered_gamma": True},
        "--use-rotary-position-embeddings": {"position_embedding_type": "rope"},
        "--use-rope-scaling": {"rope_scaling_type": "llama3"},
        "--recompute-activations": {"recompute_granularity": "selective"},
        "--use-distributed-optimizer": {"zero": 1},
        "--group-query-attention": {},
        "--no-position-embedding": {},
    }
)
"""Megatron's flags without a value -> the fields they set. An empty one only asserts something: see `NO_EFFECT`."""

RECORD_FILES: Mapping[str, str] = MappingProxyType({"--heterogeneous-layers-config-path": "heterogeneous_layers"})
"""Flags that name a JSON file with the value of a field."""

_ALTERNATIVES = (
    ("bf16", "fp16"),
    ("qk_layernorm", "qk_l2_norm"),
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
)

REPLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {one: tuple(other for other in group if other != one) for group in _ALTERNATIVES for one in group}
)
"""A flag sets these other fields back to the dataclass's default where only a file, a preset or the model family had
set them: they exclude each other."""

IGNORED: tuple[str, ...] = (
    *("--moe-grouped-gemm", "--moe-router-dtype", "--moe-per-layer-logging", "--moe-router-fusion"),
    *("--no-*-fusion", "--moe-permute-fusion", "--cross-entropy-loss-fusion"),
    *("--use-flash-attn", "--use-mcore-models", "--use-legacy-models"),
    *("--distributed-backend", "--local-rank", "--cuda-graph-*", "--enable-cuda-graph"),
    *("--tp-comm-overlap*", "--overlap-*", "--nccl-*", "--use-nccl-ub", "--manual-gc*", "--te-rng-tracker"),
    *("--empty-unused-memory-level", "--fp8-interval", "--moe-router-padding-for-*"),
    *("--use-persistent-ckpt-worker", "--ckpt-format", "--auto-detect-ckpt-format", "--ckpt-fully-parallel-*"),
    *("--dist-ckpt-strictness", "--no-mmap-bin-files", "--no-create-attention-mask-in-dataloader"),
    *("--accumulate-allreduce-grads-in-fp32", "--timing-log-*", "--log-throughput", "--log-*-to-tensorboard"),
)
"""Megatron's flags (patterns) that tune PyTorch and CUDA machinery which JAX does not have, or ask for what always
happens here. They change no result, so scripts may keep them: one warning lists them."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """Flags of Megatron that would change the result and cannot be obeyed, except with a value in `accepted`."""

    patterns: tuple[str, ...]
    reason: str
    accepted: tuple[str, ...] = ()


REFUSED: tuple[Refused, ...] = (
    Refused(
        ("--expert-tensor-parallel-size", "--etp"),
        "not supported yet: experts are divided as the rest of a layer is; leave it out",
    ),
    Refused(
        (
            *("--moe-*", "--expert-*", "--mtp-*", "--fp8-*", "--fp4-*", "--hybrid-*", "--mamba-*"),
            *("--*pipeline*", "--microbatch-group-size-per-vp-stage"),
        ),
        "not supported yet; drop it",
    ),
    Refused(
        ("--tokenizer-type",),
        "not supported; give --tokenizer byte, or the path of a tokenizer.json, sentencepiece or tiktoken file",
        accepted=(
            *("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
            "TikTokenizer",
        ),
    ),
    Refused(("--vocab-file", "--merge-file"), "not supported; give --tokenizer the path of a tokenizer.json"),
    Refused(("--dataloader-type",), "not supported; use single", accepted=("single",)),
    Refused(("--mock-data",), "not supported; without --data the text that ships inside Python is used"),
    Refused(("--use-checkpoint-args",), "not supported; use --config with the config.json of the run"),
    Refused(("--no-load-optim", "--no-load-rng"), "not supported; use --finetune to take only the weights"),
    Refused(("--use-torch-fsdp2", "--use-megatron-fsdp"), "not supported; use --zero 3"),
    Refused(("--deterministic-mode",), "not supported; set XLA_FLAGS=--xla_gpu_deterministic_ops=true"),
)
"""The first row that matches counts; a field of the model's config comes before every row."""


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
