"""Published BERT models by name."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from megajax.models.bert.bert_config import BertConfig

Preset = Callable[[], BertConfig]


def _published(num_layers: int, hidden_size: int, num_attention_heads: int, vocab_size: int) -> BertConfig:
    """BERT, section 3 of arXiv:1810.04805."""
    return BertConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=128,
        max_sequence_length=512,
        apply_residual_connection_post_layernorm=True,
        layernorm_epsilon=1e-12,
    )


def _megatron(num_layers: int, hidden_size: int, num_attention_heads: int, vocab_size: int) -> BertConfig:
    """Megatron's BERT, section 5.3 of arXiv:1909.08053: norms before the sublayers."""
    return BertConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=128,
        max_sequence_length=512,
        layernorm_epsilon=1e-12,
    )


_UNCASED, _CASED, _PADDED = 30522, 28996, 29056
PRESETS: Mapping[str, Preset] = {
    "bert-base-uncased": partial(_published, 12, 768, 12, _UNCASED),
    "bert-base-cased": partial(_published, 12, 768, 12, _CASED),
    "bert-large-uncased": partial(_published, 24, 1024, 16, _UNCASED),
    "bert-large-cased": partial(_published, 24, 1024, 16, _CASED),
    "megatron-bert-345m-uncased": partial(_megatron, 24, 1024, 16, _UNCASED),
    "megatron-bert-345m-cased": partial(_megatron, 24, 1024, 16, _PADDED),
    "megatron-bert-1.3b": partial(_megatron, 24, 2048, 32, _UNCASED),
    "megatron-bert-3.9b": partial(_megatron, 48, 2560, 40, _UNCASED),
}
