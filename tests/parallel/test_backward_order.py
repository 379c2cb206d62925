"""The sum of an input's gradients waits for those of its kernels where it crosses devices; nothing else changes."""

# SPDX-License-Identifier: Apache-2.0
# S sequence, D features, F features inside
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from megajax.parallel.backward_order import kernels_beside_sums
from megajax.parallel.sharding import constrain, constrain_gradient

S, D, F = 4, 6, 8
RULES = (("batch", ("dp",)), ("residual_seq", ("tp",)), ("act_mlp", ("tp",)), ("act_embed", ()))


def product(x_SD: Any, w_DF: Any) -> Any:
    return x_SD @ w_DF


def backward(linear: Any) -> Any:
    """(x, gate, up, dy) -> (dx, d_gate, d_up) of a gated unit between two norms of a kind."""

    def unit(x_SD: Any, gate_DF: Any, up_DF: Any) -> Any:
        h_SD = constrain(jnp.tanh(x_SD), "residual_seq", "act_embed")
        return linear(h_SD, gate_DF) * linear(h_SD, up_DF)

    return lambda x, gate, up, dy: jax.vjp(unit, x, gate, up)[1](dy)


def backward_of_two(down: Any) -> Any:
    """(x, into, back, dy) -> (dx, d_into, d_back) of a linear map whose output is gathered before another's."""

    def unit(x_SD: Any, into_DF: Any, back_DF: Any) -> Any:
        h_SF = constrain_gradient(down(x_SD, into_DF), None, "act_embed")
        return down(jnp.tanh(h_SF) @ jnp.ones((F, D)), back_DF)

    return lambda x, into, back, dy: jax.vjp(unit, x, into, back)[1](dy)


@pytest.fixture
def arguments() -> tuple[Any, ...]:
    draw = np.random.default_rng(0)
    shapes = ((S, D), (D, F), (D, F), (S, F))
    return tuple(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)


def barriers(
    passes: Any, arguments: tuple[Any, ...], mesh_shape: dict[str, int], kernels: Sequence[int] = (1, 2)
) -> list[Any]:
    """Shapes that are tied together in the reordered pass, which gives the numbers of the pass as it was."""
    mesh = jax.make_mesh(tuple(mesh_shape.values()), tuple(mesh_shape), axis_types=(AxisType.Auto,) * len(mesh_shape))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        closed = jax.make_jaxpr(passes)(*arguments)
        ordered = kernels_beside_sums(closed, kernels)
        eqns = jax.make_jaxpr(ordered)(*arguments).jaxpr.eqns
        for mine, its in zip(jax.jit(ordered)(*arguments), jax.jit(passes)(*arguments), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-5)
    return [[var.aval.shape for var in e.outvars] for e in eqns if e.primitive.name == "optimization_barrier"]


@pytest.mark.parametrize("linear", [product, jax.checkpoint(product, prevent_cse=False)], ids=["plain", "recomputed"])
def test_the_sum_and_both_kernels_are_tied_once(linear: Any, arguments: tuple[Any, ...]) -> None:
    assert barriers(backward(linear), arguments, {"dp": 1, "tp": 2}) == [[(S, D), (D, F), (D, F)]]


def test_a_kernel_that_no_sum_has_is_tied_to_the_gradient_that_is_gathered(arguments: tuple[Any, ...]) -> None:
    again = jax.checkpoint(product, prevent_cse=False)
    assert barriers(backward_of_two(again), arguments, {"dp": 1, "tp": 2}) == [[(S, F), (D, F)]]


def test_linears_that_are_computed_again_together_are_tied_one_by_one(arguments: tuple[Any, ...]) -> None:
    again = jax.checkpoint(product, prevent_cse=False)

    def mlp(h_SD: Any, gate_DF: Any, up_DF: Any) -> Any:
        return again(h_SD, gate_DF) * again(h_SD, up_DF)

    def layer(x_SD: Any, gate_DF: Any, up_DF: Any, down_FD: Any) -> Any:
        h_SD = constrain(jnp.tanh(x_SD), "residual_seq", "act_embed")
        return again(jax.checkpoint(mlp, prevent_cse=False)(h_SD, gate_DF, up_DF), down_FD)

    def passes(x_SD: Any, gate_DF: Any, up_DF: Any, dy_SF: Any, down_FD: Any) -> Any:
        return jax.vjp(layer, x_SD, gate_DF, up_DF, down_FD)[1](dy_SF[:, :D])

    tied = barriers(passes, (*arguments, jnp.ones((F, D))), {"dp": 1, "tp": 2}, kernels=(1, 2, 3))
    assert tied == [[(S, D), (D, F), (D, F)]]


@pytest.mark.parametrize("mesh_shape", [{"dp": 2, "tp": 1}, {"dp": 2, "tp": 2}])
def test_nothing_is_tied_where_kernels_would_be_waited_for(mesh_shape: Any, arguments: tuple[Any, ...]) -> None:
    assert barriers(backward(product), arguments, mesh_shape) == []
