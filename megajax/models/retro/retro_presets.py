"""Published RETRO models by name."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping

from megajax.models.retro.config import RetroConfig


def _retro_9_5b() -> RetroConfig:
    """The largest of "Shall we pretrain autoregressive language models with retrieval?" (arXiv:2304.06762).

    GPT-2's vocabulary and learned positions; chunks of 64 tokens, two neighbours with what follows them.
    """
    return RetroConfig(
        num_layers=40,
        hidden_size=4096,
        num_attention_heads=64,
        vocab_size=50257,
        make_vocab_size_divisible_by=128,
        max_sequence_length=2048,
    )


PRESETS: Mapping[str, Callable[[], RetroConfig]] = {"retro-9.5b": _retro_9_5b}
