"""Matrix product over the last dim, laid out so that every gradient is one plain 2-D product."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp

Array = jax.Array


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`x @ kernel + bias`. x [..., I], kernel [I, O], bias [O] -> [..., O] in x's dtype.

    The leading dims are flattened first: with two of them to contract, XLA:CPU writes transposed copies of both
    operands before each weight gradient, which costs a third of the step.
    """
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
