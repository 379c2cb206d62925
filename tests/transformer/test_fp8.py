"""Products in fp8 against the same rounding in NumPy, on a mesh against one device."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from megajax.config import Config, ConfigError, KernelConfig, ParallelConfig, TransformerConfig
from megajax.config_kernels import Fp8
from megajax.kernels import ExpertsUse, choose_experts, choose_linears
from megajax.parallel.mesh import make_mesh
from megajax.parallel.sharding import axis_rules, logical_axes, specs_of_axes
from megajax.training import backend
from megajax.transformer.fp8 import FORMATS, fp8_product, next_meta
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
    y, vjp = jax.vjp(lambda x, w: fp8_product(Fp8(fp8), AXES, x, w), x, w)
    x8, w8, g8 = rounded(x, forward), rounded(w, forward), rounded(dy, backward)
    expected = x8 @ w8, g8 @ w8.T, x8.reshape(-1, 16).T @ g8.reshape(-1, 8)
    for mine, theirs in zip((y, *vjp(jnp.asarray(dy))), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    exact = x @ w
    assert np.abs(np.asarray(y) - exact).max() < 0.1 * np.abs(exact).max()


def test_zeros_and_large_numbers() -> None:
    assert not np.asarray(fp8_product(Fp8("e4m3"), AXES, jnp.zeros((4, 16)), jnp.ones((16, 8)))).any()
    x = jnp.asarray(RNG.normal(size=(4, 16)), jnp.bfloat16)
    w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
    y = fp8_product(Fp8("e4m3"), AXES, x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fp8_product(Fp8("e4m3"), AXES, x * 2.0**60, w * 2.0**-40), y * 2.0**20)


class TwoLinears(nn.Module):
    """Up and down again, as in an MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        column = ColumnParallelLinear(self.config, 64, "mlp", use_bias=True, fp8=Fp8("hybrid"), name="up")
        row = RowParallelLinear(self.config, 32, "mlp", use_bias=True, fp8=Fp8("hybrid"), name="down")
        return row(column(x))


CONFIG = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=16)


@pytest.mark.usefixtures("sums_of_53_bits")
def test_every_mesh_computes_the_same() -> None:
    """Under tensor and sequence parallelism and ZeRO-3."""
    x = jnp.asarray(RNG.normal(size=(4, 8, 32)), jnp.float32)
    model = TwoLinears(CONFIG.replace(params_dtype="float64"))  # pyright: ignore
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
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12 * float(jnp.abs(theirs).max()))


def test_parts_of_a_tensor_have_one_scale() -> None:
    """In a region that sees its own part alone, as replicas do that add up their own gradients."""
    x, kernel = (jnp.asarray(RNG.normal(size=size), jnp.float32) for size in ((8, 16), (16, 8)))
    x *= jnp.arange(1.0, 9.0)[:, None]
    mesh = make_mesh(ParallelConfig(), jax.devices()[:4])
    wanted = fp8_product(Fp8("e4m3"), AXES, x, kernel)
    specs = PartitionSpec("dp"), PartitionSpec()
    apart = jax.shard_map(
        lambda x, kernel: fp8_product(Fp8("e4m3"), AXES, x, kernel), in_specs=specs, out_specs=specs[0], mesh=mesh,
        axis_names={"dp"}, check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(apart)(x, kernel), wanted, rtol=1e-5, atol=1e-5)


def test_fp8_without_fused_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp8_format='e4m3' is not possible with transformer_impl='local'"):
        KernelConfig(fp8_format="e4m3", transformer_impl="local")


def test_recipes_of_ones_own_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp8_recipe='custom' is not supported; use one of 'tensorwise', 'delayed'"):
        choose_linears(H100, KernelConfig(fp8_format="e4m3", fp8_recipe="custom"))


@pytest.mark.parametrize(("gpu", "here"), [(None, "here is none"), ((8, 0), r"this one has 8\.0")])
def test_fp8_needs_the_gpu_for_it(gpu: Any, here: str) -> None:
    wanted = KernelConfig(fp8_format="hybrid")
    with pytest.raises(ConfigError, match=rf"fp8_format='hybrid' needs .* 8\.9 .*{here}"):
        choose_linears(gpu, wanted)
    assert str(choose_linears(H100, wanted)) == "linears: fp8, by cuBLASLt, scaled by each tensor's largest magnitude"


DELAYED = Fp8("hybrid", "delayed", margin=1, amax_history_len=4, amax_compute_algo="max")


def cast(x: np.ndarray, scale: Any, dtype: Any) -> np.ndarray:
    """Transformer Engine's delayed scaling: times a scale that is given, saturated, rounded, and back."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x * np.float32(scale), -largest, largest).astype(dtype).astype(np.float64) / float(scale)


@pytest.mark.parametrize("wgrad", [True, False])
def test_delayed_scaling_equals_numpy(wgrad: bool) -> None:
    fp8 = dataclasses.replace(DELAYED, wgrad=wgrad)
    x, w, dy = (RNG.normal(size=size).astype(np.float32) for size in ((24, 16), (16, 8), (24, 8)))
    scales = 64.0, 1024.0, 4096.0  # the second one makes some weights saturate
    meta = np.zeros((3, 5), np.float32)
    meta[:, 0] = 1 / np.array(scales)
    y, vjp = jax.vjp(lambda x, w, meta: fp8_product(fp8, AXES, x, w, meta), x, w, meta)
    x8, w8 = (cast(a, scale, ml_dtypes.float8_e4m3fn) for a, scale in zip((x, w), scales, strict=False))
    assert np.abs(w8).max() < np.abs(w).max()
    g8 = cast(dy, scales[2], ml_dtypes.float8_e5m2)
    expected = x8 @ w8, g8 @ w8.T, x8.T @ g8 if wgrad else x.T @ dy
    *products, dmeta = (y, *vjp(jnp.asarray(dy)))
    for mine, theirs in zip(products, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(dmeta[:, 1], [np.abs(a).max() for a in (x, w, dy)])
    assert not np.asarray(dmeta)[:, [0, 2, 3, 4]].any()


@pytest.mark.parametrize("algo", ["most_recent", "max"])
def test_next_scales(algo: Any) -> None:
    """Transformer Engine's rule: largest / amax / 2^margin, and as before where there was nothing but zeros."""
    fp8 = dataclasses.replace(DELAYED, amax_compute_algo=algo)
    seen = [[8.0, 0.0, 1e-3], [2.0, 0.0, 4e-3], [4.0, 0.0, 0.0]]
    meta = jnp.zeros((3, 5))
    scale = np.ones(3)
    for step, amax in enumerate(seen):
        gradient = jnp.zeros((3, 5)).at[:, 1].set(jnp.array(amax))
        meta = jax.jit(next_meta, static_argnums=0)(fp8, meta, gradient)
        window = np.max(seen[: step + 1], axis=0) if algo == "max" else np.array(amax)
        for row, largest in enumerate((448.0, 448.0, 57344.0)):
            scale[row] = largest / window[row] / 2 if window[row] else scale[row]
        np.testing.assert_allclose(1 / meta[:, 0], scale, rtol=1e-6)
    np.testing.assert_allclose(meta[:, 1:], np.stack([*seen[::-1], [0] * 3], axis=1), rtol=1e-7)


def test_first_and_last_layers_compute_without_fp8() -> None:
    config = CONFIG.replace(
        num_layers=6, first_last_layers_bf16=True, num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1
    )
    assert [config.for_layer(i).leaves_fp8_out for i in range(6)] == [True, True, False, False, False, True]
    assert not config.for_further_layer(0).leaves_fp8_out
    x = jnp.asarray(RNG.normal(size=(4, 32)), jnp.float32)

    def linear(config: TransformerConfig) -> ColumnParallelLinear:
        return ColumnParallelLinear(config, 64, "mlp", use_bias=False, fp8=Fp8("hybrid"))

    params = linear(config.for_layer(3)).init(jax.random.key(0), x)
    exact = x @ nn.unbox(params)["params"]["kernel"]
    found = [np.asarray(linear(config.for_layer(i)).apply(params, x)) for i in (1, 3)]
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-6)
    assert 1e-3 < np.abs(found[1] - exact).max() < 0.1


@pytest.mark.parametrize(
    ("kernels", "layers", "says"),
    [
        ({"fp8_recipe": "delayed"}, {}, "first_last_layers_bf16=True is not possible with fp8_recipe='delayed'"),
        ({}, {"num_layers_at_start_in_bf16": 3}, "num_layers_at_start_in_bf16=3 must lie between 0 and 2"),
        (
            {},
            {"num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0},
            "with 0 layers at start and end has no effect",
        ),
    ],
)
def test_layers_in_bf16_that_cannot_be(
    kernels: dict[str, Any], layers: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "gpu_capability", lambda device: H100)
    config = Config(
        model_family="gpt",
        model=CONFIG.replace(num_layers=4, first_last_layers_bf16=True, **layers),
        kernels=KernelConfig(fp8_format="hybrid", **kernels),
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
    )
    with pytest.raises(ConfigError, match=says):
        backend.choose_backend(config, make_mesh(config.parallel, jax.devices()[:2]))


def test_what_experts_get() -> None:
    use = ExpertsUse(dtype="bfloat16", fp8="tensorwise")
    assert choose_experts(use, H100, "auto").kernel == "grouped-fp8"
    assert choose_experts(use, H100, "unfused").kernel == "blocks-fp8"
    for recipe in ("delayed", "blockwise", "mxfp8"):
        assert choose_experts(dataclasses.replace(use, fp8=recipe), H100, "auto").kernel == f"grouped-fp8-{recipe}"
    of_b200 = dataclasses.replace(use, fp8="blockwise", as_mxfp8=True)
    assert "in Pallas, fp8 as MXFP8, scaled by 128" in str(choose_experts(of_b200, (10, 0), "auto"))
    assert choose_experts(of_b200, (10, 0), "unfused").kernel == "blocks-fp8-blockwise"
    misfit = choose_experts(dataclasses.replace(use, aligned=False), H100, "auto")
    assert (misfit.kernel, "or of 32 for fp8" in misfit.why) == ("blocks-fp8", True)
    padded = choose_experts(dataclasses.replace(use, padded=True), H100, "auto")
    assert (padded.kernel, "fp8 is for experts that drop no token" in padded.why) == ("gemm", True)
