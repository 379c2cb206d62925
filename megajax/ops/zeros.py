"""Zeros to add to, that no other sum shares."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def zeros_beside(like: Any, given: T) -> tuple[Any, T]:
    """(zeros like a tree of arrays or shapes, given): zeros that come into being when what is given is there.

    XLA makes one array of all zeros of a shape. Sums that begin with it copy it first, and it stays until the last one
    has: of the largest temporaries of a step, such as the gradient of a head, one more.
    """
    zero, given = jax.lax.optimization_barrier((jnp.float32(0), given))
    return jax.tree.map(lambda leaf: jnp.broadcast_to(zero.astype(leaf.dtype), leaf.shape), like), given
