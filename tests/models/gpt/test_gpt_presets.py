"""Every preset has the number of parameters that its authors publish; nothing is allocated."""

# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.gpt.gpt_presets import PRESETS

# Exact numbers: the total of the published safetensors files.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}
# Names that state a rounded size, in billions, with the tolerance of the rounding.
ROUNDED = {
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.355,
    "gpt3-760m": 0.76,
    "gpt3-1.3b": 1.316,
    "gpt3-2.7b": 2.65,
    "gpt3-6.7b": 6.66,
    "gpt3-13b": 12.85,
    "gpt3-175b": 174.6,
    "nemotron4-15b": 15.6,
    "nemotron4-340b": 341.0,
}


def _parameters(name: str) -> int:
    config = PRESETS[name]()
    boxed = jax.eval_shape(GPTModel(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    counts = jax.tree.map(lambda leaf: math.prod(leaf.shape), nn.unbox(boxed))
    tables = 1 if config.share_embeddings_and_output_weights else 2
    assert config.vocab_size is not None
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size * tables
    return sum(jax.tree.leaves(counts)) - padding


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name):
    assert _parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_parameter_count(name):
    assert _parameters(name) / 1e9 == pytest.approx(ROUNDED[name], rel=0.01)


def test_every_preset_is_checked():
    assert set(PRESETS) == set(PUBLISHED) | set(ROUNDED)
