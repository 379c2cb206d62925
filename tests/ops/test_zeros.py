"""Zeros of their own are zeros, and what they wait for stays as it is."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from megajax.ops.zeros import zeros_beside


def test_zeros_are_made_beside_what_is_there() -> None:
    x = jnp.arange(6.0).reshape(2, 3)
    zeros, same = jax.jit(lambda x: zeros_beside({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": x}, x))(x)
    assert zeros["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(zeros["a"].astype(jnp.float32), np.zeros((2, 3)))
    np.testing.assert_array_equal(zeros["b"], np.zeros((2, 3)))
    np.testing.assert_array_equal(same, x)


def test_two_sums_of_a_shape_begin_with_zeros_of_their_own() -> None:
    def sums(x: jax.Array) -> tuple[jax.Array, ...]:
        one, x = zeros_beside(x, x)
        other, x = zeros_beside(x, x)
        return one + x, other - x

    text = jax.jit(sums).lower(jnp.ones((2, 3))).as_text()
    assert text.count("stablehlo.broadcast_in_dim") == 2
    assert text.count("stablehlo.optimization_barrier") == 2
