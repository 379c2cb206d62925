"""Index maps against Megatron's compiled helper and against a plain walk over the documents."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pathlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from megajax.data.helpers import build_index_maps, build_sample_idx, build_shuffle_index

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/mcore_dataset_helpers/outputs.npz")


def _walk(sizes, document_index, sequence_length, count, extra):
    """One document after another, as the C++ helper goes."""
    rows, position, offset = [(0, 0)], 0, 0
    while len(rows) <= count:
        remaining = sequence_length + extra
        while remaining:
            length = int(sizes[document_index[position]]) - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - extra
                remaining = 0
            elif position == len(document_index) - 1:
                offset = int(sizes[document_index[position]]) - extra
                break
            else:
                position, offset = position + 1, 0
        rows.append((position, offset))
    return np.array(rows)


@pytest.mark.parametrize("case", [name for name in GOLDEN.files if name.startswith("sample_idx")])
def test_sample_idx_equals_the_compiled_helper(case):
    match = re.fullmatch(r"sample_idx_s(\d+)_e(\d+)_drop(\d)_x(\d)", case)
    assert match is not None
    length, epochs, drop_last, extra = map(int, match.groups())
    sizes = GOLDEN["sizes"]
    document_index = np.tile(GOLDEN["document_indices"], epochs)
    rows = build_sample_idx(sizes, document_index, length, epochs, int(sizes.sum()), bool(drop_last), bool(extra))
    assert rows.dtype == GOLDEN[case].dtype
    np.testing.assert_array_equal(rows, GOLDEN[case])


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    length=st.integers(1, 15),
    epochs=st.integers(1, 4),
    drop_last=st.booleans(),
    extra=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sample_idx_equals_a_walk(sizes, length, epochs, drop_last, extra, seed):
    hypothesis.assume(sum(sizes) > 0)
    document_index = np.tile(np.random.RandomState(seed).permutation(len(sizes)), epochs).astype(np.int32)
    usable = epochs * sum(sizes) - extra
    count = usable // length if drop_last else -(-usable // length)
    rows = build_sample_idx(
        np.array(sizes, np.int32), document_index, length, epochs, sum(sizes), drop_last, add_extra_token=extra
    )
    np.testing.assert_array_equal(rows, _walk(sizes, document_index, length, count, int(extra)))


def test_published_vector():
    """Five documents, three epochs, the last one shuffled apart; values from the reference implementation."""
    maps = build_index_maps(
        np.array([5, 3, 8, 2, 6], np.int32), np.arange(5), num_samples=12, sequence_length=4, seed=1234
    )
    assert maps["document_index"].tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1]
    starts = [[0, 0], [0, 4], [1, 0], [1, 4], [2, 0], [2, 4], [3, 2], [4, 3], [6, 0], [6, 4], [7, 2], [8, 1], [10, 0]]
    starts += [[10, 4], [11, 3], [12, 1], [13, 3], [13, 7]]
    assert maps["sample_index"].tolist() == starts
    assert maps["shuffle_index"].tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6, 10, 16, 12, 15, 14, 11, 13]


def test_sample_count_of_huge_sets_is_rounded_in_float32():
    """When the last sample is kept the reference divides in float32, which has no 2^30 + 1."""
    tokens, length = 2**30 + 2, 2**20
    sizes = np.array([tokens], np.int32)
    assert len(build_sample_idx(sizes, np.zeros(1, np.int32), length, 1, tokens, drop_last=False)) - 1 == 2**10
    assert len(build_sample_idx(sizes, np.zeros(1, np.int32), length, 1, tokens, drop_last=True)) - 1 == 2**10
    assert (tokens - 1) / length > 2**10


def test_sample_idx_widens_to_int64():
    sizes = np.array([2**31 - 1, 7], np.int64)
    assert build_sample_idx(sizes, np.array([0, 1], np.int32), 2**20, 1, int(sizes.sum())).dtype == np.int32
    sizes[0] += 1
    rows = build_sample_idx(sizes, np.array([0, 1], np.int32), 2**20, 1, int(sizes.sum()))
    assert rows.dtype == np.int64
    assert rows[-1].tolist() == [1, 0]


def test_shuffle_keeps_the_final_epoch_last():
    order = build_shuffle_index(7, 10, np.random.RandomState(0))
    assert order.dtype == np.uint32
    assert sorted(order[:7]) == list(range(7))
    assert sorted(order[7:]) == [7, 8, 9]
