"""Activation functions by Megatron's names, and gated linear units."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from megajax.ops.recompute import recomputed_in_backward

Array = jax.Array
Activation = Callable[[Array], Array]


def squared_relu(x: Array) -> Array:
    """`relu(x)^2` (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def quick_gelu(x: Array) -> Array:
    """`x sigmoid(1.702 x)`, CLIP's approximation of gelu."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}


@recomputed_in_backward
def activate(x: Array, *, activation: Activation) -> Array:
    """`activation(x)`, keeping x alone for the backward pass. x [..., F]."""
    return activation(x)


@recomputed_in_backward
def gated(
    gate: Array, linear: Array, *, activation: Activation, clamp: float | None = None, offset: float = 0.0
) -> Array:
    """`activation(gate) * (linear + offset)`: a gated linear unit (arXiv:2002.05202). gate, linear [..., F].

    Keeps its two inputs alone for the backward pass. `clamp` bounds the gate from above only, and the linear half on
    both sides, before the activation (gpt-oss; Megatron `activation_func_clamp_value`).
    """
    if clamp is not None:
        gate = jnp.minimum(gate, clamp)
        linear = jnp.clip(linear, -clamp, clamp)
    return activation(gate) * (linear + offset)
