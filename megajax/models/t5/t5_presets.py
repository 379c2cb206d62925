"""Published T5 models by name."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megajax.models.t5.t5_config import T5Config

Preset = Callable[[], T5Config]
_SIZES: Mapping[str, tuple[int, int, int, int, int]] = {
    # layers of each stack, hidden size, heads, head size, ffn of 1.0
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
}
_SIZES_1_1: Mapping[str, tuple[int, int, int, int, int]] = {
    "small": (8, 512, 6, 64, 1024),
    "base": (12, 768, 12, 64, 2048),
    "large": (24, 1024, 16, 64, 2816),
    "xl": (24, 2048, 32, 64, 5120),
    "xxl": (24, 4096, 64, 64, 10240),
}


def _t5(sizes: tuple[int, int, int, int, int], **options: Any) -> T5Config:
    layers, hidden, heads, channels, ffn = sizes
    common: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": channels,
        "ffn_hidden_size": ffn,
        "vocab_size": 32128,
        "make_vocab_size_divisible_by": 128,
        "output_layer_bias": False,
        "softmax_scale": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
    }
    return T5Config(**common | options)


def _v1_0(size: str) -> T5Config:
    """T5, section 2.1 and appendix of arXiv:1910.10683."""
    return _t5(_SIZES[size], activation_func="relu", scale_decoder_outputs=True)


def _v1_1(size: str) -> T5Config:
    """T5 1.1: gated MLPs (arXiv:2002.05202), an output layer of its own."""
    gated: dict[str, Any] = {"gated_linear_unit": True, "activation_func": "gelu_tanh"}
    return _t5(_SIZES_1_1[size], **gated, share_embeddings_and_output_weights=False)


def _megatron(num_layers: int, hidden_size: int, num_attention_heads: int, ffn_hidden_size: int) -> T5Config:
    """Megatron's own examples: LayerNorm, biases, gelu, learned positions."""
    return T5Config(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        kv_channels=64,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=30522 + 100,
        make_vocab_size_divisible_by=128,
        position_embedding_type="learned_absolute",
        max_sequence_length=512,
    )


PRESETS: Mapping[str, Preset] = {
    **{f"t5-{size}": partial(_v1_0, size) for size in _SIZES},
    **{f"t5-v1.1-{size}": partial(_v1_1, size) for size in _SIZES_1_1},
    "megatron-t5-220m": partial(_megatron, 12, 768, 12, 3072),
}
