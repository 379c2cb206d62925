"""Index maps of GPT data sets, bit-equal to Megatron's and vectorised: documents, samples, shuffle, blends."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

SEPARATE_FINAL_EPOCH_BELOW = 0.80
"""A final epoch that gives fewer than this part of its samples is shuffled apart, so none is drawn too often."""


def build_index_maps(
    sequence_lengths: np.ndarray,
    documents: np.ndarray,
    *,
    num_samples: int | None,
    sequence_length: int,
    seed: int,
    add_extra_token: bool = True,
    drop_last: bool = True,
) -> dict[str, np.ndarray]:
    """The three maps of `megatron/core/datasets/gpt_dataset.py`, from one numpy RandomState(seed) in its order.

    Sample i of a data set is the tokens from row `shuffle_index[i]` of `sample_index` to the row after it.

    Args:
      sequence_lengths: int32[S] of the whole store.
      documents: the sequence numbers that this split uses.
      num_samples: at least this many samples, by as many epochs as that takes; None is one epoch.
      add_extra_token: samples are sequence_length + 1 tokens, sharing one with their successor.
      drop_last: leave out a last sample that the tokens do not fill.

    Returns:
      document_index: int32, sequence numbers in the order their tokens are laid out, all epochs.
      sample_index: [N + 1, 2] of (position in document_index, token offset in that sequence).
      shuffle_index: [N], the sample that is i-th in training order.
    """
    extra = int(add_extra_token)
    per_epoch = int(np.sum(sequence_lengths[documents], dtype=np.int64))
    epochs = num_epochs(per_epoch, num_samples, sequence_length, extra)
    before_final = ((epochs - 1) * per_epoch - extra) // sequence_length
    separate = False
    if epochs > 1 and num_samples is not None:
        samples_per_epoch = (per_epoch - extra) // sequence_length
        separate = num_samples - before_final < int(SEPARATE_FINAL_EPOCH_BELOW * samples_per_epoch)
    random = np.random.RandomState(seed)
    document_index = build_document_index(documents, epochs, random, separate)
    sample_index = build_sample_idx(
        sequence_lengths, document_index, sequence_length, epochs, per_epoch, drop_last, add_extra_token
    )
    total = len(sample_index) - 1
    shuffle_index = build_shuffle_index(before_final if separate else total, total, random)
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def num_epochs(tokens_per_epoch: int, num_samples: int | None, sequence_length: int, extra: int) -> int:
    """The fewest epochs that hold `num_samples` samples."""
    if num_samples is None:
        return 1
    return max(1, -(-(num_samples * sequence_length + extra) // tokens_per_epoch))


def build_document_index(
    documents: np.ndarray, epochs: int, random: np.random.RandomState, separate_final_epoch: bool
) -> np.ndarray:
    """int32 `documents` repeated `epochs` times and shuffled, the final epoch by itself if asked."""
    if separate_final_epoch and epochs > 1:
        first = build_document_index(documents, epochs - 1, random, False)
        return np.concatenate([first, build_document_index(documents, 1, random, False)])
    index = np.tile(documents.astype(np.int32), epochs)
    random.shuffle(index)
    return index


def build_sample_idx(
    sizes: np.ndarray,
    document_index: np.ndarray,
    sequence_length: int,
    epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    add_extra_token: bool = True,
) -> np.ndarray:
    """Where each sample starts, [N + 1, 2] of (position in document_index, token offset): `build_sample_idx` of
    `megatron/core/datasets/helpers.cpp`, which walks the documents; here the walk is one binary search.

    int32, or int64 where positions or offsets could exceed it.
    """
    extra = int(add_extra_token)
    usable = epochs * tokens_per_epoch - extra
    # The reference divides in float32 when it keeps the last sample, so large sets are off by some samples; so is this.
    count = usable // sequence_length if drop_last else int(np.ceil(np.float32(usable) / np.float32(sequence_length)))
    lengths = sizes[document_index].astype(np.int64)
    ends = np.cumsum(lengths)
    starts = np.arange(count + 1, dtype=np.int64) * sequence_length
    # A sample starts inside the document of the last token that its predecessor read: with the extra token that is
    # the shared one, without it the one before, and then the offset may be the document's length.
    row_document = np.searchsorted(ends, starts - (1 - extra), side="right")
    last = len(document_index) - 1
    past_end = row_document > last
    row_document = np.minimum(row_document, last)
    row_offset = starts - (ends[row_document] - lengths[row_document])
    row_offset[past_end] = lengths[last] - extra
    row_document[0] = row_offset[0] = 0
    largest = max(len(document_index), int(sizes.max()))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    return np.stack([row_document, row_offset], axis=1).astype(dtype)


def build_shuffle_index(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """A permutation of `total` samples, uint32 (int64 for sets beyond it), that keeps the first `first` in front."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    head = np.arange(first, dtype=dtype)
    random.shuffle(head)
    if first == total:
        return head
    tail = np.arange(first, total, dtype=dtype)
    random.shuffle(tail)
    return np.concatenate([head, tail])
