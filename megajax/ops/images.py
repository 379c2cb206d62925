"""Images as arrays: patches, pixel shuffle, and bilinear resampling of tables that lie on a grid."""

# SPDX-License-Identifier: Apache-2.0
# B batch, C channels, H height, W width, P patches, D features, R rows and L columns of a table
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def patchify(images_BCHW: Array, patch: int) -> Array:
    """images [B, C, H, W] -> [B, P, C patch patch]: patches row by row, features in the order channel, row, column."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def pixel_shuffle(x_BPD: Array, scale_factor: float = 0.5, version: int = 2) -> Array:
    """Trades tokens for features: [B, P, D] -> [B, P scale^2, D / scale^2]. The P tokens form a square.

    version 1 leaves the square transposed, 2 does not (Megatron: `core/models/multimodal/llava_model.py`).

    Raises:
      ValueError: P is no square.
    """
    B, P, D = x_BPD.shape
    side = math.isqrt(P)
    if side * side != P:
        raise ValueError(f"pixel shuffle needs a square of tokens, not {P}")
    rows, features = int(side * scale_factor), int(D / scale_factor)
    x = x_BPD.reshape(B, side, rows, features).transpose(0, 2, 1, 3)
    x = x.reshape(B, rows, rows, int(features / scale_factor))
    if version == 2:
        x = x.transpose(0, 2, 1, 3)
    return x.reshape(B, rows * rows, -1)


def bilinear_weights(size: int, new_size: int, *, align_corners: bool) -> np.ndarray:
    """The matrix [new_size, size], fp32, that resamples a line of `size` points to `new_size`.

    As torch's `interpolate`: with align_corners the ends of both lines coincide, else the ends of their pixels.
    """
    index = np.arange(new_size, dtype=np.float64)
    if align_corners:
        source = index * ((size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    else:
        source = np.clip((index + 0.5) * size / new_size - 0.5, 0.0, None)
    return np.maximum(0.0, 1.0 - np.abs(np.minimum(source, size - 1)[:, None] - np.arange(size))).astype(np.float32)


def resize(table_RLD: Array, rows: int, columns: int, *, align_corners: bool) -> Array:
    """A table on a grid, [R, L, D], resampled to [rows, columns, D] bilinearly, in fp32."""
    if table_RLD.shape[:2] == (rows, columns):
        return table_RLD
    down, across = (
        jnp.asarray(bilinear_weights(size, new, align_corners=align_corners))
        for size, new in zip(table_RLD.shape[:2], (rows, columns), strict=True)
    )
    return jnp.einsum("hR,RLD,wL->hwD", down, table_RLD.astype(jnp.float32), across)


def random_windows(drawn_B4: Array, table_RLD: Array, rows: int, columns: int) -> Array:
    """A window of the table for each image, resampled: [B, rows, columns, D], fp32. drawn: uniform numbers in [0, 1).

    The cropped position embedding of training: a window of sqrt(0.1) to 1 of each side, of aspect 3/4 to 4/3 (RADIO,
    arXiv:2312.06709; Megatron: `core/models/vision/radio.py`).
    """
    scale = math.sqrt(0.1) + (1.0 - math.sqrt(0.1)) * drawn_B4[:, :1]
    aspect = jnp.exp(math.log(4 / 3) * (2.0 * drawn_B4[:, 1:2] - 1.0))
    size = jnp.clip(jnp.concatenate([scale * aspect, scale / aspect], axis=1), 0.0, 1.0)
    start = drawn_B4[:, 2:] * (1.0 - size)

    def weights(axis: int, new: int, old: int) -> Array:
        points = jnp.linspace(0.0, 1.0, new) * size[:, axis, None] + start[:, axis, None]
        return jnp.maximum(0.0, 1.0 - jnp.abs(points[..., None] * (old - 1) - jnp.arange(old)))

    R, L, _ = table_RLD.shape
    return jnp.einsum("BhR,RLD,BwL->BhwD", weights(1, rows, R), table_RLD.astype(jnp.float32), weights(0, columns, L))
