"""Text with images in it against the sample that Megatron's own tests have, and against a plain loop."""

# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.multimodal import IGNORE_INDEX, merge, merged_embeddings, merged_labels, merged_loss_mask

T, SPAN, D, IMAGE = 1024, 577, 4, -200


def test_equals_the_sample_of_megatrons_tests() -> None:
    """Five rows: an image first, in the middle (of two tiles), last, none, and two of them."""
    ids = np.tile(np.arange(T), (5, 1))
    labels = np.tile(np.arange(1, T + 1), (5, 1))
    for row, at in [(0, 0), (1, 100), (2, 1023), (4, 50), (4, 150)]:
        ids[row, at] = IMAGE
        if at:
            labels[row, at - 1] = IMAGE
    mask = np.ones((5, T), np.float32)
    mask[:2, :10] = mask[:2, 110:120] = 0
    tiles = np.zeros((5, T), np.int32)
    tiles[ids == IMAGE] = [1, 2, 1, 2, 1]
    S = 3 * SPAN - 2 + T
    slots = merge(jnp.asarray(ids == IMAGE), jnp.asarray(tiles * SPAN), S, rows_by_sample=False)
    text = np.broadcast_to(np.arange(T, dtype=np.float32)[None, :, None], (5, T, D))
    images = np.repeat(10000.0 + np.arange(7, dtype=np.float32), SPAN)[:, None] * np.ones(D, np.float32)
    x = np.asarray(merged_embeddings(slots, jnp.asarray(text), jnp.asarray(images)))

    def tile(i: int) -> np.ndarray:
        return np.full(SPAN, 10000.0 + i)

    def numbers(start: int, end: int) -> np.ndarray:
        return np.arange(start, end, dtype=np.float64)

    rows = [
        [tile(0), numbers(1, 1024)],
        [numbers(0, 100), tile(1), tile(2), numbers(101, 1024)],
        [numbers(0, 1023), tile(3)],
        [numbers(0, 1024)],
        [numbers(0, 50), tile(4), tile(5), numbers(51, 150), tile(6), numbers(151, 1024)],
    ]
    for i, parts in enumerate(rows):
        expected = np.zeros(S)
        content = np.concatenate(parts)
        expected[: len(content)] = content
        np.testing.assert_array_equal(x[i], np.repeat(expected[:, None], D, axis=1), err_msg=f"row {i}")

    expected_labels = np.full((5, S), IGNORE_INDEX)
    for row, start, end, first in [
        (0, 576, 1600, 1),
        *((1, 0, 99, 1), (1, 1253, 2177, 101)),
        *((2, 0, 1022, 1), (2, 1599, 1600, 1024)),
        (3, 0, 1024, 1),
        *((4, 0, 49, 1), (4, 1203, 1302, 51), (4, 1879, 2753, 151)),
    ]:
        expected_labels[row, start:end] = np.arange(first, first + end - start)
    np.testing.assert_array_equal(merged_labels(slots, jnp.asarray(labels)), expected_labels)

    expected_mask = np.zeros((5, S))
    for row, start, end in [
        *((0, 586, 686), (0, 696, 1600), (1, 10, 99), (1, 1254, 1263), (1, 1273, 2177)),
        *((2, 0, 1022), (3, 0, 1024), (4, 0, 49), (4, 1204, 1302), (4, 1880, 2753)),
    ]:
        expected_mask[row, start:end] = 1
    np.testing.assert_array_equal(merged_loss_mask(slots, jnp.asarray(mask)), expected_mask)


@pytest.mark.parametrize("slots", [5, 12, 40])
def test_any_number_of_images_and_any_length(slots: int) -> None:
    """Images that follow each other, of no tile, cut off, with rows counted by sample."""
    rng = np.random.default_rng(slots)
    is_image = rng.random((4, 9)) < 0.4
    spans = rng.integers(0, 3, size=is_image.shape) * 3
    text = rng.normal(size=(4, 9, 2)).astype(np.float32)
    images = rng.normal(size=(4, 30 * 3, 2)).astype(np.float32)
    laid = merge(jnp.asarray(is_image), jnp.asarray(spans), slots, rows_by_sample=True)
    x = np.asarray(merged_embeddings(laid, jnp.asarray(text), jnp.asarray(images)))
    for b in range(4):
        parts, row = [], 0
        for t in range(9):
            if is_image[b, t]:
                parts.append(images[b, row : row + spans[b, t]])
                row += spans[b, t]
            else:
                parts.append(text[b, t : t + 1])
        whole = np.concatenate([*parts, np.zeros((slots, 2), np.float32)])[:slots]
        np.testing.assert_array_equal(x[b], whole)
