"""What happens to a batch on the host, between the loader and the devices."""

# SPDX-License-Identifier: Apache-2.0
# S sequence
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from megajax.config import ParallelConfig
from megajax.parallel.token_order import zigzag_indices


def document_mask(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The loss mask, fp32, with the last token of each packed document left out: its label begins another document."""
    mask = np.asarray(batch["loss_mask"], np.float32)
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        return mask
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    return mask * np.concatenate([same, np.ones_like(same[..., :1])], axis=-1)


def prepare_batch(
    batch: Mapping[str, np.ndarray],
    parallel: ParallelConfig,
    axes_of: Callable[[str], tuple[str | None, ...]] = lambda name: ("batch", "seq"),
) -> dict[str, np.ndarray]:
    """The arrays as the model gets them: documents masked, sequences in the order that the mesh wants.

    axes_of: array name -> the logical axes of its dims.
    """
    prepared = {**batch, "loss_mask": document_mask(batch)}
    if not parallel.zigzag:
        return prepared

    def in_order(name: str, array: np.ndarray) -> np.ndarray:
        axes = axes_of(name)
        if "seq" not in axes:
            return array
        dim = axes.index("seq") - len(axes)
        return np.take(array, zigzag_indices(array.shape[dim], parallel.ring_size), axis=dim)

    return {name: in_order(name, array) for name, array in prepared.items()}
