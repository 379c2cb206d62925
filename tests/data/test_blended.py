"""Blends against a literal copy of the greedy rule, and what a blend must preserve."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from megajax.config import ConfigError
from megajax.data.blended import (
    BlendedDataset,
    build_blending_indices,
    build_exhaustive_blending_indices,
    component_size,
    normalize,
)
from megajax.data.gpt_dataset import GPTDataset, GPTDatasetConfig
from megajax.data.indexed_dataset import InMemoryDataset


def _component(first: int, tokens: int) -> GPTDataset:
    memory = InMemoryDataset(
        f"from{first}", np.arange(first, first + tokens, dtype=np.int32), np.array([tokens]), fingerprint=str(first)
    )
    return GPTDataset(memory, np.arange(1), None, GPTDatasetConfig(sequence_length=2))


def _greedy(weights, size):
    """The C++ loop, statement by statement."""
    counts, chosen, samples = [0] * len(weights), [], []
    for n in range(size):
        position = max(float(n), 1.0)
        best, most = 0, weights[0] * position - counts[0]
        for i in range(1, len(weights)):
            lag = weights[i] * position - counts[i]
            if lag > most:
                best, most = i, lag
        chosen.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return chosen, samples


def test_published_vector():
    chosen, samples = build_blending_indices([0.5, 0.3, 0.2], 20)
    assert chosen.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert (chosen.dtype, samples.dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("components", [1, 2, 3, 24, 25, 40])
def test_greedy_rule(components):
    rng = np.random.default_rng(components)
    for weights in (normalize(rng.random(components) + 0.01), [1 / components] * components):
        chosen, samples = build_blending_indices(weights, 700)
        expected_chosen, expected_samples = _greedy(weights, 700)
        assert chosen.tolist() == expected_chosen
        assert samples.tolist() == expected_samples


def test_shares_stay_within_one_sample():
    weights = normalize([0.61, 0.29, 0.1])
    chosen, _ = build_blending_indices(weights, 5000)
    counts = np.cumsum(chosen[:, None] == np.arange(3), axis=0)
    assert np.abs(counts - np.outer(np.arange(1, 5001), weights)).max() < 1.5


def test_exhaustive_takes_everything_once():
    chosen, samples = build_exhaustive_blending_indices([5, 0, 3, 9])
    drawn = sorted(zip(chosen.tolist(), samples.tolist(), strict=True))
    assert drawn == [(i, j) for i, size in enumerate([5, 0, 3, 9]) for j in range(size)]
    # Where no component runs dry early, the order is the greedy one.
    assert build_exhaustive_blending_indices([6, 3])[0].tolist() == _greedy([2 / 3, 1 / 3], 9)[0]


def test_component_sizes_have_megatrons_surplus():
    assert [component_size(1000, w) for w in (0.5, 0.3, 0.2)] == [503, 302, 201]
    assert component_size(10, 0.25) == 4


def test_blended_dataset(tmp_path):
    parts = [_component(0, 41), _component(1000, 21)]
    for _ in range(2):
        blend = BlendedDataset(parts, [2.0, 1.0], 30, cache_path=tmp_path)
        firsts = [int(blend[i]["tokens"][0]) for i in range(30)]
        assert sum(first < 1000 for first in firsts) == 20
        assert len(set(firsts)) == len(blend) == 30
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(IndexError):
        blend[30]


def test_exhaustive_blended_dataset():
    blend = BlendedDataset([_component(0, 41), _component(1000, 21)], None, None)
    assert len({int(blend[i]["tokens"][0]) for i in range(len(blend))}) == 30
    frequencies = blend.token_frequencies(2000)
    assert frequencies.sum() == pytest.approx(1)
    assert frequencies[:41].sum() == pytest.approx(2 / 3)


def test_impossible_blends():
    with pytest.raises(ConfigError, match="from1000 has 10 samples, but the blend draws 15"):
        BlendedDataset([_component(0, 41), _component(1000, 21)], [0.5, 0.5], 30)
    with pytest.raises(ConfigError, match="needs its number of samples"):
        BlendedDataset([_component(0, 41)], [1.0], None)
    with pytest.raises(ConfigError, match="0 data sets"):
        BlendedDataset([], [], 3)
