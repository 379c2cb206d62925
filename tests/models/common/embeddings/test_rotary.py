"""Rotary embeddings used alone: their angles against Megatron's (tests/golden/mcore_rope)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import ConfigError
from megajax.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megajax.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

SETTINGS = json.loads((Path(__file__).parents[3] / "golden" / "mcore_rope" / "meta.json").read_text())["settings"]
PLUMBING = ("use_cpu_initialization",)
ROPE = [name for name in SETTINGS if not name.startswith(("yarn", "mrope"))]
YARN = [name for name in SETTINGS if name.startswith("yarn")]


def arguments(name: str) -> dict:
    return {key: value for key, value in SETTINGS[name].items() if key not in PLUMBING}


@pytest.mark.parametrize("name", ROPE)
def test_rope_angles_equal_megatrons(golden: Path, name: str) -> None:
    expected = np.load(golden / "mcore_rope" / "outputs.npz")
    rope = RotaryEmbedding(**arguments(name))
    np.testing.assert_allclose(rope.inv_freq, expected[f"{name}/inv_freq"], atol=0, rtol=1e-6)
    np.testing.assert_allclose(rope(64), expected[f"{name}/emb"], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(rope(8, offset=7), expected[f"{name}/emb_offset7"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", YARN)
def test_yarn_angles_and_concentration_equal_megatrons(golden: Path, name: str) -> None:
    expected = np.load(golden / "mcore_rope" / "outputs.npz")
    yarn = YarnRotaryEmbedding(**arguments(name))
    angles, concentration = yarn(64)
    np.testing.assert_allclose(yarn.inv_freq, expected[f"{name}/inv_freq_effective"], atol=0, rtol=1e-5)
    np.testing.assert_allclose(angles, expected[f"{name}/emb"], atol=1e-6, rtol=1e-5)
    assert concentration == pytest.approx(float(expected[f"{name}/mscale"]), rel=1e-6)


def test_multimodal_angles_equal_megatrons(golden: Path) -> None:
    positions = np.load(golden / "mcore_rope" / "inputs.npz")["mrope_position_ids"]
    rope = MultimodalRotaryEmbedding(SETTINGS["mrope"]["kv_channels"], tuple(SETTINGS["mrope"]["mrope_section"]))
    expected = np.load(golden / "mcore_rope" / "outputs.npz")["mrope/emb"].swapaxes(0, 1)
    np.testing.assert_allclose(rope(jnp.asarray(positions)), expected, atol=1e-6, rtol=1e-5)
    text = jnp.arange(5)[None]
    np.testing.assert_allclose(rope(text), RotaryEmbedding(SETTINGS["mrope"]["kv_channels"])(5)[None], atol=1e-6)


def test_angles_of_any_positions_under_jit() -> None:
    rope = RotaryEmbedding(kv_channels=8, rotary_percent=0.5)
    positions = jnp.array([[5, 0, 2]])
    np.testing.assert_allclose(jax.jit(rope.angles)(positions)[0], rope(6)[np.array([5, 0, 2])], atol=1e-6)
    assert rope(6).shape == (6, 4)


def test_dynamic_scaling_starts_beyond_the_original_length() -> None:
    rope = RotaryEmbedding(8, rope_scaling="dynamic", rope_scaling_factor=4.0, original_max_position_embeddings=16)
    np.testing.assert_allclose(rope(16), RotaryEmbedding(8)(16), atol=1e-6)
    grown = 10000.0 * (4.0 * 32 / 16 - 3.0) ** (8 / 6)
    np.testing.assert_allclose(rope(32), RotaryEmbedding(8, rotary_base=grown)(32), rtol=1e-5, atol=1e-6)


def test_longrope_divides_by_the_short_or_long_factors() -> None:
    short, long = (1.0, 2.0), (3.0, 4.0)
    rope = RotaryEmbedding(
        4, rope_scaling="longrope", rope_scaling_factor=2.0, original_max_position_embeddings=8,
        short_factor=short, long_factor=long,
    )  # fmt: skip
    plain = RotaryEmbedding(4).inv_freq
    for length, factors in ((8, short), (9, long)):
        expected = np.arange(length)[:, None] * (plain / np.array(factors))
        np.testing.assert_allclose(rope(length)[:, :2], expected, rtol=1e-6)
    scale = np.sqrt(1 + np.log(2.0) / np.log(8))
    np.testing.assert_allclose(rope.rotary(jnp.arange(1)[None]).cos, scale, rtol=1e-6)
    with pytest.raises(ConfigError, match="needs short_factor and long_factor"):
        RotaryEmbedding(4, rope_scaling="longrope")(3)


def test_yarn_refuses_interleaving() -> None:
    with pytest.raises(ConfigError, match="rotary_interleaved=True is not defined for YaRN"):
        YarnRotaryEmbedding(8, rotary_interleaved=True)
