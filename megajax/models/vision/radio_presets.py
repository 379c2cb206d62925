"""Published RADIO models."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from megajax.models.vision.radio_config import RADIOConfig

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _radio(layers: int, hidden: int, heads: int, class_tokens: int = 8) -> RADIOConfig:
    """ViTs of arXiv:2010.11929 with RADIO's positions (arXiv:2312.06709); class tokens as in C-RADIO."""
    return RADIOConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        patch_dim=16,
        class_token_len=class_tokens,
        summary_idxs=(0, 1),
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
        interpolate_align_corners=False,
    )


PRESETS: Mapping[str, Callable[[], RADIOConfig]] = {
    "radio-b": partial(_radio, 12, 768, 12),
    "radio-l": partial(_radio, 24, 1024, 16),
    "radio-h": partial(_radio, 32, 1280, 16, class_tokens=10),
}
