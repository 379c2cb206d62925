"""Every preset of BERT and T5 has the number of parameters that its authors publish; nothing is allocated."""

# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import jax
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.models.registry import FAMILIES

# Exact numbers: the total of the published files.
PUBLISHED = {
    "bert-base-uncased": 110_106_428,
    "bert-base-cased": 108_932_934,
    "bert-large-uncased": 336_226_108,
    "bert-large-cased": 334_661_958,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
}
# Names that state a rounded size, in millions, with the tolerance of the rounding.
ROUNDED = {
    "megatron-bert-345m-uncased": 336,
    "megatron-bert-345m-cased": 336,
    "megatron-bert-1.3b": 1277,
    "megatron-bert-3.9b": 3880,
    "megatron-t5-220m": 220,
}
FAMILY = {name: family for family in ("bert", "t5") for name in FAMILIES[family].presets}


def _parameters(name: str) -> int:
    family = FAMILIES[FAMILY[name]]
    config: Any = family.presets[name]().replace(make_vocab_size_divisible_by=1)
    model = family.build_model(config, LocalSpecProvider())
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config, 1, 8))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(shapes)))


def test_every_preset_is_checked() -> None:
    assert sorted(FAMILY) == sorted([*PUBLISHED, *ROUNDED])


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    assert _parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_number_of_parameters_is_about_what_the_name_says(name: str) -> None:
    assert _parameters(name) == pytest.approx(ROUNDED[name] * 1e6, rel=0.02)
