"""The rotation itself against Megatron's (tests/golden/mcore_rope)."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from megajax.models.common.embeddings.positions import packed_positions
from megajax.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megajax.ops.rope import apply_rotary


def case(golden: Path) -> tuple[Any, Any]:
    return np.load(golden / "mcore_rope" / "inputs.npz"), np.load(golden / "mcore_rope" / "outputs.npz")


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("interleaved_False", RotaryEmbedding(16)),
        ("interleaved_True", RotaryEmbedding(16, rotary_interleaved=True)),
        ("partial50", RotaryEmbedding(16, rotary_percent=0.5)),
        ("mscale1.3", RotaryEmbedding(16, attention_factor=1.3)),
    ],
)
def test_rotation_equals_megatrons(golden: Path, name: str, embedding: RotaryEmbedding) -> None:
    inputs, expected = case(golden)
    x_BSNK = jnp.asarray(inputs["x"]).transpose(1, 0, 2, 3)
    y_BSNK = apply_rotary(x_BSNK, embedding.rotary(jnp.arange(40)[None]))
    np.testing.assert_allclose(y_BSNK.transpose(1, 0, 2, 3), expected[f"apply/{name}"], atol=2e-6, rtol=1e-5)


def test_packed_documents_restart_at_position_zero_as_in_megatrons_thd_layout(golden: Path) -> None:
    inputs, expected = case(golden)
    ends = inputs["cu_seqlens"]
    segments = np.searchsorted(ends, np.arange(40), side="right")[None]
    positions = packed_positions(jnp.asarray(segments))
    assert [int(positions[0, start]) for start in ends[:-1]] == [0] * (len(ends) - 1)
    y = apply_rotary(jnp.asarray(inputs["x"])[:, 0][None], RotaryEmbedding(16).rotary(positions))
    np.testing.assert_allclose(y[0], expected["apply/thd"], atol=2e-6, rtol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    embedding = RotaryEmbedding(16)

    def score(at_q: int, at_k: int) -> float:
        turned = [apply_rotary(x, embedding.rotary(jnp.array([[at]]))) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
