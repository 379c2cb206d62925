"""Sizes that upstream's own tests and the published files state, counting of image tokens, and options alone."""

# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.models.multimodal.llava_family import LLAVA
from megajax.models.registry import FAMILIES
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer, get_num_image_embeddings
from megajax.models.vision.multimodal_projector import get_projector_spec
from megajax.models.vision.radio import RADIOModel
from megajax.models.vision.radio_config import RADIOConfig
from megajax.models.vision.vision_config import VisionConfig
from megajax.ops.images import random_windows

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
PUBLISHED = {
    "clip": {
        "clip-vit-b-32": 151_277_313,
        "clip-vit-b-16": 149_620_737,
        "clip-vit-l-14": 427_616_513,
        "clip-vit-l-14-336": 427_944_193,
        "siglip-b-16": 203_155_970,
        "siglip-l-16-256": 652_150_786,
        "siglip-so400m-14-224": 877_360_306,
        "siglip-so400m-14-384": 877_960_498,
        "vit-b-16": 86_389_248,
        "vit-l-16": 304_351_232,
        "vit-h-14": 632_404_480,
    },
    "llava": {"llava-1.5-7b": 7_063_427_072, "llava-1.5-13b": 13_351_494_656},
    "radio": {"radio-b": 98_200_000, "radio-l": 320_000_000, "radio-h": 652_000_000},
}


def count(model: nn.Module, *inputs: Any) -> int:
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(shapes)))


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, presets in PUBLISHED.items() for n in presets])
def test_published_parameter_count(family: str, name: str) -> None:
    record = FAMILIES[family]
    config = record.presets[name]()
    total = count(record.build_model(config, LocalSpecProvider()), *record.example_inputs(config, 1, 8))
    rounded = family == "radio"
    assert total == (pytest.approx(PUBLISHED[family][name], rel=5e-3) if rounded else PUBLISHED[family][name])


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_preset_is_checked(family: str) -> None:
    assert set(FAMILIES[family].presets) == set(PUBLISHED[family])


def test_sizes_of_megatrons_tests() -> None:
    images = jnp.zeros((2, 3, 336, 336))
    clip = CLIPVisionTransformer(VisionConfig(**SMALL, ln_pre=True))
    assert count(clip, images) == 174720
    assert jax.eval_shape(lambda: clip.init_with_output(jax.random.key(0), images)[0]).shape == (2, 577, 64)
    radio = RADIOModel(RADIOConfig(**SMALL, patch_dim=14, class_token_len=0, summary_idxs=()))
    assert count(radio, jnp.zeros((2, 3, 224, 224))) == 1501824
    backend, config = LocalSpecProvider(), TransformerConfig(**SMALL)
    features = jnp.zeros((1, 2, 1024))
    with_norm = get_projector_spec(backend, backend.layer_norm(config))
    assert count(with_norm(config=config), features) == 280896
    assert count(get_projector_spec(backend)(config=config, projector_type="affine"), features) == 65600


def test_image_embeddings_of_megatrons_tests() -> None:
    assert get_num_image_embeddings(448, 448, 14, "siglip", True, 1) == 1024
    assert get_num_image_embeddings(448, 448, 14, "siglip", True, 1, pixel_shuffle=True) == 256
    tags = {"pixel_shuffle": True, "use_tile_tags": True, "max_num_tiles": 12, "tokenizer_type": "nemotron5"}
    assert get_num_image_embeddings(448, 448, 14, "internvit", True, 1, **tags) == 262
    assert get_num_image_embeddings(336, 336, 14, "clip", False) == 577
    with pytest.raises(ConfigError, match="vision_model_type='vgg' is unknown"):
        get_num_image_embeddings(336, 336, 14, "vgg", False)


def test_random_windows_lie_in_the_table() -> None:
    """On a table that holds its own coordinates, a window is a grid of them, straight and between the corners."""
    grid = jnp.stack(jnp.meshgrid(jnp.linspace(0, 1, 9), jnp.linspace(0, 1, 9), indexing="ij"), axis=-1)
    windows = np.asarray(random_windows(jax.random.uniform(jax.random.key(0), (50, 4)), grid, 4, 5))
    assert windows.shape == (50, 4, 5, 2)
    assert windows.min() >= -1e-6
    assert windows.max() <= 1 + 1e-6
    np.testing.assert_allclose(windows[:, :, 0, 0], windows[:, :, 4, 0], atol=1e-6)
    sizes = windows[:, -1, -1] - windows[:, 0, 0]
    aspect = sizes[:, 1] / sizes[:, 0]
    assert sizes.min() >= math.sqrt(0.1) * math.sqrt(3 / 4) * 0.86
    assert 0.55 < aspect.min() < aspect.max() < 1.8


def test_a_tower_stops_early() -> None:
    config = VisionConfig(**SMALL, img_h=8, img_w=8, patch_dim=4, ln_post="tokens", hidden_dropout=0.0)
    model, images = CLIPVisionTransformer(config), jax.random.normal(jax.random.key(1), (2, 3, 8, 8))
    params: Any = nn.unbox(jax.jit(model.init)(jax.random.key(0), images))
    one = CLIPVisionTransformer(config.replace(num_layers=1, ln_post="none"))
    first = jax.tree.map(lambda a: a[:1], params["params"]["decoder"]["layers"])
    other = {k: v for k, v in params["params"].items() if k != "ln_post"} | {"decoder": {"layers": first}}
    early: Any = model.apply(params, images, num_layers=1)
    expected: Any = one.apply({"params": other}, images)
    np.testing.assert_allclose(early, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_dim": 15}, "img_h=336 is not divisible by patch_dim=15"),
        ({"crop_to_patches": True}, "crop_to_patches=True has no effect on img_h=336"),
        ({"crop_to_patches": True, "img_h": 13}, "img_h=13, img_w=336 hold no patch_dim=14"),
        ({"projection_dim": 8}, "pooler='none' leaves no image features"),
        ({"pooler": "dense", "class_token_len": 0}, "pooler='dense' needs class_token_len"),
        ({"ln_post": "pooled"}, "ln_post='pooled' needs pooler='class_token'"),
        ({"image_mean": (0.5,)}, "image_mean"),
        ({"text_num_layers": 2}, "pooler='none' leaves no image features"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLIPConfig(**SMALL, **options)


def test_images_of_another_size_are_refused() -> None:
    model = CLIPVisionTransformer(VisionConfig(**SMALL, img_h=8, img_w=8, patch_dim=4))
    with pytest.raises(ConfigError, match="images are 12 x 8, but the positions are those of img_h=8"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3, 12, 8)))


def test_flops_of_llava_are_six_a_weight() -> None:
    """With one token and no image to speak of, attention aside, a step is 6 FLOPs a weight."""
    config = LLAVA.presets["llava-1.5-7b"]()
    text = LLAVA.flops(config, batch_size=1, seq_length=2048) - LLAVA.flops(config, batch_size=1, seq_length=1024)
    language = 6_738_415_616 - 32000 * 4096 + 64 * 4096
    attention = 6 * 32 * 4096 * (2048**2 - 1024**2)
    assert text == pytest.approx(6 * 1024 * language + attention, rel=1e-3)
