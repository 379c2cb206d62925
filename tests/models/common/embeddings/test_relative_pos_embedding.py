"""T5's buckets of relative positions and the bias that they make, against Megatron's."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from megajax.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megajax.ops.relative_position import relative_position_bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 64)])
def test_buckets_and_bias_equal_megatrons(golden: Path, buckets: int, distance: int, bidirectional: bool) -> None:
    folder = golden / "mcore_relative_position"
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    name = f"nb{buckets}_md{distance}_{'bi' if bidirectional else 'uni'}"
    found = relative_position_bucket(
        inputs["relative_position"], bidirectional=bidirectional, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(found, expected[f"bucket_{name}"])

    bias = RelativePositionEmbedding(
        bidirectional=bidirectional,
        num_attention_heads=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
    )
    table = jnp.asarray(inputs[f"table_nb{buckets}"])
    variables = {"params": {"relative_attention_bias": {"embedding": table}}}
    np.testing.assert_array_equal(bias.apply(variables, 12, 20), expected[f"bias_{name}"])
