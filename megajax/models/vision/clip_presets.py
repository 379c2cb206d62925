"""Published CLIP, SigLIP and ViT models."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megajax.models.vision.clip_config import CLIPConfig

Preset = Callable[[], CLIPConfig]


def _tower(layers: int, hidden: int, heads: int, ffn: int, patch: int, side: int, **options: Any) -> CLIPConfig:
    return CLIPConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        patch_dim=patch,
        img_h=side,
        img_w=side,
        crop_to_patches=side % patch > 0,  # of 384 pixels, patches of 14 see 378
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )


def _clip(layers: int, hidden: int, patch: int, side: int, text: int, projection: int) -> CLIPConfig:
    """arXiv:2103.00020, table 20; the weights are OpenAI's."""
    return _tower(
        layers, hidden, hidden // 64, 4 * hidden, patch, side,
        ln_pre=True, ln_post="pooled", pooler="class_token", activation_func="quick_gelu", text_num_layers=12,
        text_hidden_size=text, text_num_attention_heads=text // 64, projection_dim=projection, vocab_size=49408,
        max_sequence_length=77,
    )  # fmt: skip


def _siglip(
    layers: int, hidden: int, heads: int, ffn: int, patch: int, side: int, vocab: int = 32000, length: int = 64
) -> CLIPConfig:
    """arXiv:2303.15343; so400m is the shape of arXiv:2305.13035."""
    return _tower(
        layers, hidden, heads, ffn, patch, side,
        class_token_len=0, embedder_bias=True, ln_post="tokens", pooler="attention", activation_func="gelu_tanh",
        layernorm_epsilon=1e-6, text_num_layers=layers, text_ffn_hidden_size=ffn, text_causal=False,
        text_pooling="last", contrastive_loss="sigmoid", vocab_size=vocab, max_sequence_length=length,
    )  # fmt: skip


def _vit(layers: int, hidden: int, heads: int, patch: int, side: int = 224) -> CLIPConfig:
    """arXiv:2010.11929, table 1: image towers alone."""
    return _tower(
        layers, hidden, heads, 4 * hidden, patch, side,
        embedder_bias=True, ln_post="tokens", pooler="dense", layernorm_epsilon=1e-12,
    )  # fmt: skip


PRESETS: Mapping[str, Preset] = {
    "clip-vit-b-32": partial(_clip, 12, 768, 32, 224, 512, 512),
    "clip-vit-b-16": partial(_clip, 12, 768, 16, 224, 512, 512),
    "clip-vit-l-14": partial(_clip, 24, 1024, 14, 224, 768, 768),
    "clip-vit-l-14-336": partial(_clip, 24, 1024, 14, 336, 768, 768),
    "siglip-b-16": partial(_siglip, 12, 768, 12, 3072, 16, 224),
    "siglip-l-16-256": partial(_siglip, 24, 1024, 16, 4096, 16, 256),
    "siglip-so400m-14-224": partial(_siglip, 27, 1152, 16, 4304, 14, 224, length=16),
    "siglip-so400m-14-384": partial(_siglip, 27, 1152, 16, 4304, 14, 384),
    "vit-b-16": partial(_vit, 12, 768, 12, 16),
    "vit-l-16": partial(_vit, 24, 1024, 16, 16),
    "vit-h-14": partial(_vit, 32, 1280, 16, 14),
}
