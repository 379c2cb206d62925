"""Published LLaVA models."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from megajax.models.gpt.gpt_presets import PRESETS as LANGUAGE_MODELS
from megajax.models.multimodal.llava_config import LLaVAConfig, language_arguments, tower_arguments
from megajax.models.vision.clip_presets import PRESETS as TOWERS

_TOWER_LAYERS_USED = -2


def _llava15(language_model: str) -> LLaVAConfig:
    """arXiv:2310.03744: CLIP ViT-L/14 at 336 pixels, without its last layer, and Vicuna 1.5, a Llama 2."""
    language = LANGUAGE_MODELS[language_model]().replace(vocab_size=32064, make_vocab_size_divisible_by=64)
    tower = TOWERS["clip-vit-l-14-336"]()
    return LLaVAConfig(
        **language_arguments(language),
        **tower_arguments(tower, "clip"),
        vision_feature_layer=_TOWER_LAYERS_USED,
        drop_vision_class_token=True,
        image_token_index=32000,
        image_placeholders="each",
    )


PRESETS: Mapping[str, Callable[[], LLaVAConfig]] = {
    "llava-1.5-7b": partial(_llava15, "llama2-7b"),
    "llava-1.5-13b": partial(_llava15, "llama2-13b"),
}
