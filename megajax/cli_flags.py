"""The flags of the command line as tables: the fields of the config, and Megatron's other spellings."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megajax.config import Config, TransformerConfig


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
"""Megatron's flags without a value -> the fields they set. An empty one only asserts something: see
`megajax.cli_effects`."""

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
