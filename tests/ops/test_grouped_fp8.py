"""Grouped products in fp8: the loop against NumPy, the GPU's kernels, interpreted on a CPU, against the loop."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megajax.ops.grouped_fp8 import LOOP_PARTS, Fp8Parts, fp8_grouped_kernel
from megajax.ops.grouped_kernel import fp8_parts_for
from megajax.parallel.aot import TARGETS, absent_gpus
from megajax.parallel.roofline import estimate

H100 = (9, 0)
SIZES, BLOCK, R, D, F = (64, 0, 32, 96), 32, 224, 96, 64
FORMATS = {
    "e4m3": (jnp.float8_e4m3fn, jnp.float8_e4m3fn),
    "hybrid": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w, dy; the experts' magnitudes are far apart."""
    r = np.random.default_rng(0)
    x, w, dy = (r.normal(size=size).astype(np.float32) for size in ((R, D), (len(SIZES), D, F), (R, F)))
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        x[end - size : end] *= 10.0**e
        w[e] *= 10.0 ** -(2 * e)
    x[sum(SIZES) :] = dy[sum(SIZES) :] = 0
    return x, w, dy


def run(parts: Fp8Parts, formats: Any, x: Any, w: Any, dy: Any) -> Any:
    kernel = fp8_grouped_kernel(parts, *formats)
    y, pull = jax.vjp(lambda x, w: kernel.product(x, w, jnp.array(SIZES), BLOCK), x, w)
    return y, *pull(dy)


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    scale = np.float32(np.abs(x).max() / np.float32(ml_dtypes.finfo(dtype).max))
    return (x / scale).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize("name", FORMATS)
def test_the_loop_equals_numpy(name: str) -> None:
    forward, backward = FORMATS[name]
    x, w, dy = inputs()
    wanted = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape)
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        rows = slice(end - size, end)
        if not size:
            continue
        x8, w8, g8 = rounded(x[rows], forward), rounded(w[e], forward), rounded(dy[rows], backward)
        wanted[0][rows], wanted[1][rows], wanted[2][e] = x8 @ w8, g8 @ w8.T, x8.T @ g8
    for mine, theirs in zip(run(LOOP_PARTS, FORMATS[name], x, w, dy), wanted, strict=True):
        for e in range(len(SIZES)):
            rows = slice(sum(SIZES[:e]), sum(SIZES[: e + 1])) if mine.ndim == 2 else e
            atol = 2e-5 * np.abs(theirs[rows]).max(initial=0)
            np.testing.assert_allclose(mine[rows], theirs[rows], rtol=2e-5, atol=atol)
    exact = np.concatenate([x[: SIZES[0]] @ w[0]])
    assert np.abs(np.asarray(run(LOOP_PARTS, FORMATS[name], x, w, dy)[0])[: SIZES[0]] - exact).max() < 0.1 * exact.max()


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernels_equal_the_loop(name: str) -> None:
    x, w, dy = inputs()
    kernels = fp8_parts_for(H100, interpret=True)
    for mine, theirs in zip(
        run(kernels, FORMATS[name], x, w, dy), run(LOOP_PARTS, FORMATS[name], x, w, dy), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
def test_the_h100_program_multiplies_fp8(ptx_of: Any) -> None:
    """Three kernels, which read nothing but fp8 and the table of groups, and multiply it as it is, gradients of another
    type, too: Hopper's own instruction says of which types its operands are."""
    mesh = Mesh(np.array(absent_gpus(1)), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = ((1024, 512), jnp.bfloat16), ((4, 512, 256), jnp.bfloat16), ((4,), jnp.int32), ((1024, 256), jnp.bfloat16)

    def step(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        kernel = fp8_grouped_kernel(fp8_parts_for(H100), *FORMATS["hybrid"])
        y, pull = jax.vjp(lambda x, w: kernel.product(x, w, sizes, 128), x, w)
        return y, *pull(dy)

    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        executable, ptx = ptx_of(jax.jit(step).lower(*arguments))
    text = executable.as_text()
    calls = [line for line in text.splitlines() if re.search(r"custom_call_target=.*triton", line)]
    read = [re.search(r"operand_layout_constraints={(.*?)}, api", line) for line in calls]
    types = [re.findall(r"(\w+)\[", found[1]) for found in read if found is not None]
    forward, of_rows, of_kernels = ["f8e4m3fn", "f8e4m3fn"], ["f8e5m2", "f8e4m3fn"], ["f8e4m3fn", "f8e5m2"]
    assert sorted(types) == sorted([["s32", *forward], ["s32", *of_rows], ["s32", "s32", *of_kernels]])
    multiplied = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.\w+\.f32\.(\w+)\.(\w+)", ptx))
    assert multiplied == {("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")}
    assert not re.search(r"mma\.sync|\.f16", ptx)
    work = estimate(text, mesh, TARGETS["h100"], turns=8)
    assert work.flops == 3 * 2 * 1024 * 512 * 256
