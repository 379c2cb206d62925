"""What a batch goes through on the host."""

# SPDX-License-Identifier: Apache-2.0
import numpy as np

from megajax.config import ParallelConfig
from megajax.training.batches import document_mask, prepare_batch


def test_document_mask_leaves_out_the_last_token_of_each_document() -> None:
    mask = np.array([[1, 1, 1, 1, 0, 1]], np.float32)
    segments = np.array([[1, 1, 2, 2, 2, 3]])
    masked = document_mask({"loss_mask": mask, "segment_ids": segments})
    np.testing.assert_array_equal(masked, [[1, 0, 1, 1, 0, 1]])
    np.testing.assert_array_equal(document_mask({"loss_mask": mask}), mask)


def test_a_ring_gets_the_first_and_the_last_chunk_on_one_device() -> None:
    tokens = np.arange(8)[None]
    batch = {"tokens": tokens, "loss_mask": np.ones((1, 8)), "segment_ids": np.array([[1, 1, 1, 1, 1, 2, 2, 2]])}
    ring = prepare_batch(batch, ParallelConfig(context_parallel_size=2))
    np.testing.assert_array_equal(ring["tokens"], [[0, 1, 6, 7, 2, 3, 4, 5]])
    # documents end where they ended before the tokens moved
    np.testing.assert_array_equal(ring["loss_mask"], [[1, 1, 1, 1, 1, 1, 0, 1]])
    whole = prepare_batch(batch, ParallelConfig(context_parallel_size=2, cp_comm_type="all_gather"))
    np.testing.assert_array_equal(whole["tokens"], tokens)
