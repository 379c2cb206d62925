"""fp8 in blocks with scales against the same rounding in NumPy, and what is compiled of it for GPUs."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from megajax.config import ConfigError, KernelConfig, ParallelConfig, TransformerConfig
from megajax.config_kernels import Fp8
from megajax.kernels import choose_linears
from megajax.ops.fp8_blocks import in_blocks
from megajax.parallel.aot import TARGETS, absent_gpus
from megajax.parallel.mesh import make_mesh
from megajax.parallel.roofline import estimate
from megajax.parallel.sharding import axis_rules
from megajax.transformer.fp8 import fp8_product

RNG = np.random.default_rng(0)
AXES = ("whole", "whole")
TP2 = ParallelConfig(tensor_model_parallel_size=2)
TYPES = {
    "e4m3": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    "hybrid": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
}


BLOCKS: Any = {"mxfp8": (1, 32), "blockwise": (128, 128)}
"""Of kernels; others are as long, of one row."""


def rounded(x: np.ndarray, dtype: Any, block: tuple[int, int]) -> np.ndarray:
    """x [M, K] as float64 after a trip through fp8, one block after the other; the last ones may be smaller."""
    result = np.zeros(x.shape)
    for row in range(0, x.shape[0], block[0]):
        for start in range(0, x.shape[1], block[1]):
            place = np.s_[row : row + block[0], start : start + block[1]]
            if x[place].any():
                scale = 2.0 ** np.ceil(np.log2(np.abs(x[place]).max() / float(ml_dtypes.finfo(dtype).max)))
                result[place] = (x[place] / scale).astype(dtype).astype(np.float64) * scale
    return result


@pytest.mark.parametrize("recipe", BLOCKS)
@pytest.mark.parametrize("fp8", TYPES)
def test_equals_numpy(fp8: Any, recipe: Any) -> None:
    """Of numbers of tokens and widths that are no whole blocks; features of magnitudes that are far apart."""
    forward, backward = TYPES[fp8]
    (T, K, N), square = {"mxfp8": (40, 96, 64), "blockwise": (136, 272, 144)}[recipe], BLOCKS[recipe]
    tile = (1, square[1])
    x, w, dy = (RNG.normal(size=size).astype(np.float32) for size in ((T, K), (K, N), (T, N)))
    x *= 10.0 ** RNG.integers(-3, 3, size=K).astype(np.float32)
    x[:, : tile[1]] = 0
    y, vjp = jax.vjp(lambda x, w: fp8_product(Fp8(fp8, recipe), AXES, x, w), x, w)
    expected = (
        rounded(x, forward, tile) @ rounded(w.T, forward, square).T,
        rounded(dy, backward, tile) @ rounded(w, forward, square).T,
        rounded(x.T, forward, tile) @ rounded(dy.T, backward, tile).T,
    )
    for mine, theirs in zip((y, *vjp(jnp.asarray(dy))), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(np.asarray(y) - x @ w).max() < 0.1 * np.abs(x @ w).max()


def test_scales_are_powers_of_two_that_fit() -> None:
    """Also where the largest magnitude is one itself, or what a scale can hold ends."""
    x = np.full((5, 32), 1e-3, np.float32)
    x[:4, 0] = 448.0, 449.0, 2.0**-8 * 448, 1e38
    x[4] = 0
    found = in_blocks(jnp.asarray(x), jnp.float8_e4m3fn, (1, 32))
    np.testing.assert_array_equal(found.scales[[0, 1, 2, 4], 0], [1, 2, 2.0**-8, 1])
    np.testing.assert_array_equal(np.asarray(found.scales.astype(jnp.float8_e8m0fnu).astype(jnp.float32)), found.scales)
    assert (np.abs(np.asarray(found.values, np.float32)) <= 448).all()


@pytest.mark.parametrize(("recipe", "least"), [("mxfp8", 32), ("blockwise", 16)])
def test_a_width_that_does_not_suit_is_refused(recipe: Any, least: int) -> None:
    says = rf"fp8_recipe='{recipe}' needs widths .* multiples of {least}, and the input .* is 40"
    with pytest.raises(ConfigError, match=says):
        fp8_product(Fp8("e4m3", recipe), AXES, jnp.ones((32, 40)), jnp.ones((40, 64)))


@pytest.mark.parametrize(
    ("recipe", "gpu", "says"),
    [
        ("mxfp8", None, r"10\.0 \(Blackwell\) or more, here is none; leave fp8_format out"),
        ("mxfp8", (9, 0), r"10\.0 \(Blackwell\) or more, this one has 9\.0; use tensorwise"),
        ("blockwise", (8, 9), r"9\.0 \(Hopper\) or more, this one has 8\.9"),
    ],
)
def test_recipes_need_their_gpu(recipe: Any, gpu: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"fp8_recipe='{recipe}' needs an NVIDIA GPU .* {says}"):
        choose_linears(gpu, KernelConfig(fp8_format="e4m3", fp8_recipe=recipe))


@pytest.mark.parametrize(
    ("recipe", "gpu", "title"),
    [
        ("mxfp8", (10, 0), "linears: MXFP8, by cuDNN, scaled by 32 numbers each"),
        ("blockwise", (9, 0), "linears: fp8, by a Pallas kernel, scaled by 128 numbers, or 128 x 128 weights, each"),
        ("blockwise", (10, 0), "linears: fp8, by cuDNN as MXFP8, scaled by 128 numbers, or 128 x 128 weights, each"),
    ],
)
def test_what_multiplies_is_said(recipe: Any, gpu: Any, title: str) -> None:
    assert str(choose_linears(gpu, KernelConfig(fp8_format="e4m3", fp8_recipe=recipe))) == title


needs_aot = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")


def lowered(fp8: Fp8, target: str) -> Any:
    """A row-parallel linear and its gradients, on four GPUs."""
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=4, vocab_size=16)
    mesh, rules = make_mesh(TP2, absent_gpus(4, target)), axis_rules(TP2, config, devices=4)

    def step(x: Any, w: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: fp8_product(fp8, ("mlp", "embed"), x, w), x, w)
        return y, *pull(dy)

    def like(*shape: int, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    arguments = (
        like(4, 128, 512, spec=PartitionSpec("dp", None, "tp")),
        like(512, 256, spec=PartitionSpec("tp")),
        like(4, 128, 256, spec=PartitionSpec("dp")),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.table.items())):
        return jax.jit(step).lower(*arguments)


def assert_local(text: str) -> None:
    """Each device computes its own part, and nothing but sums is sent: y over tp, the kernel's gradient over dp."""
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2
    assert not re.search(r" (dot|all-gather|all-to-all)\(", text)


@needs_aot
@pytest.mark.parametrize(
    "fp8",
    [Fp8("e4m3", "mxfp8"), Fp8("hybrid", "mxfp8"), Fp8("e4m3", "blockwise", as_mxfp8=True)],
    ids=["e4m3", "hybrid", "blockwise"],
)
def test_the_b200_program_calls_cudnn(fp8: Fp8) -> None:
    text = str(lowered(fp8, "b200").compile().as_text())
    assert len(re.findall(r'custom_call_target="__cudnn\$blockScaledDot"', text)) == 3
    assert_local(text)


@needs_aot
def test_the_h100_program_is_three_kernels_of_fp8(ptx_of: Any) -> None:
    """Which use Hopper's own instruction for the types as they are, and say how much they compute."""
    executable, ptx = ptx_of(lowered(Fp8("hybrid", "blockwise"), "h100"))
    text = executable.as_text()
    work = estimate(text, make_mesh(TP2, absent_gpus(4)), TARGETS["h100"])
    assert work.kernels == {"Pallas: block_matmul": 2, "Pallas: block_matmul_dw": 1}
    assert work.flops == 3 * 2 * 256 * 256 * 256
    instruction = re.compile(r"wgmma\.mma_async\.sync\.aligned\.\w+\.f32\.(\w+\.\w+)")
    multiplied = sorted(types for kernel in ptx for types in set(instruction.findall(kernel)))
    assert multiplied == ["e4m3.e4m3", "e4m3.e5m2", "e5m2.e4m3"]
    assert all("cp.async.cg.shared.global" in kernel for kernel in ptx)  # 16 bytes at once, while it multiplies
    assert not re.search(r"mma\.sync", "".join(ptx))
    assert_local(text)
