"""Blends: samples drawn from several data sets in given proportions, in Megatron's order."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.data.gpt_dataset import GPTDataset, Sample
from megajax.data.index_cache import load_or_build

SURPLUS = 0.005
"""Each component is built this much larger than its share, since the blend may draw a little more than that."""
SCALAR_LOOP_UP_TO = 24
"""Components up to which plain floats beat numpy in the greedy loop."""


def component_size(target: int, weight: float) -> int:
    """Samples to build of a component with this normalised weight in a blend of `target` samples."""
    return math.ceil(math.ceil(target * weight) * (1 + SURPLUS))


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, in float64 as numpy sums."""
    array = np.array(weights, np.float64)
    return (array / array.sum()).tolist()


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which data set each of `size` samples comes from, int16, and which of its samples, int64.

    Greedy, as `build_blending_indices` of `megatron/core/datasets/helpers.cpp`: sample n comes from the data set that
    lags its share `weight * max(n, 1)` most; the lowest number wins a tie. Every choice depends on the ones before,
    so this is a loop: about 1 second for a million samples of three data sets, and the result is cached on disk.
    """
    chosen = _greedy_few(list(weights), size) if len(weights) <= SCALAR_LOOP_UP_TO else _greedy_many(weights, size)
    return chosen, occurrence(chosen, len(weights))


def _greedy_few(weights: list[float], size: int) -> np.ndarray:
    chosen = bytearray(size)
    counts = [0] * len(weights)
    numbered = list(enumerate(weights))
    for n in range(size):
        position = n or 1
        best, most = 0, -math.inf
        for i, weight in numbered:
            lag = weight * position - counts[i]
            if lag > most:
                best, most = i, lag
        chosen[n] = best
        counts[best] += 1
    return np.frombuffer(chosen, np.uint8).astype(np.int16)


def _greedy_many(weights: Sequence[float], size: int) -> np.ndarray:
    chosen = np.zeros(size, np.int16)
    array, counts = np.array(weights, np.float64), np.zeros(len(weights), np.float64)
    lag = np.empty_like(array)
    for n in range(size):
        np.multiply(array, n or 1, out=lag)
        np.subtract(lag, counts, out=lag)
        chosen[n] = best = int(lag.argmax())
        counts[best] += 1
    return chosen


def build_exhaustive_blending_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Like `build_blending_indices` with the sizes as weights, but every sample of every data set occurs once."""
    total = sum(sizes)
    weights = [size / total for size in sizes]
    counts = [0] * len(sizes)
    chosen = np.zeros(total, np.int16)
    unused = [i for i, size in enumerate(sizes) if size]
    for n in range(total):
        position = float(n or 1)
        best = max(unused, key=lambda i: weights[i] * position - counts[i])  # the first of equals, as in C++
        chosen[n] = best
        counts[best] += 1
        if counts[best] == sizes[best]:
            unused.remove(best)
    return chosen, occurrence(chosen, len(sizes))


def occurrence(chosen: np.ndarray, count: int) -> np.ndarray:
    """int64: how often each entry's value occurred before it."""
    before = np.zeros(len(chosen), np.int64)
    for value in range(count):
        at = np.flatnonzero(chosen == value)
        before[at] = np.arange(len(at))
    return before


class BlendedDataset:
    """Samples of several data sets in proportion to their weights (`megatron/core/datasets/blended_dataset.py`).

    Args:
      datasets: the components; each long enough for its share.
      weights: their proportions; None weights them by their sizes.
      size: samples in all; None takes every sample of every component once, which needs `weights=None`.
      cache_path: folder that keeps the order between runs.

    Raises:
      ConfigError: a component is too short for its share.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float] | None,
        size: int | None,
        *,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        if not 0 < len(datasets) < np.iinfo(np.int16).max:
            raise ConfigError(f"data names {len(datasets)} data sets; a blend takes 1 to {np.iinfo(np.int16).max - 1}")
        if size is None and weights is not None:
            raise ConfigError("a blend with weights needs its number of samples")
        self.datasets = list(datasets)
        sizes = [len(dataset) for dataset in datasets]
        self.weights = normalize(sizes if weights is None else weights)
        key: dict[str, Any] = {
            "components": [dataset.cache_key for dataset in datasets],
            "weights": self.weights,
            "size": size,
        }
        self.cache_key = key
        self.index = load_or_build(cache_path, "blend", key, lambda: self._build(sizes, size))
        for i, length in enumerate(sizes):
            drawn = int(np.count_nonzero(self.index["dataset_index"] == i))
            if drawn > length:
                raise ConfigError(
                    f"data={datasets[i].tokens.name} has {length} samples, but the blend draws {drawn} of them;"
                    " build the component larger"
                )

    def _build(self, sizes: list[int], size: int | None) -> dict[str, np.ndarray]:
        if size is None:
            dataset_index, sample_index = build_exhaustive_blending_indices(sizes)
        else:
            dataset_index, sample_index = build_blending_indices(self.weights, size)
        return {"dataset_index": dataset_index, "dataset_sample_index": sample_index}

    def __len__(self) -> int:
        return len(self.index["dataset_index"])

    def __getitem__(self, index: int) -> Sample:
        """The sample, as `GPTDataset` gives it."""
        dataset, index = self.component_of(range(len(self))[index])
        return dataset[index]

    def component_of(self, index: int) -> tuple[GPTDataset, int]:
        """The data set that a sample is from, and its number there."""
        dataset = self.datasets[int(self.index["dataset_index"][index])]
        return dataset, int(self.index["dataset_sample_index"][index])

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size]: the share of each token id in the blend."""
        parts = [w * d.token_frequencies(vocab_size) for w, d in zip(self.weights, self.datasets, strict=True)]
        return np.sum(parts, axis=0)
