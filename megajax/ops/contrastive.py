"""Losses of pairs: row i of the one side goes with row i of the other."""

# SPDX-License-Identifier: Apache-2.0
# B pairs
import jax
import jax.numpy as jnp

Array = jax.Array


def softmax_losses(logits_BB: Array) -> Array:
    """Cross entropy of finding the other half of each pair, mean of both directions: fp32 [B] (arXiv:2103.00020)."""
    right = jnp.sum(logits_BB * jnp.eye(len(logits_BB)), axis=1)
    by_row, by_column = (jax.nn.logsumexp(logits_BB, axis=axis) - right for axis in (1, 0))
    return (by_row + by_column) / 2


def sigmoid_losses(logits_BB: Array) -> Array:
    """Every pairing judged by itself, right or wrong; sums over the other side: fp32 [B] (arXiv:2303.15343)."""
    sign = 2.0 * jnp.eye(len(logits_BB)) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(sign * logits_BB), axis=0)
