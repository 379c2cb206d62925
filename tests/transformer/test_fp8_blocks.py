"""MXFP8 against the same rounding in NumPy, and what is compiled of it for a B200."""

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
from megajax.parallel.aot import absent_gpus
from megajax.parallel.mesh import make_mesh
from megajax.parallel.sharding import axis_rules
from megajax.transformer.fp8 import fp8_product
from megajax.transformer.fp8_blocks import BLOCK, in_blocks

RNG = np.random.default_rng(0)
AXES = ("whole", "whole")
TYPES = {
    "e4m3": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    "hybrid": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
}


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x [M, K] as float64 after a trip through MXFP8, one block after the other."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).astype(np.float32)
    result = np.zeros(x.shape)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            block = x[row, start : start + BLOCK]
            if block.any():
                scale = 2.0 ** np.ceil(np.log2(np.abs(block).max() / float(ml_dtypes.finfo(dtype).max)))
                result[row, start : start + BLOCK] = (block / scale).astype(dtype).astype(np.float64) * scale
    return result


@pytest.mark.parametrize("fp8", TYPES)
def test_equals_numpy(fp8: Any) -> None:
    """Of 40 tokens, so that the last block of them is not full; features of magnitudes that are far apart."""
    forward, backward = TYPES[fp8]
    x, w, dy = (RNG.normal(size=size).astype(np.float32) for size in ((40, 96), (96, 64), (40, 64)))
    x *= 10.0 ** RNG.integers(-3, 3, size=96).astype(np.float32)
    x[:, :32] = 0
    y, vjp = jax.vjp(lambda x, w: fp8_product(Fp8(fp8, "mxfp8"), AXES, x, w), x, w)
    expected = (
        rounded(x, forward) @ rounded(w.T, forward).T,
        rounded(dy, backward) @ rounded(w, forward).T,
        rounded(x.T, forward) @ rounded(dy.T, backward).T,
    )
    for mine, theirs in zip((y, *vjp(jnp.asarray(dy))), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(np.asarray(y) - x @ w).max() < 0.1 * np.abs(x @ w).max()


def test_scales_are_powers_of_two_that_fit() -> None:
    """Also where the largest magnitude is one itself, or what a scale can hold ends."""
    x = np.full((4, BLOCK), 1e-3, np.float32)
    x[:, 0] = 448.0, 449.0, 2.0**-8 * 448, 1e38
    values, scales = in_blocks(jnp.asarray(x), jnp.float8_e4m3fn)
    np.testing.assert_array_equal(scales[:3, 0], [1, 2, 2.0**-8])
    np.testing.assert_array_equal(np.asarray(scales.astype(jnp.float8_e8m0fnu).astype(jnp.float32)), scales)
    assert (np.abs(np.asarray(values, np.float32)) <= 448).all()


def test_a_width_that_is_no_whole_block_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"fp8_recipe='mxfp8' needs widths .* multiples of 32, and the input .* is 48"
    ):
        fp8_product(Fp8("e4m3", "mxfp8"), AXES, jnp.ones((32, 48)), jnp.ones((48, 64)))


@pytest.mark.parametrize(("gpu", "here"), [(None, "here is none"), ((9, 0), r"this one has 9\.0")])
def test_mxfp8_needs_blackwell(gpu: Any, here: str) -> None:
    wanted = KernelConfig(fp8_format="e4m3", fp8_recipe="mxfp8")
    with pytest.raises(ConfigError, match=rf"fp8_recipe='mxfp8' needs .* 10\.0 \(Blackwell\) or more, {here}"):
        choose_linears(gpu, wanted)
    assert str(choose_linears((10, 0), wanted)) == "linears: MXFP8, by cuDNN, scaled by 32 numbers each"


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
@pytest.mark.parametrize("fp8", TYPES)
def test_the_b200_program_calls_cudnn(fp8: Any) -> None:
    """Forward and for both gradients, each device its own part; a row-parallel linear's result is summed."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=4, vocab_size=16)
    mesh, rules = make_mesh(parallel, absent_gpus(4, "b200")), axis_rules(parallel, config, devices=4)

    def step(x: Any, w: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: fp8_product(Fp8(fp8, "mxfp8"), ("mlp", "embed"), x, w), x, w)
        return y, *pull(dy)

    def like(*shape: int, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    arguments = (
        like(4, 128, 512, spec=PartitionSpec("dp", None, "tp")),
        like(512, 256, spec=PartitionSpec("tp")),
        like(4, 128, 256, spec=PartitionSpec("dp")),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.table.items())):
        text = str(jax.jit(step).lower(*arguments).compile().as_text())
    assert len(re.findall(r'custom_call_target="__cudnn\$blockScaledDot"', text)) == 3
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2  # y over tp, the kernel's gradient over dp
    assert not re.search(r" (dot|all-gather|all-to-all)\(", text)
