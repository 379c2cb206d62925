"""A loss on the side: it leaves a value as it is, and sends its own gradient back through it."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def attach(x: Array, y: Any, gradient: Any) -> Array:
    """x; but whatever is differentiated through it, y receives `gradient` as well.

    With y a loss and its weight as the gradient, derivatives come out as if weight * y were added to the final loss,
    from within a scan, a recomputed layer or a stage of a pipeline, none of which has to hand y out. Megatron:
    `MoEAuxLossAutoScaler` in `transformer/moe/moe_utils.py`.

    Args:
      x: what is used further on.
      y: tree of arrays. gradient: tree like y.
    """
    return x


def _forward(x: Array, y: Any, gradient: Any) -> tuple[Array, tuple[Any, Any]]:
    return x, (y, gradient)


def _backward(saved: tuple[Any, Any], dx: Array) -> tuple[Array, Any, Any]:
    y, gradient = saved
    d_y = jax.tree.map(lambda value, d: jnp.broadcast_to(d, value.shape).astype(value.dtype), y, gradient)
    return dx, d_y, jax.tree.map(jnp.zeros_like, gradient)


attach.defvjp(_forward, _backward)
