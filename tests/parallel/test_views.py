"""What a stage need not keep, because it is only another view of what is at hand."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.config import TransformerConfig
from megajax.models.gpt import gpt_family
from megajax.parallel.pipeline_pieces import Work
from megajax.parallel.pipeline_residuals import Residuals
from megajax.parallel.views import Views
from megajax.transformer.block import StackRows

LAYERS, SEQ, HIDDEN = 4, 8, 16


def test_views_are_found_and_made_again():
    def function(a, b, x):
        return [a[1:].reshape(-1, 2), a * 2, b, x.T, a[1:].reshape(-1, 2), b[:1] * x]

    a, b, x = jnp.arange(12.0).reshape(3, 4), jnp.arange(3.0), jnp.ones((4, 4))
    views = Views.of(function, [a, b], [x])
    assert [source is None for source in views.sources] == [False, True, False, True, False, True]
    assert [shape.shape for shape in views.rest] == [(3, 4), (4, 4), (4, 4)]
    made = views([a + 1, b])
    expected = function(a + 1, b, x)
    for source, result in zip(views.sources, expected, strict=True):
        if source is not None:
            np.testing.assert_array_equal(made[source], result)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_method": "uniform", "recompute_num_layers": 3},
        {"recompute_method": "block", "recompute_num_layers": LAYERS},
    ],
    ids=str,
)
def test_full_recomputation_keeps_no_weights(recompute: dict[str, Any]):
    """Only what a layer, or a group of layers, reads from the stream waits in a pipeline's ring."""
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=2, vocab_size=32, position_embedding_type="rope",
        hidden_dropout=0.0, attention_dropout=0.0, recompute_granularity="full", **recompute,
    )  # fmt: skip
    model = gpt_family.build_model(config, LocalSpecProvider())
    pieces = gpt_family.pipeline_pieces(model)
    tokens = jnp.zeros((1, SEQ), jnp.int32)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    rows = {"layers": StackRows(jnp.arange(LAYERS), None)}
    batch = {"tokens": tokens, "labels": tokens, "position_ids": jnp.arange(SEQ)[None]}
    weights = jnp.ones((1, SEQ))
    chunk = ({"decoder": {"layers": params["decoder"]["layers"]}}, rows)
    x = jax.ShapeDtypeStruct((1, SEQ, HIDDEN), jnp.float32)
    kept = Residuals.of(pieces.blocks[0], chunk, x, Work(batch, weights, weights, None)).shapes
    assert sum(shape.size for shape in kept) <= LAYERS * (SEQ * HIDDEN + 3 * SEQ * SEQ)
