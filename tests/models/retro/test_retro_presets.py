"""Every preset of RETRO has about the number of parameters that its authors publish; nothing is allocated."""

# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import jax
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.models.registry import FAMILIES

PUBLISHED = {"retro-9.5b": 9.5e9}
"""arXiv:2304.06762, rounded there."""


def test_every_preset_is_checked() -> None:
    assert sorted(FAMILIES["retro"].presets) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_about_the_published_one(name: str) -> None:
    family = FAMILIES["retro"]
    config: Any = family.presets[name]()
    model = family.build_model(config, LocalSpecProvider())
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config, 1, 64))
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(shapes)))
    assert found == pytest.approx(PUBLISHED[name], rel=0.03)
