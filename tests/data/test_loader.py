"""The loader hands out data set order exactly: any batch sizes, any resume point, any processes or workers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from megajax.config import ConfigError
from megajax.data.gpt_dataset import GPTDataset, GPTDatasetConfig
from megajax.data.indexed_dataset import InMemoryDataset
from megajax.data.loader import EvaluationLoader, Loader, ProcessRows

LENGTH, SAMPLES = 8, 60


def _dataset(bad_token: int | None = None) -> GPTDataset:
    """Every sample has its own tokens, so a batch says which samples it holds."""
    tokens = np.arange(SAMPLES * LENGTH + 1, dtype=np.int32)
    if bad_token is not None:
        tokens[bad_token] = 10**6
    memory = InMemoryDataset("memory", tokens, np.array([len(tokens)]), fingerprint="memory")
    config = GPTDatasetConfig(sequence_length=LENGTH, eod=5, vocab_size=10**5, reset_attention_mask=True)
    return GPTDataset(memory, np.arange(1), None, config)


DATASET = _dataset()
EXPECTED = np.stack([DATASET[i]["tokens"] for i in range(SAMPLES)])
SIZES = [2, 2, 4, 4, 4, 2, 8, 8, 6]


def _read(loader: Loader, sizes: list[int]) -> np.ndarray:
    return np.concatenate([loader.next_batch(size)["tokens"] for size in sizes])


def test_batches_are_whole_samples_in_order():
    loader = Loader(DATASET)
    batch = loader.next_batch(3)
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "tokens": ((3, LENGTH), "int32"),
        "labels": ((3, LENGTH), "int32"),
        "loss_mask": ((3, LENGTH), "float32"),
        "position_ids": ((3, LENGTH), "int32"),
        "segment_ids": ((3, LENGTH), "int32"),
    }
    for row in range(3):
        for name, array in batch.items():
            np.testing.assert_array_equal(array[row], DATASET[row][name])
    np.testing.assert_array_equal(_read(loader, SIZES), EXPECTED[3 : 3 + sum(SIZES)])
    assert loader.consumed_samples == 3 + sum(SIZES)


@pytest.mark.parametrize("stop", range(len(SIZES) + 1))
def test_resume_is_exact_while_the_batch_size_changes(stop):
    first = Loader(DATASET)
    _read(first, SIZES[:stop]) if stop else None
    state = json.loads(json.dumps(first.state()))
    second = Loader(DATASET)
    second.next_batch(5)
    second.restore(state)
    start = sum(SIZES[:stop])
    assert second.consumed_samples == start
    np.testing.assert_array_equal(_read(second, [*SIZES[stop:], 2]), EXPECTED[start : sum(SIZES) + 2])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_each_microbatch(count):
    """Row j of a global batch belongs to microbatch j // 4, whoever reads it."""
    sizes = [4, 4, 8, 16, 16]
    own = np.arange(4).reshape(count, -1)
    loaders = [Loader(DATASET, process_rows=ProcessRows(tuple(rows), 4)) for rows in own.tolist()]
    at = 0
    for size in sizes:
        parts = [loader.next_batch(size)["tokens"].reshape(size // 4, 4 // count, LENGTH) for loader in loaders]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1).reshape(size, LENGTH), EXPECTED[at : at + size])
        at += size
    elastic = Loader(DATASET)
    elastic.restore(loaders[-1].state())
    np.testing.assert_array_equal(elastic.next_batch(3)["tokens"], EXPECTED[at : at + 3])


def test_worker_processes_keep_the_order():
    loader = Loader(DATASET, num_workers=2)
    try:
        np.testing.assert_array_equal(_read(loader, [4] * 7), EXPECTED[:28])
        state = loader.state()
        loader.next_batch(4)
        loader.restore(state)
        np.testing.assert_array_equal(loader.next_batch(2)["tokens"], EXPECTED[28:30])
    finally:
        loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_data_reach_the_caller(num_workers):
    loader = Loader(_dataset(bad_token=100), num_workers=num_workers)
    with pytest.raises(ConfigError, match="holds token id 1000000"):
        _read(loader, [4] * 15)
    loader.close()


def test_the_end_is_an_error_not_a_wrap():
    loader = Loader(DATASET)
    loader.restore({"consumed_samples": SAMPLES - 5})
    np.testing.assert_array_equal(_read(loader, [4]), EXPECTED[-5:-1])
    with pytest.raises(ConfigError, match="built with 60 samples and 59 are consumed"):
        loader.next_batch(4)
    np.testing.assert_array_equal(_read(loader, [1]), EXPECTED[-1:])


@pytest.mark.parametrize("state", [{}, {"consumed_samples": SAMPLES + 1}, {"consumed_samples": "4"}])
def test_foreign_state_is_refused(state):
    with pytest.raises(ConfigError, match="saved data position"):
        Loader(DATASET).restore(state)


def test_parts_of_microbatches_are_refused():
    with pytest.raises(ConfigError, match="batch of 3 samples is no multiple of the 2 of a microbatch"):
        Loader(DATASET, process_rows=ProcessRows((0,), 2)).next_batch(3)


def test_evaluation_starts_over():
    loader = EvaluationLoader(DATASET, batch_size=4, num_batches=3, process_rows=ProcessRows((2, 3), 4))
    runs = [np.concatenate([batch["tokens"] for batch in loader]) for _ in range(2)]
    expected = EXPECTED[:12].reshape(3, 2, 2, LENGTH)[:, 1].reshape(6, LENGTH)
    assert len(loader) == 3
    for run in runs:
        np.testing.assert_array_equal(run, expected)
