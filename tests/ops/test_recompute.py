"""A backward pass apart has the gradients of one that is not."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.ops.recompute import backward_apart


def test_gradients_reach_what_is_closed_over() -> None:
    """f(x, y) = sin(x) y, so that df/dx = cos(x) y and df/dy = sin(x)."""
    x, y = jnp.linspace(0, 1, 5), jnp.linspace(2, 3, 5)

    def f(x: Any, y: Any) -> Any:
        return jnp.sum(backward_apart(lambda x, place: jnp.sin(x) * y * (place + 1))(x, jnp.int32(0)))

    dx, dy = jax.jit(jax.grad(f, argnums=(0, 1)))(x, y)
    np.testing.assert_allclose(dx, np.cos(x) * np.asarray(y), rtol=1e-6)
    np.testing.assert_allclose(dy, np.sin(x), rtol=1e-6)
