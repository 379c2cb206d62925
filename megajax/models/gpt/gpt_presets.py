"""Published GPT models by name. Each row is the model's own table of sizes; what a family shares is said once."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megajax.config import TransformerConfig

Preset = Callable[[], TransformerConfig]


def _gpt3(num_layers: int, hidden_size: int, num_attention_heads: int) -> TransformerConfig:
    """GPT-3, table 2.1 of arXiv:2005.14165 (XL with 16 heads and 13B with 5120 features, so that heads divide)."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        vocab_size=50257,
        make_vocab_size_divisible_by=128,
        max_sequence_length=2048,
    )


def _llama_like(
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int,
    *,
    vocab_size: int,
    max_sequence_length: int,
    **changes: Any,
) -> TransformerConfig:
    """RMSNorm, SwiGLU, rotary positions, no biases, no dropout: what Llama (arXiv:2302.13971) made common."""
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "ffn_hidden_size": ffn_hidden_size,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": 128,
        "max_sequence_length": max_sequence_length,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**options, **changes})


_llama2 = partial(_llama_like, vocab_size=32000, max_sequence_length=4096)
"""Llama 2, arXiv:2307.09288."""
_llama3 = partial(_llama_like, vocab_size=128256, max_sequence_length=8192, rotary_base=500000.0)
"""Llama 3, table 3 of arXiv:2407.21783."""
_llama31 = partial(_llama3, max_sequence_length=131072, rope_scaling_type="llama3", rope_scaling_factor=8.0)
_qwen25 = partial(
    _llama_like,
    vocab_size=151936,
    max_sequence_length=32768,
    rotary_base=1000000.0,
    add_qkv_bias=True,
    layernorm_epsilon=1e-6,
)
"""Qwen2.5, table 1 of arXiv:2412.15115 and the published configs."""
_qwen3 = partial(
    _llama_like,
    vocab_size=151936,
    max_sequence_length=40960,
    rotary_base=1000000.0,
    qk_layernorm=True,
    kv_channels=128,
    layernorm_epsilon=1e-6,
)
"""Qwen3, table 1 of arXiv:2505.09388 and the published configs."""
_nemotron4 = partial(
    _llama_like,
    vocab_size=256000,
    max_sequence_length=4096,
    normalization="LayerNorm",
    layernorm_zero_centered_gamma=True,
    rotary_percent=0.5,
    gated_linear_unit=False,
    activation_func="squared_relu",
)
"""Nemotron-4, arXiv:2402.16819 (15B) and arXiv:2406.11704 (340B)."""
_qwen3_moe = partial(
    _qwen3, moe_router_topk=8, num_moe_experts=128, moe_aux_loss_coeff=0.001, moe_router_load_balancing_type="aux_loss"
)
_mixtral = partial(_llama_like, num_moe_experts=8, moe_router_topk=2, moe_aux_loss_coeff=0.02, rotary_base=1000000.0)
"""Mixtral, arXiv:2401.04088 and the published configs."""
_gpt_oss = partial(
    _llama_like,
    hidden_size=2880,
    num_attention_heads=64,
    num_query_groups=8,
    ffn_hidden_size=2880,
    kv_channels=64,
    vocab_size=201088,
    max_sequence_length=131072,
    add_bias_linear=True,
    activation_func="quick_gelu",
    glu_linear_offset=1.0,
    activation_func_clamp_value=7.0,
    softmax_type="learnable",
    window_size=(127, 0),
    window_attn_skip_freq=2,
    position_embedding_type="yarn",
    rotary_base=150000.0,
    yarn_rotary_scaling_factor=32.0,
    yarn_correction_range_round_to_int=False,
    yarn_mscale=None,
    yarn_mscale_all_dim=None,
    moe_router_topk=4,
)
"""gpt-oss, arXiv:2508.10925."""
_deepseek_v3 = partial(
    _llama_like,
    61,
    7168,
    128,
    128,
    18432,
    vocab_size=129280,
    max_sequence_length=163840,
    layernorm_epsilon=1e-6,
    qk_layernorm=True,
    multi_latent_attention=True,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    position_embedding_type="yarn",
    yarn_rotary_scaling_factor=40.0,
    yarn_mscale=1.0,
    yarn_mscale_all_dim=1.0,
    num_moe_experts=256,
    moe_layer_freq=(0,) * 3 + (1,) * 58,
    moe_ffn_hidden_size=2048,
    moe_shared_expert_intermediate_size=2048,
    moe_router_topk=8,
    moe_router_score_function="sigmoid",
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    moe_router_topk_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=1e-4,
)
"""DeepSeek-V3, arXiv:2412.19437. Without its module of multi-token prediction: add `mtp_num_layers=1`."""


def _gemma(num_layers: int, hidden_size: int, *sizes: int, **changes: Any) -> TransformerConfig:
    """Gemma, arXiv:2403.08295."""
    options: dict[str, Any] = {
        "vocab_size": 256000,
        "max_sequence_length": 8192,
        "kv_channels": 256,
        "layernorm_epsilon": 1e-6,
        "layernorm_zero_centered_gamma": True,
        "activation_func": "gelu_tanh",
        "embedding_multiplier": math.sqrt(hidden_size),
        "share_embeddings_and_output_weights": True,
    }
    return _llama_like(num_layers, hidden_size, *sizes, **{**options, **changes})


_gemma2 = partial(
    _gemma,
    sandwich_norm=True,
    window_size=(4095, 0),
    window_attn_skip_freq=2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
"""Gemma 2, table 1 of arXiv:2408.00118 and the published configs."""
_TIED = {"share_embeddings_and_output_weights": True}
_ROUNDED_QWEN = {"vocab_size": 152064}
"""The larger Qwen2.5 models have a bigger table."""

PRESETS: Mapping[str, Preset] = {
    "gpt3-125m": partial(_gpt3, 12, 768, 12),
    "gpt3-350m": partial(_gpt3, 24, 1024, 16),
    "gpt3-760m": partial(_gpt3, 24, 1536, 16),
    "gpt3-1.3b": partial(_gpt3, 24, 2048, 16),
    "gpt3-2.7b": partial(_gpt3, 32, 2560, 32),
    "gpt3-6.7b": partial(_gpt3, 32, 4096, 32),
    "gpt3-13b": partial(_gpt3, 40, 5120, 40),
    "gpt3-175b": partial(_gpt3, 96, 12288, 96),
    "llama2-7b": partial(_llama2, 32, 4096, 32, 32, 11008),
    "llama2-13b": partial(_llama2, 40, 5120, 40, 40, 13824),
    "llama2-70b": partial(_llama2, 80, 8192, 64, 8, 28672),
    "llama3-8b": partial(_llama3, 32, 4096, 32, 8, 14336),
    "llama3-70b": partial(_llama3, 80, 8192, 64, 8, 28672),
    "llama3.1-8b": partial(_llama31, 32, 4096, 32, 8, 14336),
    "llama3.1-70b": partial(_llama31, 80, 8192, 64, 8, 28672),
    "llama3.1-405b": partial(_llama31, 126, 16384, 128, 8, 53248),
    "qwen2.5-0.5b": partial(_qwen25, 24, 896, 14, 2, 4864, **_TIED),
    "qwen2.5-1.5b": partial(_qwen25, 28, 1536, 12, 2, 8960, **_TIED),
    "qwen2.5-3b": partial(_qwen25, 36, 2048, 16, 2, 11008, **_TIED),
    "qwen2.5-7b": partial(_qwen25, 28, 3584, 28, 4, 18944, **_ROUNDED_QWEN, max_sequence_length=131072),
    "qwen2.5-14b": partial(_qwen25, 48, 5120, 40, 8, 13824, **_ROUNDED_QWEN, max_sequence_length=131072),
    "qwen2.5-32b": partial(_qwen25, 64, 5120, 40, 8, 27648, **_ROUNDED_QWEN, max_sequence_length=131072),
    "qwen2.5-72b": partial(_qwen25, 80, 8192, 64, 8, 29568, **_ROUNDED_QWEN, max_sequence_length=131072),
    "qwen3-0.6b": partial(_qwen3, 28, 1024, 16, 8, 3072, **_TIED),
    "qwen3-1.7b": partial(_qwen3, 28, 2048, 16, 8, 6144, **_TIED),
    "qwen3-4b": partial(_qwen3, 36, 2560, 32, 8, 9728, **_TIED),
    "qwen3-8b": partial(_qwen3, 36, 4096, 32, 8, 12288),
    "qwen3-14b": partial(_qwen3, 40, 5120, 40, 8, 17408),
    "qwen3-32b": partial(_qwen3, 64, 5120, 64, 8, 25600),
    "mistral-7b-v0.1": partial(
        _llama_like, 32, 4096, 32, 8, 14336, vocab_size=32000, max_sequence_length=32768, window_size=(4095, 0)
    ),
    "mistral-7b-v0.3": partial(
        _llama_like, 32, 4096, 32, 8, 14336, vocab_size=32768, max_sequence_length=32768, rotary_base=1000000.0
    ),
    "mixtral-8x7b": partial(_mixtral, 32, 4096, 32, 8, 14336, vocab_size=32000, max_sequence_length=32768),
    "mixtral-8x22b": partial(_mixtral, 56, 6144, 48, 8, 16384, vocab_size=32768, max_sequence_length=65536),
    "qwen3-30b-a3b": partial(_qwen3_moe, 48, 2048, 32, 4, 6144, moe_ffn_hidden_size=768),
    "qwen3-235b-a22b": partial(_qwen3_moe, 94, 4096, 64, 4, 12288, moe_ffn_hidden_size=1536),
    "deepseek-v3": _deepseek_v3,
    "gpt-oss-20b": partial(_gpt_oss, num_layers=24, num_moe_experts=32),
    "gpt-oss-120b": partial(_gpt_oss, num_layers=36, num_moe_experts=128),
    "gemma-2b": partial(_gemma, 18, 2048, 8, 1, 16384),
    "gemma-7b": partial(_gemma, 28, 3072, 16, 16, 24576),
    "gemma2-2b": partial(_gemma2, 26, 2304, 8, 4, 9216),
    "gemma2-9b": partial(_gemma2, 42, 3584, 16, 8, 14336),
    "gemma2-27b": partial(_gemma2, 46, 4608, 32, 16, 36864, kv_channels=128, softmax_scale=144**-0.5),
    "nemotron4-15b": partial(_nemotron4, 32, 6144, 48, 8, 24576),
    "nemotron4-340b": partial(_nemotron4, 96, 18432, 96, 8, 73728),
}
