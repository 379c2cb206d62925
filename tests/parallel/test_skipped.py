"""A branch with its own derivative against `where`: values, gradients, what is kept, what runs where devices differ."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from megajax.parallel.hlo import executed
from megajax.parallel.skipped import run_if

N, WIDTH, LAYERS = 4, 8, 3


def layer(params: Any, x: Any, scale: Any, *, recomputed: bool = False) -> Any:
    def run(params: Any, x: Any) -> Any:
        return x + jnp.tanh(x @ params["in"]) @ params["out"] * scale

    return (jax.checkpoint(run) if recomputed else run)(params, x)


def stack(params: Any, x: Any, scale: Any, wanted: Any, *, branch: bool, recomputed: bool = False) -> Any:
    """Layers of which some are left out; `scale` is what they close over."""

    def step(x: Any, row: Any) -> Any:
        mine, here = row
        if branch:
            y = run_if(here, lambda p, x: layer(p, x, scale, recomputed=recomputed), mine, x, otherwise=x, name="rows")
        else:
            y = jnp.where(here, layer(mine, x, scale), x)
        return y, None

    return jax.lax.scan(step, x, (params, wanted))[0]


@pytest.fixture
def inputs() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((LAYERS, WIDTH, WIDTH)).astype(np.float32) for name in ("in", "out")}
    return params, rng.standard_normal((N, WIDTH)).astype(np.float32), np.float32(0.7)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)])
def test_equals_where(inputs: Any, wanted: tuple[bool, ...], recomputed: bool) -> None:
    def grads(**how: Any) -> Any:
        def loss(params: Any, x: Any, scale: Any) -> Any:
            return (stack(params, x, scale, jnp.array(wanted), **how) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)

    found, expected = grads(branch=True, recomputed=recomputed), grads(branch=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(("recomputed", "floats"), [(True, LAYERS * N * WIDTH), (False, 3 * LAYERS * N * WIDTH)])
def test_keeps_activations_and_no_parameters(inputs: Any, recomputed: bool, floats: int) -> None:
    """x, and tanh with its derivative where nothing is recomputed. Parameters are read again where they are."""
    params, x, scale = inputs

    def kept(params: Any, x: Any) -> Any:
        wanted = jnp.ones(LAYERS, bool)
        _, pullback = jax.vjp(lambda p, x: stack(p, x, scale, wanted, branch=True, recomputed=recomputed), params, x)
        return jax.tree.leaves(pullback)

    jaxpr = jax.make_jaxpr(kept)(params, x).jaxpr
    others = [var for var in jaxpr.outvars if var not in jaxpr.invars]
    assert sum(var.aval.size for var in others if var.aval.dtype == jnp.float32) <= floats + 1


def test_what_is_not_perturbed_has_no_gradient(inputs: Any) -> None:
    """The products for the gradient of the parameters are not in the program if nobody asks for it."""
    params, x, scale = inputs

    def products(argument: int) -> int:
        def loss(params: Any, x: Any) -> Any:
            mine = jax.tree.map(lambda p: p[0], params)
            y = run_if(x[0, 0] > 0, lambda p, x: layer(p, x, scale), mine, x, otherwise=x, name="rows")
            return (y**2).sum()

        text = jax.jit(jax.grad(loss, argument)).lower(params, x).compile().as_text() or ""
        return sum(instruction.opcode == "dot" for instruction, _ in executed(text))

    assert products(1) == 2 + 2  # forward, and back to x
    assert products(0) == 2 + 3  # forward, back to the hidden values, two kernels


def test_devices_may_differ(inputs: Any) -> None:
    """Two halves of the devices take different branches, in which each half sums over its own members."""
    params, x, _ = inputs
    mine = jax.tree.map(lambda p: p[0], params)
    mesh = jax.make_mesh((2, 2), ("pp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def region(mine: Any, x: Any) -> Any:
        def run(mine: Any, x: Any) -> Any:
            return x + jax.lax.psum(jnp.tanh(x @ mine["in"]) @ mine["out"], "tp")

        return run_if(jax.lax.axis_index("pp") == 1, run, mine, x, otherwise=x, name="rows")[None]

    def both(mine: Any, x: Any) -> Any:
        specs = {"in": P(None, "tp"), "out": P("tp")}
        whole = jax.shard_map(region, mesh=mesh, in_specs=(specs, P()), out_specs=P("pp"), check_vma=False)
        return whole(mine, x)

    plain, computed = jax.jit(both)(mine, x)
    np.testing.assert_array_equal(plain, x)
    np.testing.assert_allclose(computed, layer(mine, x, np.float32(1)), rtol=1e-5, atol=1e-5)
