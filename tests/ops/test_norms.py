"""Norms against Megatron's (tests/golden/mcore_norms), and their precision in bf16."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.norms import l2_norm, layer_norm, rms_norm


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_norms_equal_megatrons(golden: Path, epsilon: float) -> None:
    inputs, expected = (np.load(golden / "mcore_norms" / f"{name}.npz") for name in ("inputs", "outputs"))
    x, weight, bias = (jnp.asarray(inputs[name]) for name in ("x", "weight", "bias"))
    tag = {1e-5: "1e-05", 1e-2: "0.01"}[epsilon]
    close(layer_norm(x, weight, bias, epsilon=epsilon), expected[f"LayerNorm_eps{tag}"])
    close(rms_norm(x, weight, epsilon=epsilon), expected[f"RMSNorm_eps{tag}"])
    close(l2_norm(x, epsilon=1e-6), expected["L2Norm_1e-6"])


def float64_norm(kind: str, x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return y if kind == "l2" else y * scale + (bias if kind == "layer" else 0)


@pytest.mark.parametrize("kind", ["layer", "rms", "l2"])
def test_gradients_equal_finite_differences_in_float64(kind: str) -> None:
    rng = np.random.default_rng(0)
    x, scale, bias, cotangent = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=8), rng.normal(size=(3, 8))
    functions = {
        "layer": lambda x, s, b: layer_norm(x, s, b, epsilon=1e-5),
        "rms": lambda x, s, b: rms_norm(x, s, epsilon=1e-5) + 0 * b,
        "l2": lambda x, s, b: l2_norm(x, epsilon=1e-5) + 0 * s + 0 * b,
    }
    arguments = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    gradients = jax.vjp(functions[kind], *arguments)[1](jnp.asarray(cotangent, jnp.float32))
    for i, gradient in enumerate(gradients):
        numeric = np.zeros_like((x, scale, bias)[i])
        for index in np.ndindex(*numeric.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy(), scale.copy(), bias.copy()]
                moved[i][index] += step
                sides.append((float64_norm(kind, *moved) * cotangent).sum())
            numeric[index] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, atol=2e-5, rtol=1e-4)


def test_statistics_of_bf16_inputs_are_taken_in_fp32() -> None:
    x = (100 + jnp.arange(64.0)).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    y = layer_norm(x, jnp.ones(64), None, epsilon=1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-2)
