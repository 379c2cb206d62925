"""Grouped products in fp8 by tiles and square blocks: the loop against NumPy, the GPU's kernels, interpreted on a CPU,
against both."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megajax.ops.fp8_blocks import MX_BLOCK, TILE, in_blocks
from megajax.ops.grouped_blocks import LOOP_PARTS, BlockParts, block_grouped_kernel
from megajax.ops.grouped_kernel import block_parts, block_product, mx_parts
from megajax.parallel.aot import absent_gpus

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


def rounded(x: np.ndarray, dtype: Any, rows: int = 1, tile: int = TILE) -> np.ndarray:
    result = np.zeros(x.shape)
    for row in range(0, x.shape[0], rows):
        for start in range(0, x.shape[1], tile):
            place = np.s_[row : row + rows, start : start + tile]
            scale = 2.0 ** np.ceil(np.log2(np.abs(x[place]).max() / float(ml_dtypes.finfo(dtype).max)))
            result[place] = (x[place] / scale).astype(dtype).astype(np.float64) * scale
    return result


def expected(tile: int, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert after expert, its own rows alone."""
    y, dx, dw = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape)
    tiles, of_kernel = partial(rounded, tile=tile), TILE if tile == TILE else 1
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        rows = slice(end - size, end)
        y[rows] = tiles(x[rows], E4M3) @ tiles(w[e].T, E4M3, of_kernel).T
        dx[rows] = tiles(dy[rows], E5M2) @ tiles(w[e], E4M3, of_kernel).T
        dw[e] = tiles(x[rows].T, E4M3) @ tiles(dy[rows].T, E5M2).T
    return y, dx, dw


PARTS = {
    "loop": (LOOP_PARTS, TILE),
    "kernels": (block_parts(interpret=True), TILE),
    "mx-loop": (LOOP_PARTS, MX_BLOCK),
    "mx-kernels": (mx_parts(interpret=True), MX_BLOCK),
    "kernels-as-mx": (mx_parts(interpret=True), TILE),
}


@pytest.mark.parametrize(("parts", "tile"), PARTS.values(), ids=PARTS.keys())
def test_equals_numpy(parts: BlockParts, tile: int) -> None:
    kernel, (x, w, dy) = block_grouped_kernel(parts, E4M3, E5M2, tile=tile, square=tile == TILE), inputs()
    assert kernel.least_rows == kernel.most_rows == TILE
    y, pull = jax.vjp(lambda x, w: kernel.product(x, w, jnp.array(SIZES), TILE), x, w)
    for mine, theirs in zip((y, *pull(jnp.asarray(dy))), expected(tile, x, w, dy), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
@pytest.mark.parametrize("tile", [MX_BLOCK, TILE])
def test_blackwell_multiplies_mxfp8(tile: int, ptx_of: Any) -> None:
    """Tensor cores take the scales with the numbers, of gradients of another type, too, and hold the sums."""
    mesh = Mesh(np.array(absent_gpus(1, "b200")), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = ((1024, 512), jnp.bfloat16), ((4, 512, 256), jnp.bfloat16), ((4,), jnp.int32), ((1024, 256), jnp.bfloat16)

    def step(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        kernel = block_grouped_kernel(mx_parts(), E4M3, E5M2, tile=tile, square=tile == TILE)
        y, pull = jax.vjp(lambda x, w: kernel.product(x, w, sizes, TILE), x, w)
        return y, *pull(dy)

    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        _, ptx = ptx_of(jax.jit(step).lower(*arguments))
    assert len(ptx) == 3
    for kernel in ptx:
        assert len(re.findall(r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale", kernel)) == TILE // MX_BLOCK
        assert len(re.findall(r"tcgen05\.ld", kernel)) == 1
        assert "mma.sync" not in kernel
        assert "cp.async.cg.shared.global" in kernel


@pytest.mark.parametrize("rows", [1, TILE])
def test_one_product_equals_numpy(rows: int) -> None:
    """Of tiles by tiles, and by square blocks; no size is a whole tile."""
    a, b = (RNG.normal(size=size).astype(np.float32) for size in ((200, 272), (144, 272)))
    blocks = in_blocks(jnp.asarray(a), E5M2, (1, TILE)), in_blocks(jnp.asarray(b), E4M3, (rows, TILE))
    y = block_product(*blocks, jnp.float32, interpret=True)
    wanted = rounded(a, E5M2) @ rounded(b, E4M3, rows).T
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(blocks[1].numbers()[:, :272], rounded(b, E4M3, rows), rtol=1e-7)
