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


def run(parts: Fp8Parts, formats: Any, x: Any, w: Any, dy: Any, *scales: Any, wgrad: bool = True) -> Any:
    kernel = fp8_grouped_kernel(parts, *formats, wgrad=wgrad)
    arrays = (x, w, *map(jnp.asarray, scales))
    y, pull = jax.vjp(lambda x, w, *scales: kernel.product(x, w, jnp.array(SIZES), BLOCK, *scales), *arrays)
    return y, *pull(dy)


def given_scales() -> np.ndarray:
    """As of earlier steps: some twice what they need be, those of the last expert too small."""
    x, w, dy = inputs()
    largest = np.ones((len(SIZES), 3), np.float32)
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        if size:
            largest[e] = [np.abs(a).max() for a in (x[end - size : end], w[e], dy[end - size : end])]
    return largest * np.array([2, 1, 1.5, 0.3], np.float32)[:, None] / np.array([448, 448, 57344], np.float32)


def rounded(x: np.ndarray, dtype: Any, scale: Any = None) -> np.ndarray:
    most = np.float32(ml_dtypes.finfo(dtype).max)
    scale = np.float32(np.abs(x).max() / most) if scale is None else scale
    return np.clip(x / scale, -most, most).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize(
    ("name", "delayed", "wgrad"),
    [("e4m3", False, True), ("hybrid", False, True), ("hybrid", True, True), ("hybrid", True, False)],
)
def test_the_loop_equals_numpy(name: str, delayed: bool, wgrad: bool) -> None:
    forward, backward = FORMATS[name]
    x, w, dy = inputs()
    scales = given_scales()
    wanted = np.zeros((R, F)), np.zeros((R, D)), np.zeros(w.shape), np.zeros(scales.shape)
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        rows = slice(end - size, end)
        if not size:
            continue
        of_x, of_w, of_g = scales[e] if delayed else (None,) * 3
        x8, w8, g8 = rounded(x[rows], forward, of_x), rounded(w[e], forward, of_w), rounded(dy[rows], backward, of_g)
        wanted[0][rows], wanted[1][rows] = x8 @ w8, g8 @ w8.T
        wanted[2][e] = x8.T @ g8 if wgrad else x[rows].T @ dy[rows]
        wanted[3][e] = np.abs(x[rows]).max(), 0, np.abs(dy[rows]).max()
    given = (scales,) if delayed else ()
    found = run(LOOP_PARTS, FORMATS[name], x, w, dy, *given, wgrad=wgrad)
    if delayed:  # of an expert without rows they are zero: its scales stay
        np.testing.assert_array_equal(found[3], wanted[3].astype(np.float32))
    for mine, theirs in zip(found[:3], wanted[:3], strict=True):
        for e in range(len(SIZES)):
            rows = slice(sum(SIZES[:e]), sum(SIZES[: e + 1])) if mine.ndim == 2 else e
            atol = 2e-5 * np.abs(theirs[rows]).max(initial=0)
            np.testing.assert_allclose(mine[rows], theirs[rows], rtol=2e-5, atol=atol)
    exact = np.concatenate([x[: SIZES[0]] @ w[0]])
    assert np.abs(np.asarray(run(LOOP_PARTS, FORMATS[name], x, w, dy)[0])[: SIZES[0]] - exact).max() < 0.1 * exact.max()


@pytest.mark.parametrize(("name", "wgrad"), [("e4m3", True), ("hybrid", True), ("hybrid", False)])
def test_the_kernels_equal_the_loop(name: str, wgrad: bool) -> None:
    arrays = (*inputs(), given_scales())
    kernels = fp8_parts_for(H100, interpret=True)
    found, wanted = (run(parts, FORMATS[name], *arrays, wgrad=wgrad) for parts in (kernels, LOOP_PARTS))
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
@pytest.mark.parametrize("wgrad", [True, False])
def test_the_h100_program_multiplies_fp8(ptx_of: Any, wgrad: bool) -> None:
    """Three kernels, which read nothing but fp8 and the table of groups, and multiply it as it is, gradients of another
    type, too: Hopper's own instruction says of which types its operands are. With scales that are given; wgrad: and
    gradients of kernels are products in fp8, or else of bf16."""
    mesh = Mesh(np.array(absent_gpus(1)), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = ((1024, 512), jnp.bfloat16), ((4, 512, 256), jnp.bfloat16), ((4,), jnp.int32), ((1024, 256), jnp.bfloat16)
    shapes = (*shapes, ((4, 3), jnp.float32))

    def step(x: Any, w: Any, sizes: Any, dy: Any, scales: Any) -> Any:
        kernel = fp8_grouped_kernel(fp8_parts_for(H100), *FORMATS["hybrid"], wgrad=wgrad)
        y, pull = jax.vjp(lambda x, w, scales: kernel.product(x, w, sizes, 128, scales), x, w, scales)
        return y, *pull(dy)

    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        executable, ptx = ptx_of(jax.jit(step).lower(*arguments))
    text = executable.as_text()
    calls = [line for line in text.splitlines() if re.search(r"custom_call_target=.*triton", line)]
    read = [re.search(r"operand_layout_constraints={(.*?)}, api", line) for line in calls]
    types = [re.findall(r"(\w+)\[", found[1]) for found in read if found is not None]
    forward, of_rows = ["f8e4m3fn", "f8e4m3fn"], ["f8e5m2", "f8e4m3fn"]
    of_kernels = ["f8e4m3fn", "f8e5m2"] if wgrad else ["bf16", "bf16"]
    assert sorted(types) == sorted([["s32", *forward], ["s32", *of_rows], ["s32", "s32", *of_kernels]])
    instruction = re.compile(r"wgmma\.mma_async\.sync\.aligned\.\w+\.f32\.(\w+\.\w+)")
    multiplied = sorted(types for kernel in ptx for types in set(instruction.findall(kernel)))
    assert multiplied == sorted(["e4m3.e4m3", "e5m2.e4m3", "e4m3.e5m2" if wgrad else "bf16.bf16"])
    assert all("cp.async.cg.shared.global" in kernel for kernel in ptx)  # 16 bytes at once, while it multiplies
    assert not re.search(r"mma\.sync|\.f16", "".join(ptx))
    work = estimate(text, mesh, TARGETS["h100"], turns=8)
    assert work.flops == 3 * 2 * 1024 * 512 * 256
