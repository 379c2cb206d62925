"""The grouped kernel, interpreted on a CPU, against a loop over experts in NumPy; and what it is compiled to."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megajax.ops import grouped
from megajax.ops.grouped_kernel import Tile, grouped_product, kernel_for
from megajax.parallel import aot
from megajax.parallel.aot import TARGETS, absent_gpus

Arrays = tuple[np.ndarray, ...]


@functools.partial(jax.jit, static_argnums=(4,))
def product(x: Any, w: Any, sizes: Any, dy: Any, block: int) -> Any:
    """y, and the gradients of x and w."""
    y, pull = jax.vjp(lambda x, w: grouped_product(x, w, sizes, block, interpret=True), x, w)
    return y, *pull(dy)


def inputs(sizes: list[int], rows: int, D: int, F: int) -> Arrays:
    """x, w and dy. What lies behind the last group must not be read."""
    r = np.random.default_rng(0)
    x, w, dy = (r.normal(size=size).astype(np.float32) for size in ((rows, D), (len(sizes), D, F), (rows, F)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return x, w, dy


def expected(sizes: list[int], x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Arrays:
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        y[start:end], dx[start:end] = x[start:end] @ w[e], dy[start:end] @ w[e].T
        dw[e] = x[start:end].T @ dy[start:end]
    return y, dx, dw


def assert_close(got: Any, wanted: Arrays) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6 * max(1.0, float(np.abs(theirs).max())))


CASES = {
    "empty_groups_and_rows_behind": ([0, 32, 0, 64, 0], 16, 128, 32, 48),
    "one_group": ([64], 16, 64, 16, 32),
    "no_row": ([0, 0], 16, 32, 16, 16),
    "tiles_that_reach_over_the_edge": ([96, 32], 32, 128, 144, 272),
    "several_tiles_a_block_and_bands": ([1024, 0, 512], 512, 2048, 64, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name: str) -> None:
    sizes, block, rows, D, F = CASES[name]
    x, w, dy = inputs(sizes, rows, D, F)
    assert_close(product(x, w, jnp.array(sizes, jnp.int32), dy, block), expected(sizes, x, w, dy))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_any_sizes_of_groups(blocks: list[int]) -> None:
    sizes = [16 * n for n in blocks]
    x, w, dy = inputs(sizes, 12 * 16, 32, 48)
    assert_close(product(x, w, jnp.array(sizes, jnp.int32), dy, 16), expected(sizes, x, w, dy))


def test_equals_the_loop() -> None:
    sizes, block, rows, D, F = CASES["empty_groups_and_rows_behind"]
    x, w, dy = inputs(sizes, rows, D, F)
    groups = grouped.Groups(jnp.array(sizes, jnp.int32), block)
    y, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, groups), x, w)
    assert_close(product(x, w, groups.sizes, dy, block), tuple(np.asarray(a) for a in (y, *pull(dy))))


def test_sums_of_bf16_are_in_fp32() -> None:
    """2,048 terms: in bf16 the sum would stop growing at 256."""
    x, w = jnp.ones((16, 2048), jnp.bfloat16), jnp.ones((1, 2048, 16), jnp.bfloat16)
    y, dx, dw = product(x, w, jnp.array([16], jnp.int32), jnp.ones((16, 16), jnp.bfloat16), 16)
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
    assert (float(y[0, 0]), float(dx[0, 0]), float(dw[0, 0, 0])) == (2048, 16, 16)


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "tile"),
    [
        (128, 14336, 4096, (128, 256, 64)),
        (512, 2880, 2880, (128, 256, 64)),  # 12 tiles for 11.25
        (16, 768, 2048, (16, 256, 64)),
        (48, 176, 16, (16, 64, 16)),
    ],
)
def test_tiles(rows: int, columns: int, inner: int, tile: tuple[int, int, int]) -> None:
    assert tuple(Tile.of(rows, columns, inner)) == tile


needs_aot = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")


def compiled(target: str, kernel: Any, sizes: tuple[int, int, int, int]) -> Any:
    """Product and gradients in bf16, in blocks of 128. sizes: R, E, D and F."""
    R, E, D, F = sizes
    mesh = Mesh(np.array(absent_gpus(1, target)), ("tp",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = ((R, D), jnp.bfloat16), ((E, D, F), jnp.bfloat16), ((E,), jnp.int32), ((R, F), jnp.bfloat16)

    def run(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, grouped.Groups(sizes, 128), kernel), x, w)
        return y, *pull(dy)

    with jax.set_mesh(mesh):
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
        return jax.jit(run).lower(*arguments).compile()


# Like an L40S, which has 99 KiB of shared memory for a block of threads.
SMALL = dataclasses.replace(TARGETS["a100"], capability=(8, 9), shared_memory=102400, shared_memory_optin=101376)


@needs_aot
@pytest.mark.parametrize(
    "target", ["h100", pytest.param("a100", marks=pytest.mark.slow), pytest.param("small", marks=pytest.mark.slow)]
)
def test_the_program_for_a_gpu_is_three_kernels(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop, no other product, no array beside inputs and results but the tables; tiles fit into shared memory, or
    XLA would refuse them. Sizes of a device of Mixtral 8x7B with all experts, and gpt-oss, whose widths are no whole
    tiles."""
    targets = {**TARGETS, "small": SMALL}
    monkeypatch.setattr(aot, "TARGETS", targets)
    for sizes in ((8192, 8, 4096, 14336), (4096, 4, 2880, 2880)):
        executable = compiled(target, kernel_for(targets[target].capability), sizes)
        text = str(executable.as_text())
        assert re.findall(r'custom_call_target="([^"]*)"', text) == ["__gpu$xla.gpu.triton"] * 3
        assert not re.search(r" (while|dot|convolution)\(", text)
        assert executable.memory_analysis().temp_size_in_bytes < 4096
