"""The listing of a checkpoint against the state that was saved."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from megajax.checkpoint import CheckpointError, CheckpointStore, format_rows, inspect
from megajax.config import CheckpointConfig


def test_rows_are_the_logical_leaves(tmp_path, make_state, axes):
    config = CheckpointConfig(async_save=False)
    model = {"vocab_size": 37}
    with CheckpointStore.open(tmp_path, config, family="gpt", model_config=model, logical_axes=axes) as store:
        store.save(4, make_state(1), {})
        store.save(8, make_state(2), {})
    rows = {row.path: row for row in inspect(tmp_path)}
    assert next(iter(rows)) == "step"  # the order of the state
    embedding = rows["opt_state/0/mu/embedding/word_embeddings/embedding"]
    assert (embedding.step, embedding.shape, embedding.dtype, embedding.bytes, embedding.axes) == (
        8,
        (37, 16),
        "float32",
        37 * 16 * 4,
        ("vocab", "embed"),
    )
    assert (rows["half/bf16"].dtype, rows["half/bf16"].bytes) == ("bfloat16", 48)
    assert (rows["loss_scale"].dtype, rows["loss_scale"].bytes) == ("none", 0)
    assert rows["rng"].dtype == "uint32"
    assert {row.step for row in inspect(tmp_path, step=4)} == {4}
    text = format_rows(list(rows.values()))
    assert len(text.splitlines()) == len(rows) + 1
    assert "float32[37,16]" in text
    assert "(vocab, embed)" in text
    with pytest.raises(CheckpointError, match="has no step 5; it has 4, 8"):
        inspect(tmp_path, step=5)
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "absent")
