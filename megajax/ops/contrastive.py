"""Losses of pairs, each of which has to tell its other half from those of all other pairs.

They take the pairs that are here, B of all P, the first of them at index `first`: how well the image of each agrees
with every text, and its text with every image.
"""

# SPDX-License-Identifier: Apache-2.0
# B pairs that are here, P pairs
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def softmax_losses(of_images_BP: Array, of_texts_BP: Array, first: Any) -> Array:
    """Cross entropy of finding the other half of each pair, mean of both directions: fp32 [B] (arXiv:2103.00020)."""
    right = jnp.sum(of_images_BP * _is_other_half(of_images_BP, first), axis=1)
    by_image, by_text = (jax.nn.logsumexp(logits, axis=1) - right for logits in (of_images_BP, of_texts_BP))
    return (by_image + by_text) / 2


def sigmoid_losses(of_images_BP: Array, of_texts_BP: Array, first: Any) -> Array:
    """Every pairing judged by itself, right or wrong; sums over the images: fp32 [B] (arXiv:2303.15343)."""
    del of_images_BP
    sign = 2.0 * _is_other_half(of_texts_BP, first) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(sign * of_texts_BP), axis=1)


def _is_other_half(logits_BP: Array, first: Any) -> Array:
    """1.0 where row and column are of one pair."""
    B, P = logits_BP.shape
    return (first + jnp.arange(B)[:, None] == jnp.arange(P)).astype(jnp.float32)
