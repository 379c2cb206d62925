"""Products in fp8 against the same rounding in NumPy, on a mesh against one device."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from megajax.config import ConfigError, KernelConfig, ParallelConfig, TransformerConfig
from megajax.kernels import choose_linears
from megajax.parallel.mesh import make_mesh
from megajax.parallel.sharding import axis_rules, logical_axes, specs_of_axes
from megajax.transformer.fp8 import FORMATS, fp8_product
from megajax.transformer.linear import ColumnParallelLinear, RowParallelLinear

RNG = np.random.default_rng(0)
AXES = ("whole", "whole")
H100 = (9, 0)


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x as float64 after a trip through fp8 with the largest magnitude at the type's largest number."""
    scale = np.float32(ml_dtypes.finfo(dtype).max) / np.abs(x).max()
    return (x / (np.float32(1) / scale)).astype(dtype).astype(np.float64) / np.float64(scale)


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("shape", [(24, 16), (2, 12, 16)])
def test_equals_numpy(fp8: Any, shape: tuple[int, ...]) -> None:
    forward, backward = ((ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)[i] for i in (0, int(fp8 == "hybrid")))
    x = RNG.normal(size=shape).astype(np.float32)
    w, dy = (RNG.normal(size=size).astype(np.float32) for size in ((16, 8), (*shape[:-1], 8)))
    y, vjp = jax.vjp(lambda x, w: fp8_product(fp8, AXES, x, w), x, w)
    x8, w8, g8 = rounded(x, forward), rounded(w, forward), rounded(dy, backward)
    expected = x8 @ w8, g8 @ w8.T, x8.reshape(-1, 16).T @ g8.reshape(-1, 8)
    for mine, theirs in zip((y, *vjp(jnp.asarray(dy))), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    exact = x @ w
    assert np.abs(np.asarray(y) - exact).max() < 0.1 * np.abs(exact).max()


def test_zeros_and_large_numbers() -> None:
    assert not np.asarray(fp8_product("e4m3", AXES, jnp.zeros((4, 16)), jnp.ones((16, 8)))).any()
    x = jnp.asarray(RNG.normal(size=(4, 16)), jnp.bfloat16)
    w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
    y = fp8_product("e4m3", AXES, x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fp8_product("e4m3", AXES, x * 2.0**60, w * 2.0**-40), y * 2.0**20)


class TwoLinears(nn.Module):
    """Up and down again, as in an MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        column = ColumnParallelLinear(self.config, 64, "mlp", use_bias=True, fp8="hybrid", name="up")
        row = RowParallelLinear(self.config, 32, "mlp", use_bias=True, fp8="hybrid", name="down")
        return row(column(x))


CONFIG = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=16)


def test_every_mesh_computes_the_same() -> None:
    """Under tensor and sequence parallelism and ZeRO-3, to the rounding of sums."""
    x = jnp.asarray(RNG.normal(size=(4, 8, 32)), jnp.float32)
    model = TwoLinears(CONFIG)
    boxed = model.init(jax.random.key(0), x)
    params = nn.unbox(boxed)

    def run(params: Any, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x))), argnums=(0, 1))(params, x)  # pyright: ignore

    expected = jax.jit(run)(params, x)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, zero=3)
    mesh, rules = make_mesh(parallel, jax.devices()[:4]), axis_rules(parallel, CONFIG, devices=4)
    specs = specs_of_axes(logical_axes(boxed), rules.table)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    placed = jax.device_put(params, places), jax.device_put(x, NamedSharding(mesh, PartitionSpec("dp", "tp")))
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.table.items())):
        compiled = jax.jit(run).lower(*placed).compile()
        got = compiled(*placed)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(jnp.abs(theirs).max()))


def test_fp8_without_fused_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp8_format='e4m3' is not possible with transformer_impl='local'"):
        KernelConfig(fp8_format="e4m3", transformer_impl="local")


@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8", "custom"])
def test_other_recipes_are_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=f"fp8_recipe='{recipe}' is not supported yet; use fp8_recipe='tensorwise'"):
        choose_linears(H100, KernelConfig(fp8_format="e4m3", fp8_recipe=recipe))


@pytest.mark.parametrize(("gpu", "here"), [(None, "here is none"), ((8, 0), r"this one has 8\.0")])
def test_fp8_needs_the_gpu_for_it(gpu: Any, here: str) -> None:
    wanted = KernelConfig(fp8_format="hybrid")
    with pytest.raises(ConfigError, match=rf"fp8_format='hybrid' needs .* 8\.9 .*{here}"):
        choose_linears(gpu, wanted)
    assert choose_linears(H100, wanted).kernel == "fp8"
