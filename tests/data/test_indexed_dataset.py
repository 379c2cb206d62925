"""Megatron's `.bin/.idx`: read and written byte for byte, complete or not at all, damage named."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from megajax.config import ConfigError
from megajax.data.indexed_dataset import DTYPES, HEADER, IndexedDataset, IndexedDatasetBuilder, best_dtype

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/mcore_dataset_indexed"
OUTPUTS = np.load(GOLDEN / "outputs.npz")
SEQUENCES = [OUTPUTS[f"seq_{i}"] for i in range(9)]


def _write(prefix, dtype) -> None:
    """The golden documents, some of several sequences."""
    bounds = OUTPUTS["document_indices"]
    with IndexedDatasetBuilder(prefix, dtype=dtype) as builder:
        for document, (first, last) in enumerate(itertools.pairwise(bounds)):
            sequences = SEQUENCES[first:last]
            if document % 2:
                for sequence in sequences:
                    builder.add_item(sequence)
                builder.end_document()
            else:
                builder.add_document(np.concatenate(sequences), [len(sequence) for sequence in sequences])
        builder.finalize()


def _same_files(a, b) -> bool:
    return all(
        pathlib.Path(f"{a}{end}").read_bytes() == pathlib.Path(f"{b}{end}").read_bytes() for end in (".bin", ".idx")
    )


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_files_are_megatrons(tmp_path, dtype):
    _write(tmp_path / "mine", dtype)
    assert _same_files(tmp_path / "mine", GOLDEN / f"data_{dtype}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.bin", "mine.idx"]


def test_merge_is_megatrons(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "merged.bin", dtype=np.uint16) as builder:
        builder.add_index(GOLDEN / "data_uint16")
        builder.add_index(GOLDEN / "data_uint16.idx")
        builder.finalize()
    assert _same_files(tmp_path / "merged", GOLDEN / "merged")


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_reads_megatrons_files(dtype, suffix):
    dataset = IndexedDataset(f"{GOLDEN}/data_{dtype}{suffix}")
    assert len(dataset) == 9
    assert dataset.dtype == dtype
    np.testing.assert_array_equal(dataset.sequence_lengths, OUTPUTS["sequence_lengths"])
    np.testing.assert_array_equal(dataset.document_indices, OUTPUTS["document_indices"])
    if dtype == "uint16":
        np.testing.assert_array_equal(dataset.sequence_pointers, OUTPUTS["sequence_pointers"])
    for i, sequence in enumerate(SEQUENCES):
        np.testing.assert_array_equal(dataset[i], sequence)
    np.testing.assert_array_equal(dataset[-1], SEQUENCES[-1])
    assert [len(sequence) for sequence in dataset[2:8:3]] == [10, 5]
    np.testing.assert_array_equal(dataset.get(2, 1, 2), SEQUENCES[2][1:3])
    np.testing.assert_array_equal(dataset.get(2, 7), SEQUENCES[2][7:])
    with pytest.raises(IndexError):
        dataset[9]


@pytest.mark.parametrize("code", list(DTYPES))
def test_every_dtype_code_survives(tmp_path, code):
    sequences = [np.array([1, 2, 100]), np.array([], int), np.array([7])]
    with IndexedDatasetBuilder(tmp_path / "x", dtype=DTYPES[code]) as builder:
        for sequence in sequences:
            builder.add_document(sequence, [len(sequence)])
        builder.finalize()
    dataset = IndexedDataset(tmp_path / "x")
    assert HEADER.unpack((tmp_path / "x.idx").read_bytes()[: HEADER.size])[2] == code
    assert dataset.dtype == DTYPES[code]
    assert [sequence.tolist() for sequence in dataset[:]] == [[1, 2, 100], [], [7]]


def test_modes(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a", dtype=np.int32, multimodal=True) as builder:
        builder.add_item([1, 2], mode=1)
        builder.add_item([3])
        builder.end_document()
        builder.add_document([4, 5], [1, 1], [0, 1])
        builder.finalize()
    with IndexedDatasetBuilder(tmp_path / "b", dtype=np.int32, multimodal=True) as builder:
        builder.add_index(tmp_path / "a")
        builder.add_index(tmp_path / "a")
        builder.finalize()
    modes = IndexedDataset(tmp_path / "b").sequence_modes
    assert modes is not None
    assert modes.tolist() == [1, 0, 0, 1] * 2


def test_pickle_opens_the_files_again():
    dataset = IndexedDataset(GOLDEN / "data_int32")
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[2], dataset[2])


def test_empty_dataset(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "empty") as builder:
        builder.finalize()
    dataset = IndexedDataset(tmp_path / "empty")
    assert len(dataset) == 0
    assert dataset.document_indices.tolist() == [0]


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "x") as builder:  # noqa: PT012
        builder.add_document([1, 2], [2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_files(tmp_path):
    _write(tmp_path / "x", "int32")
    with pytest.raises(ConfigError, match="token id 70000 does not fit uint16"):  # noqa: SIM117
        with IndexedDatasetBuilder(tmp_path / "x", dtype=np.uint16) as builder:
            builder.add_document([70000], [1])
    assert _same_files(tmp_path / "x", GOLDEN / "data_int32")


def test_wrong_lengths_are_refused(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "x") as builder, pytest.raises(ValueError, match="sum to 3"):
        builder.add_document([1, 2], [3])


def test_merging_other_dtypes_is_refused(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "x", dtype=np.int32) as builder, pytest.raises(ConfigError, match="uint16"):
        builder.add_index(GOLDEN / "data_uint16")


def test_dtype_by_vocabulary():
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == best_dtype(None) == np.int32
    with pytest.raises(ConfigError, match="dtype=complex64 cannot be stored"):
        IndexedDatasetBuilder("x", dtype=np.complex64)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        IndexedDatasetBuilder(tmp_path / "file" / "x")


def _damage(path: pathlib.Path, start: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(new)] = new
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "x.idx").unlink(), r"x\.idx cannot be read: No such file"),
        (lambda p: (p / "x.bin").unlink(), r"x\.bin cannot be read: No such file"),
        (lambda p: (p / "x.idx").write_bytes(b""), r"x\.idx is not a Megatron index file"),
        (lambda p: (p / "x.idx").write_bytes(b"hello" * 20), r"x\.idx is not a Megatron index file"),
        (lambda p: _damage(p / "x.idx", 9, b"\x02"), "format version 2"),
        (lambda p: _damage(p / "x.idx", 17, b"\x63"), "dtype code 99"),
        (
            lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:-3]),
            r"x\.idx holds \d+ bytes, but its header",
        ),
        (
            lambda p: (p / "x.bin").write_bytes((p / "x.bin").read_bytes()[:-1]),
            r"x\.bin holds \d+ bytes, but its index",
        ),
        (lambda p: _damage(p / "x.idx", 34, b"\xff\xff\xff\xff"), "impossible lengths"),
        (lambda p: _damage(p / "x.idx", 34 + 9 * 4, b"\x01"), "impossible lengths or offsets"),
        (lambda p: _damage(p / "x.idx", 34 + 9 * 12, b"\x01"), "documents do not cover"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"data_int32{suffix}", tmp_path / f"x{suffix}")
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        IndexedDataset(tmp_path / "x")
    assert "\n" not in str(error.value)
