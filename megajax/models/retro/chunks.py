"""How a sequence divides into chunks, and which of its tokens read the neighbours of which chunk."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, L chunks of a sequence, C = B L chunks, M tokens of a chunk, D hidden
import jax
import jax.numpy as jnp

Array = jax.Array


def num_chunks(seq_length: int, chunk_length: int) -> int:
    """L: chunks of a sequence. They are counted from its end: if one is short, it is the first."""
    return -(-seq_length // chunk_length)


def chunks(x_BSD: Array, chunk_length: int) -> Array:
    """The chunks of each sequence [C, M, D], those of the first sequence first. Zeros fill a short one at its end."""
    B, S, D = x_BSD.shape
    short = S % chunk_length
    if short:
        missing = jnp.zeros((B, chunk_length - short, D), x_BSD.dtype)
        x_BSD = jnp.concatenate([x_BSD[:, :short], missing, x_BSD[:, short:]], axis=1)
    return x_BSD.reshape(-1, chunk_length, D)


def readers(x_BSD: Array, chunk_length: int) -> Array:
    """For each chunk the tokens that read its neighbours [C, M, D]: its last one, and the next chunk but its last.

    What those tokens predict lies behind the chunk, and the neighbours are known once it is complete. Zeros follow the
    last token of all.
    """
    first = _first_reader(x_BSD.shape[1], chunk_length)
    x_BSD = jnp.pad(x_BSD[:, first:], ((0, 0), (0, chunk_length - 1), (0, 0)))
    return x_BSD.reshape(-1, chunk_length, x_BSD.shape[-1])


def in_sequence(y_CMD: Array, batch: int, seq_length: int) -> Array:
    """The inverse of `readers`: [B, S, D], with zeros for the tokens before the end of the first chunk."""
    first = _first_reader(seq_length, y_CMD.shape[1])
    y_BSD = y_CMD.reshape(batch, -1, y_CMD.shape[-1])
    return jnp.pad(y_BSD, ((0, 0), (first, 0), (0, 0)))[:, :seq_length]


def places_of_readers(batch: int, seq_length: int, chunk_length: int) -> Array:
    """Where `readers` stand, counted from the start of their chunk: int [C, M], or [1, M] if all chunks are whole."""
    M, short = chunk_length, seq_length % chunk_length
    if not short:
        return jnp.arange(M - 1, 2 * M - 1)[None]
    ends_L = jnp.array([short, *[M] * (num_chunks(seq_length, M) - 1)])
    return jnp.tile(ends_L[:, None] - 1 + jnp.arange(M), (batch, 1))


def _first_reader(seq_length: int, chunk_length: int) -> int:
    return (seq_length - 1) % chunk_length
