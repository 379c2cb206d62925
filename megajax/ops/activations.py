"""Activation functions by Megatron's names, and gated linear units."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


def squared_relu(x: Array) -> Array:
    """`relu(x)^2` (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def quick_gelu(x: Array) -> Array:
    """`x sigmoid(1.702 x)`, CLIP's approximation of gelu."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}


def gated(
    gate: Array, linear: Array, activation: Callable[[Array], Array], *, clamp: float | None = None, offset: float = 0.0
) -> Array:
    """`activation(gate) * (linear + offset)`: a gated linear unit (arXiv:2002.05202). gate, linear [..., F].

    `clamp` bounds the gate from above only, and the linear half on both sides, before the activation (gpt-oss;
    Megatron `activation_func_clamp_value`).
    """
    if clamp is not None:
        gate = jnp.minimum(gate, clamp)
        linear = jnp.clip(linear, -clamp, clamp)
    return activation(gate) * (linear + offset)
