"""Activations and their gradients against Megatron's (tests/golden/mcore_activations)."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.activations import ACTIVATIONS, gated


def close(got: Any, expected: Any) -> None:
    # In the tail of the tanh gelu nearly equal numbers are subtracted: 3e-6 is the rounding of Megatron's side.
    np.testing.assert_allclose(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        ("gelu", "gelu_erf"),
        ("gelu_tanh", "gelu_tanh"),
        ("gelu_tanh", "fast_gelu"),
        ("silu", "silu"),
        ("squared_relu", "squared_relu"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_activation(golden: Path, ours: str, reference: str) -> None:
    inputs, expected = (np.load(golden / "mcore_activations" / f"{n}.npz") for n in ("inputs", "outputs"))
    close(ACTIVATIONS[ours](jnp.asarray(inputs["x"])), expected[reference])
    with jax.enable_x64(True):  # so that only one side of the gradient rounds
        x, cotangent = (jnp.asarray(inputs[name], jnp.float64) for name in ("x", "cot_97"))
        _, pullback = jax.vjp(ACTIVATIONS[ours], x)
        close(pullback(cotangent)[0], expected[f"{reference}/grad0"])


def split(y: Any, bias: Any = 0.0) -> Any:
    return jnp.split(y + bias, 2, axis=-1)


def glu(name: str, **options: Any) -> Callable[..., Any]:
    return lambda y, bias=0.0: gated(*split(y, bias), activation=ACTIVATIONS[name], **options)


def clamped(y: Any) -> Any:
    gate, linear = split(y)
    return jnp.concatenate([jnp.minimum(gate, 1.0), jnp.clip(linear, -1.0, 1.0)], axis=-1)


@pytest.mark.parametrize(
    ("reference", "function", "given", "cotangent"),
    [
        ("swiglu", glu("silu"), ("y",), "cot_5x12"),
        ("bias_swiglu", glu("silu"), ("y", "bias"), "cot_5x12"),
        ("geglu", glu("gelu_tanh"), ("y",), "cot_5x12"),
        ("bias_geglu", glu("gelu_tanh"), ("y", "bias"), "cot_5x12"),
        ("bias_gelu", lambda y, bias: ACTIVATIONS["gelu_tanh"](y + bias), ("y", "bias"), "cot_5x24"),
        (
            "weighted_quick_geglu_clamp1.0_off1.0",
            lambda y, w: w * glu("quick_gelu", clamp=1.0, offset=1.0)(y),
            ("y", "weights"),
            "cot_5x12",
        ),
        (  # this kernel clamps before it adds the bias, unlike the unfused path of the same options
            "weighted_bias_quick_geglu_clamp1.0_off1.0",
            lambda y, bias, w: w * glu("quick_gelu", offset=1.0)(clamped(y), bias),
            ("y", "bias", "weights"),
            "cot_5x12",
        ),
        (
            "weighted_bias_quick_geglu_clampNone_off0.0",
            lambda y, bias, w: w * glu("quick_gelu")(y, bias),
            ("y", "bias", "weights"),
            "cot_5x12",
        ),
        ("weighted_swiglu", lambda y, w: w * glu("silu")(y), ("y", "weights"), "cot_5x12"),
    ],
    ids=lambda value: value if isinstance(value, str) and "cot" not in value else "",
)
def test_fused_forms(golden: Path, reference: str, function: Any, given: tuple[str, ...], cotangent: str) -> None:
    inputs, expected = (np.load(golden / "mcore_activations" / f"{n}.npz") for n in ("inputs", "outputs"))
    y, pullback = jax.vjp(function, *(jnp.asarray(inputs[name]) for name in given))
    close(y, expected[reference])
    for i, gradient in enumerate(pullback(jnp.asarray(inputs[cotangent]))):
        close(gradient, expected[f"{reference}/grad{i}"])


def test_clamp_bounds_the_gate_above_only_and_the_linear_half_on_both_sides() -> None:
    x = jnp.array([-9.0, 9.0])
    one = jnp.ones(2)
    np.testing.assert_allclose(gated(x, one, activation=jnp.positive, clamp=2.0), [-9.0, 2.0])
    np.testing.assert_allclose(gated(one, x, activation=jnp.positive, clamp=2.0, offset=1.0), [-1.0, 3.0])
