"""Relative positions of queries and keys, in buckets that grow with the distance (arXiv:1910.10683, section 2.1)."""

# SPDX-License-Identifier: Apache-2.0
# N heads, S query length, T key length, L distances
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """Bucket, int64, of each relative position, which is a key's index less the query's.

    Half of the buckets are for one distance each, the others for ranges up to `max_distance`, in logarithmic steps;
    what is further shares the last one. Bidirectional: half of all are for keys behind the query, the others for keys
    in front of it; otherwise keys in front of it share bucket 0 with the query itself. In NumPy, for the rounding of
    fp32 decides at the edges.
    """
    distance = -np.asarray(relative_position, np.int64)
    bucket = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += np.where(distance < 0, num_buckets, 0)
        distance = np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far_bucket = np.minimum(exact + far.astype(np.int64), num_buckets - 1)
    return bucket + np.where(distance < exact, distance, far_bucket)


def by_distance(values_NL: Array, S: int, T: int) -> Array:
    """values of the distances 1 - S .. T - 1, L = S + T - 1 -> [N, S, T], where query i and key j have that of j - i.

    By shifting rows, not by a gather, whose gradient would be a scatter of N S T numbers into few.
    """
    N, L = values_NL.shape
    # A row of period L + 1, read in steps of L, moves on by one to the left with each.
    rows = jnp.tile(jnp.pad(values_NL, ((0, 0), (0, 1))), (1, S))[:, : S * L].reshape(N, S, L)
    return rows[:, :, S - 1 : S - 1 + T]
