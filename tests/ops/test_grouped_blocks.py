"""Grouped products in fp8 by tiles and square blocks: the loop against NumPy, the GPU's kernels, interpreted on a CPU,
against both."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from megajax.ops.fp8_blocks import TILE, in_blocks
from megajax.ops.grouped_blocks import LOOP_PARTS, BlockParts, block_grouped_kernel
from megajax.ops.grouped_kernel import block_parts, block_product

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
SIZES, R, D, F = (256, 0, 128), 512, 160, 144
RNG = np.random.default_rng(0)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w, dy of magnitudes that are far apart; what lies behind the last group is nobody's."""
    x, w, dy = (RNG.normal(size=size).astype(np.float32) for size in ((R, D), (len(SIZES), D, F), (R, F)))
    x *= 10.0 ** RNG.integers(-3, 3, size=(R, 1)).astype(np.float32)
    w *= 10.0 ** RNG.integers(-3, 3, size=(1, D, 1)).astype(np.float32)
    x[sum(SIZES) :] = dy[sum(SIZES) :] = np.nan
    return x, w, dy


def rounded(x: np.ndarray, dtype: Any, rows: int = 1) -> np.ndarray:
    result = np.zeros(x.shape)
    for row in range(0, x.shape[0], rows):
        for start in range(0, x.shape[1], TILE):
            place = np.s_[row : row + rows, start : start + TILE]
            scale = 2.0 ** np.ceil(np.log2(np.abs(x[place]).max() / float(ml_dtypes.finfo(dtype).max)))
            result[place] = (x[place] / scale).astype(dtype).astype(np.float64) * scale
    return result


def expected(x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert after expert, its own rows alone."""
    y, dx, dw = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape)
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        rows, w8 = slice(end - size, end), rounded(w[e], E4M3, TILE)
        y[rows] = rounded(x[rows], E4M3) @ w8
        dx[rows] = rounded(dy[rows], E5M2) @ w8.T
        dw[e] = rounded(x[rows].T, E4M3) @ rounded(dy[rows].T, E5M2).T
    return y, dx, dw


@pytest.mark.parametrize("parts", [LOOP_PARTS, block_parts(interpret=True)], ids=["loop", "kernels"])
def test_equals_numpy(parts: BlockParts) -> None:
    kernel, (x, w, dy) = block_grouped_kernel(parts, E4M3, E5M2), inputs()
    assert kernel.least_rows == kernel.most_rows == TILE
    y, pull = jax.vjp(lambda x, w: kernel.product(x, w, jnp.array(SIZES), TILE), x, w)
    for mine, theirs in zip((y, *pull(jnp.asarray(dy))), expected(x, w, dy), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("rows", [1, TILE])
def test_one_product_equals_numpy(rows: int) -> None:
    """Of tiles by tiles, and by square blocks; no size is a whole tile."""
    a, b = (RNG.normal(size=size).astype(np.float32) for size in ((200, 272), (144, 272)))
    blocks = in_blocks(jnp.asarray(a), E5M2, (1, TILE)), in_blocks(jnp.asarray(b), E4M3, (rows, TILE))
    y = block_product(*blocks, jnp.float32, interpret=True)
    wanted = rounded(a, E5M2) @ rounded(b, E4M3, rows).T
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(blocks[1].numbers()[:, :272], rounded(b, E4M3, rows), rtol=1e-7)
