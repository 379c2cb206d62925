"""In which order the tokens of a sequence lie that the mesh divides, and which of them are here."""

# SPDX-License-Identifier: Apache-2.0
# S sequence
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from megajax.config import ConfigError
from megajax.parallel.mesh import CP
from megajax.parallel.replicas import axes_apart, parts_apart

Array = jax.Array


def zigzag_indices(S: int, shards: int) -> np.ndarray:
    """The order of tokens that balances causal attention: the token's index for each of the S rows.

    The sequence is cut into 2 `shards` chunks; shard i holds chunks i and 2 shards - 1 - i. `shards` is the size of the
    axis `cp` alone (`ParallelConfig.ring_size`). Megatron: `get_batch_on_this_cp_rank`.

    Raises:
      ConfigError: S does not divide.
    """
    if shards == 1:
        return np.arange(S)
    require_divides(S, 2 * shards, "twice the p2p or all_gather part of context_parallel_size")
    chunks = np.arange(S).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[shards:][::-1]], axis=1).reshape(-1)


def zigzag_inverse(S: int, shards: int) -> np.ndarray:
    """The row of each token: `x[zigzag_indices(...)][zigzag_inverse(...)]` is x."""
    return np.argsort(zigzag_indices(S, shards))


def sequence_order(S: int) -> np.ndarray | None:
    """The index of the token in each of S rows, on the mesh in context; None where they lie in order."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    if mesh.empty or not (rules.get("zigzag") or axes_apart("zigzag")):
        return None
    return zigzag_indices(S, mesh.shape[CP])


def tokens_here(S: int) -> Array | None:
    """The index of the token in each row that is here, of a sequence of S; None where all are, in order.

    Where replicas have parts of a sequence and are traced by themselves, these are fewer than S.
    """
    order, axes = sequence_order(S), axes_apart("seq")
    if not axes:
        return None if order is None else jnp.asarray(order)
    count = S // parts_apart("seq")
    order = jnp.asarray(np.arange(S) if order is None else order)
    return jax.lax.dynamic_slice_in_dim(order, jax.lax.axis_index(axes) * count, count)


def require_divides(length: int, shards: int, of_what: str) -> None:
    """Raises ConfigError."""
    if length % shards:
        raise ConfigError(
            f"a sequence of {length} tokens is not divisible by {shards} ({of_what}, see cp_comm_type); change"
            " seq_length or context_parallel_size"
        )
