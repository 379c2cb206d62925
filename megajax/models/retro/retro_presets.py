"""Published RETRO models by name."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from megajax.models.retro.config import RetroConfig


def _retro(num_layers: int, hidden_size: int, num_attention_heads: int) -> RetroConfig:
    """Those of "Shall we pretrain autoregressive language models with retrieval?" (arXiv:2304.06762), in Megatron.

    GPT-2's vocabulary and learned positions; chunks of 64 tokens, two neighbours with what follows them.
    """
    return RetroConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        vocab_size=50257,
        make_vocab_size_divisible_by=128,
        max_sequence_length=2048,
    )


PRESETS: Mapping[str, Callable[[], RetroConfig]] = {
    "retro-148m": partial(_retro, 12, 768, 12),
    "retro-410m": partial(_retro, 24, 1024, 16),
    "retro-1.5b": partial(_retro, 24, 2048, 32),
    "retro-9.5b": partial(_retro, 40, 4096, 64),
}
