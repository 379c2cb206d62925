"""A backward pass in two parts gives what it gives in one, and computes nothing twice."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.parallel.split_backward import split

LAYERS, WIDTH, ROWS = 3, 8, 4


def _stage(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x + jax.checkpoint(jax.nn.gelu)(jax.jit(jnp.matmul)(x, p["up"])) @ p["down"] + p["bias"], None

    return jax.lax.scan(layer, x, params)[0]


def _dots(function: Any, *args: Any) -> int:
    """Matrix products, those of a scan once a trip."""

    def count(jaxpr: Any, times: int) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            inner = [p for p in eqn.params.values() if type(p).__name__ in ("ClosedJaxpr", "Jaxpr")]
            trips = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            total += times * (eqn.primitive.name == "dot_general")
            total += sum(count(getattr(p, "jaxpr", p), trips) for p in inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr, 1)


def test_two_halves_are_the_whole() -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "up": normal(LAYERS, WIDTH, 2 * WIDTH),
        "down": normal(LAYERS, 2 * WIDTH, WIDTH),
        "bias": normal(LAYERS, WIDTH),
    }
    x, g = normal(ROWS, WIDTH), normal(ROWS, WIDTH)
    kept, structure = jax.tree.flatten(jax.vjp(_stage, params, x)[1])

    def backward(*args: jax.Array) -> list[jax.Array]:
        d_params, dx = jax.tree.unflatten(structure, args[:-1])(args[-1])
        return [*jax.tree.leaves(d_params), dx]

    cut = split(backward, *kept, g, is_first=[False] * 3 + [True], at_hand=[True] * len(kept) + [False])
    [dx], aside = cut.first(*kept, g)
    later = [leaf if needed else None for leaf, needed in zip(kept, cut.later_arguments, strict=False)]
    gradients = cut.second(*later, None, aside=aside)
    for found, wanted in zip([*gradients, dx], backward(*kept, g), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    # The weights themselves are not needed for their gradients: nothing waits for them.
    shapes = {leaf.shape for leaf in later if leaf is not None}
    assert params["up"].shape not in shapes
    assert params["down"].shape not in shapes
    first = _dots(cut.first, *kept, g)
    second = _dots(lambda *aside: cut.second(*later, None, aside=aside), *aside)
    assert (first, second) == (2 * LAYERS, 2 * LAYERS)
    assert _dots(backward, *kept, g) == first + second
