"""Text with images in it: where every token and every image embedding goes in one sequence, with static shapes.

Megatron: `_preprocess_data` in `core/models/multimodal/llava_model.py`, as gathers instead of scatters.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, T tokens of the text, S slots of the sequence that the language model sees, R rows of images, D features
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

IGNORE_INDEX = -100
"""The label of slots that predict nothing."""


class Merge(NamedTuple):
    """Which token fills which slots.

    token: int [B, S], the token that a slot belongs to. is_image: bool [B, S]. row: int [B, S], of image slots: the
    embedding, among all of its sample (or of the whole batch). filled: bool [B, S], False for padding at the end.
    is_placeholder: bool [B, T].
    """

    token: Array
    is_image: Array
    row: Array
    filled: Array
    is_placeholder: Array


def merge(is_placeholder_BT: Array, spans_BT: Array, slots: int, *, rows_by_sample: bool) -> Merge:
    """Lays out tokens, each in the next `spans` slots: 1 for text, any number for an image. The rest is cut off.

    Args:
      rows_by_sample: whether embeddings are counted within each sample, or through the batch.
    """
    spans_BT = jnp.where(is_placeholder_BT, spans_BT, 1)
    ends_BT = jnp.cumsum(spans_BT, axis=1)
    slot_S = jnp.arange(slots)
    token_BS = jnp.sum(ends_BT[:, None, :] <= slot_S[:, None], axis=-1)
    filled_BS = token_BS < spans_BT.shape[1]
    token_BS = jnp.minimum(token_BS, spans_BT.shape[1] - 1)
    image_spans_BT = jnp.where(is_placeholder_BT, spans_BT, 0)
    before_BT = jnp.cumsum(image_spans_BT, axis=1) - image_spans_BT
    if not rows_by_sample:
        of_sample_B = jnp.sum(image_spans_BT, axis=1)
        before_BT = before_BT + (jnp.cumsum(of_sample_B) - of_sample_B)[:, None]
    first_slot_BS = _take(ends_BT - spans_BT, token_BS)
    row_BS = _take(before_BT, token_BS) + slot_S - first_slot_BS
    return Merge(token_BS, filled_BS & _take(is_placeholder_BT, token_BS), row_BS, filled_BS, is_placeholder_BT)


def reordered(merge: Merge, order_S: Array) -> Merge:
    """With the slots in another order: the index of the slot that each is to be."""
    token, is_image, row, filled = (x[:, order_S] for x in (merge.token, merge.is_image, merge.row, merge.filled))
    return Merge(token, is_image, row, filled, merge.is_placeholder)


def merged_embeddings(merge: Merge, text_BTD: Array, images: Array) -> Array:
    """Embeddings of all slots, [B, S, D]; zero where there is padding.

    images: [B, R, D] where rows are counted by sample, [R, D] where through the batch.
    """
    text_BSD = jnp.take_along_axis(text_BTD, merge.token[..., None], axis=1)
    row_BS = jnp.clip(merge.row, 0, images.shape[-2] - 1)
    images_BSD = jnp.take_along_axis(images, row_BS[..., None], axis=1) if images.ndim == 3 else images[row_BS]
    x_BSD = jnp.where(merge.is_image[..., None], images_BSD.astype(text_BSD.dtype), text_BSD)
    return jnp.where(merge.filled[..., None], x_BSD, 0)


def merged_labels(merge: Merge, labels_BT: Array) -> Array:
    """What each slot has to predict, int [B, S]. labels [B, T]: of each token, the next one.

    The last slot of an image predicts the text behind it; all others of it, and the slot before it, nothing.
    """
    last = jnp.full_like(merge.token[:, :1], merge.is_placeholder.shape[1] - 1)
    next_token = jnp.concatenate([merge.token[:, 1:], last], axis=1)
    end = jnp.zeros_like(merge.filled[:, :1])
    next_filled = jnp.concatenate([merge.filled[:, 1:], end], axis=1)
    next_is_text = next_filled & ~_take(merge.is_placeholder, next_token)
    is_last = merge.filled & ~next_filled & (merge.token == last)
    label = jnp.where(is_last, labels_BT[:, -1:], _take(labels_BT, jnp.maximum(next_token - 1, 0)))
    return jnp.where(next_is_text | is_last, label, IGNORE_INDEX)


def merged_loss_mask(merge: Merge, loss_mask_BT: Array) -> Array:
    """Which slots count, [B, S]: those of text that counts, but not the one in front of an image."""
    before_image = jnp.concatenate([merge.is_placeholder[:, 1:], jnp.zeros_like(merge.is_placeholder[:, :1])], axis=1)
    counts_BT = jnp.where(merge.is_placeholder | before_image, 0, loss_mask_BT)
    return jnp.where(merge.filled, _take(counts_BT, merge.token), 0)


def _take(x_BT: Array, index_BS: Array) -> Array:
    return jnp.take_along_axis(x_BT, index_BS, axis=1)
