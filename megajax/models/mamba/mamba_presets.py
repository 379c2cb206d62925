"""Published Mamba-2 and hybrid models by name."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megajax.ssm.mamba_config import MambaConfig

Preset = Callable[[], MambaConfig]


def _mamba2(num_layers: int, hidden_size: int, **changes: Any) -> MambaConfig:
    """Mamba-2, table 9 of arXiv:2405.21060 and the published configs (state-spaces/mamba2-*)."""
    heads = 2 * hidden_size // 64
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "mamba_num_groups": 1,
        "mamba_chunk_size": 256,
        "vocab_size": 50277,
        "make_vocab_size_divisible_by": 16,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return MambaConfig(**{**options, **changes})


def _nemotron_h(pattern: str, hidden_size: int, **changes: Any) -> MambaConfig:
    """Nemotron-H, table 1 of arXiv:2504.03624 and the published configs (nvidia/Nemotron-H-*)."""
    options: dict[str, Any] = {
        "num_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden_size,
        "num_query_groups": 8,
        "kv_channels": 128,
        "activation_func": "squared_relu",
        "mamba_num_groups": 8,
        "vocab_size": 131072,
        "max_sequence_length": 8192,
        "share_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return MambaConfig(**{**options, **changes})


def _bamba_9b() -> MambaConfig:
    """Bamba 9B (ibm-ai-platform/Bamba-9B); each of its 32 layers is two here."""
    pattern = "".join(("*" if layer in (9, 18, 27) else "M") + "-" for layer in range(32))
    return MambaConfig(
        num_layers=64,
        hybrid_override_pattern=pattern,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        gated_linear_unit=True,
        activation_func="silu",
        position_embedding_type="rope",
        rotary_percent=0.5,
        mamba_state_dim=128,
        mamba_num_groups=1,
        mamba_chunk_size=256,
        vocab_size=128256,
        max_sequence_length=4096,
        share_embeddings_and_output_weights=False,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


_8B = "M-M-M-M*" + 3 * "-M-M-M-M-M*" + "-M-M-M-M-M-"
_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*" + 2 * "-M-M-M-M-M*" + "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
_56B = "M-M-M-M*" + 9 * "-M-M-M-M-M*" + "-M-M-M-M-M-"
_NANO_V2_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NANO_3_30B = "MEMEM*" + 4 * "EMEMEM*" + "EMEMEMEM*EMEMEMEME"
_LARGE = {"mamba_state_dim": 256, "mamba_num_heads": 256, "num_attention_heads": 64}

PRESETS: Mapping[str, Preset] = {
    "mamba2-130m": partial(_mamba2, 24, 768),
    "mamba2-370m": partial(_mamba2, 48, 1024),
    "mamba2-780m": partial(_mamba2, 48, 1536),
    "mamba2-1.3b": partial(_mamba2, 48, 2048),
    "mamba2-2.7b": partial(_mamba2, 64, 2560),
    "nemotron-h-4b": partial(
        _nemotron_h, _8B, 3072, num_attention_heads=32, ffn_hidden_size=12288, mamba_num_heads=112
    ),
    "nemotron-h-8b": partial(_nemotron_h, _8B, 4096, num_attention_heads=32, ffn_hidden_size=21504),
    "nemotron-h-47b": partial(_nemotron_h, _47B, 8192, ffn_hidden_size=30720, **_LARGE),
    "nemotron-h-56b": partial(_nemotron_h, _56B, 8192, ffn_hidden_size=32768, **_LARGE),
    "nemotron-nano-9b-v2": partial(
        _nemotron_h,
        _NANO_V2_9B,
        4480,
        num_attention_heads=40,
        ffn_hidden_size=15680,
        mamba_num_heads=128,
        mamba_head_dim=80,
        max_sequence_length=131072,
    ),
    "nemotron-3-nano-30b-a3b": partial(
        _nemotron_h,
        _NANO_3_30B,
        2688,
        num_attention_heads=32,
        num_query_groups=2,
        ffn_hidden_size=1856,
        mamba_num_heads=64,
        num_moe_experts=128,
        moe_router_topk=6,
        moe_ffn_hidden_size=1856,
        moe_shared_expert_intermediate_size=3712,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        max_sequence_length=262144,
    ),
    "bamba-9b": _bamba_9b,
}
