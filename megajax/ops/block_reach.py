"""Which blocks of keys the blocks of queries may see, so that attention skips the others; what tells documents apart.

Found before a kernel runs, from indices and the smallest and largest segment id of each block: a table of one bit for
each pair of blocks, of which only the first and last of each row or column are kept.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, I blocks of queries, J blocks of keys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.ops.attention import AttentionMask

Array = jax.Array

_HIDDEN_KEY, _NO_QUERY = -(2**31), -(2**31) + 1
"""Segment ids of hidden keys, and of rows that fill up a block of queries: equal to no other."""
_LARGEST = 2**31 - 1


class SegmentIds(NamedTuple):
    """int32 [1 or B, S] and [1 or B, T]: a query sees no key of another id."""

    queries: Array
    keys: Array


def segment_ids(mask: AttentionMask, lengths: tuple[int, int], filled: tuple[int, int]) -> SegmentIds | None:
    """Documents, `keep` and the rows that fill up blocks, as one: None if every query sees every key.

    Args:
      mask: `keep` is of keys, [1 or B, 1, 1, 1 or T].
      lengths: S and T. filled: as they are after whole blocks are made of them.
    """
    (S, T), (S_filled, T_filled) = lengths, filled
    q_ids, k_ids = mask.q_segment_ids, mask.kv_segment_ids
    if q_ids is None or k_ids is None:
        if mask.keep is None and T_filled == T:
            return None
        q_ids, k_ids = jnp.zeros((1, S), jnp.int32), jnp.zeros((1, T), jnp.int32)
    if mask.keep is not None:
        k_ids = jnp.where(mask.keep[:, 0, 0], k_ids, _HIDDEN_KEY)
    return SegmentIds(
        jnp.pad(q_ids.astype(jnp.int32), ((0, 0), (0, S_filled - S)), constant_values=_NO_QUERY),
        jnp.pad(k_ids.astype(jnp.int32), ((0, 0), (0, T_filled - T)), constant_values=_HIDDEN_KEY),
    )


def visible_blocks(
    mask: AttentionMask, ids: SegmentIds | None, lengths: tuple[int, int], blocks: tuple[int, int]
) -> Any:
    """bool [1 or B, I, J]: whether any of these queries may see any of these keys; some may be True in vain.

    An array of numpy where indices alone decide, and are known.

    Args:
      lengths: S and T, whole blocks. blocks: queries and keys of a block.
    """
    xp = np if isinstance(mask.start, int) else jnp
    q_first, k_first = (np.arange(0, length, block) for length, block in zip(lengths, blocks, strict=True))
    before = k_first[None, :] - (q_first[:, None] + mask.start)  # distance from the first query to the first key
    nearest, farthest = before - (blocks[0] - 1), before + (blocks[1] - 1)
    left, right = mask.window or (-1, -1)
    visible = xp.ones(before.shape, bool)
    if mask.causal:
        visible &= nearest <= 0
    if left >= 0:
        visible &= farthest >= -left
    if right >= 0:
        visible &= nearest <= right
    if ids is None:
        return visible[None]
    (q_low, q_high), (k_low, k_high) = (_range(x, block) for x, block in zip(ids, blocks, strict=True))
    return visible[None] & (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])


def _range(ids: Array, block: int) -> tuple[Array, Array]:
    """The smallest and the largest id of each block, but for those that are equal to no other."""
    ids = ids.reshape(ids.shape[0], -1, block)
    real = ids > _NO_QUERY
    return jnp.where(real, ids, _LARGEST).min(-1), jnp.where(real, ids, _HIDDEN_KEY).max(-1)


def reach(visible: Any, offset: Array | int) -> Array:
    """int32 [1 or B, I, 3] of [1 or B, I, J]: the first visible block of J, the one after the last, the offset."""
    xp = np if isinstance(visible, np.ndarray) else jnp
    J = visible.shape[-1]
    first = xp.where(visible, xp.arange(J), J).min(-1)
    end = xp.where(visible, xp.arange(1, J + 1), 0).max(-1)
    return jnp.stack([first, end, jnp.broadcast_to(offset, first.shape)], axis=-1).astype(jnp.int32)


def pairs_of(mask: AttentionMask, lengths: tuple[int, int], blocks: tuple[int, int]) -> int:
    """How many pairs of a query and a key are in blocks that are visible, if all is one document. Where the offset is
    known only when the program runs, no fewer than the mean of all places that a part of a sequence may have.
    """
    if isinstance(mask.start, int):
        return int(visible_blocks(mask, None, lengths, blocks).sum()) * blocks[0] * blocks[1]
    (S, T), (left, right) = lengths, mask.window or (-1, -1)
    past = T // 2 if left < 0 else min(left + 1, T // 2)
    future = 0 if mask.causal else T // 2 if right < 0 else min(right, T // 2)
    return S * (past + future)
