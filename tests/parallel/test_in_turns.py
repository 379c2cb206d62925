"""Chains that take turns give what each gives alone, and their legs follow each other as they should."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from megajax.parallel.side_by_side import side_by_side

LAYERS, TOKENS = 3, 8
OWN = PartitionSpec("ep")


def _region(function: Any) -> Any:
    return jax.shard_map(function, in_specs=OWN, out_specs=OWN, axis_names={"ep"}, check_vma=False)


def _layers(params: Any, x: Any) -> Any:
    """Work, tokens to all devices, work on all of them, results back, and work."""

    def layer(x: Any, kernels: Any) -> tuple[Any, None]:
        before, away, after = kernels
        h = jnp.tanh(x @ before)
        everywhere = _region(lambda h: jax.lax.all_gather(h, "ep", axis=0, tiled=True))(h)
        y = jnp.tanh(everywhere @ away)
        back = _region(lambda y: jax.lax.psum_scatter(y, "ep", scatter_dimension=0, tiled=True))(y)
        return x + back @ after, None

    return jax.lax.scan(layer, x, params)[0]


def _gradient(params: Any, x: Any) -> Any:
    """As a stage runs it: layers are computed again."""

    def again(params: Any, x: Any) -> Any:
        return jax.lax.scan(
            jax.checkpoint(lambda x, kernels: (_layers(jax.tree.map(lambda k: k[None], kernels), x), None)), x, params
        )[0]

    return jax.grad(lambda params, x: (again(params, x) ** 2).sum(), (0, 1))(params, x)


@pytest.fixture
def arguments() -> Any:
    rng = np.random.default_rng(0)

    def one(width: int) -> Any:
        kernels = [rng.normal(size=(LAYERS, width, width)).astype(np.float32) / 2 for _ in range(3)]
        return tuple(map(jnp.asarray, kernels)), jnp.asarray(rng.normal(size=(TOKENS, width)), jnp.float32)

    return one(4), one(6)


@pytest.fixture(autouse=True)
def _on_a_mesh() -> Any:
    with jax.set_mesh(
        jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    ):
        yield


@pytest.mark.parametrize("second", [_layers, _gradient])
def test_each_gives_what_it_gives_alone(arguments: Any, second: Any) -> None:
    found = jax.jit(lambda a, b: side_by_side(_layers, a, second, b))(*arguments)
    alone = jax.jit(lambda a, b: (_layers(*a), second(*b)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, alone)


def _products_before(jaxpr: Any) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Of the products of a program by chain (its width) and number: those that must be done before one begins."""
    behind: dict[Any, set[tuple[int, int]]] = {}
    found: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for eqn in jaxpr.eqns:
        before = set().union(*(behind.get(atom, set()) for atom in eqn.invars if not isinstance(atom, Literal)))
        if eqn.primitive.name == "dot_general":
            width = eqn.outvars[0].aval.shape[-1]
            name = width, sum(chain == width for chain, _ in found)
            found[name] = before
            before = before | {name}
        behind.update(dict.fromkeys(eqn.outvars, before))
    return found


def test_a_leg_begins_when_that_of_the_other_is_done(arguments: Any) -> None:
    """Of the first (4 wide) and the second (6 wide), each with three products and a message between them."""
    jaxpr = jax.make_jaxpr(lambda a, b: side_by_side(_layers, a, _layers, b))(*arguments)
    [loop] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    before = _products_before(loop.params["jaxpr"].jaxpr)
    assert before[4, 0] == before[6, 0] == set()
    assert before[6, 1] == {(6, 0), (4, 0)}, "while the second's first message travels, the first computes"
    assert before[4, 1] == {(6, 0), (4, 0), (6, 1)}
    assert before[6, 2] == {(6, 0), (4, 0), (6, 1), (4, 1)}
    assert before[4, 2] == {(6, 0), (4, 0), (6, 1), (4, 1)}, "nothing is left that the second would send"
