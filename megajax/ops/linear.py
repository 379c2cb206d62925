"""Matrix product over the last dim."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp

Array = jax.Array


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`x @ kernel + bias`. x [..., I], kernel [I, O], bias [O] -> [..., O] in x's dtype."""
    y = jnp.dot(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)
