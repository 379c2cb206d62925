"""Functions side by side give what each gives alone, and their loops and branches are one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.parallel.hlo import executed
from megajax.parallel.side_by_side import side_by_side
from megajax.parallel.skipped import run_if

L, WIDTH = 3, 4


def _layers(params: Any, wanted: Any, x: Any) -> Any:
    """Some rows are skipped, and each leaves something behind."""

    def layer(x: Any, row: Any) -> Any:
        kernel, is_wanted = row
        y = run_if(is_wanted, lambda k, x: jnp.tanh(x @ k), kernel, x, otherwise=x, name="rows")
        return y, y.sum()

    return jax.lax.scan(layer, x, (params, wanted))


def _forward(params: Any, wanted: Any, x: Any) -> Any:
    """With what the derivative needs, as a stage of a pipeline keeps it."""
    result, pullback = jax.vjp(lambda params, x: _layers(params, wanted, x), params, x)
    return result, jax.tree.leaves(pullback)


def _gradient(params: Any, wanted: Any, x: Any) -> Any:
    """A loop from the last layer to the first, behind another one."""

    def loss(params: Any, x: Any) -> Any:
        y, sums = _layers(params, wanted, x)
        return (y**2).sum() + sums[1]

    return jax.grad(loss, (0, 1))(params, x)


@pytest.fixture
def arguments() -> list[Any]:
    rng = np.random.default_rng(0)

    def one() -> Any:
        params = rng.normal(size=(L, WIDTH, WIDTH)).astype(np.float32)
        return jnp.asarray(params), jnp.asarray(rng.random(L) < 0.6), jnp.asarray(params[0, :2])

    return [one(), one()]


def _whiles(function: Any, *args: Any) -> list[Any]:
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    return [instruction for instruction, _ in executed(text) if instruction.opcode in ("while", "conditional")]


def test_each_gives_what_it_gives_alone(arguments: Any) -> None:
    found = jax.jit(lambda a, b: side_by_side(_forward, a, _gradient, b))(*arguments)
    alone = _forward(*arguments[0]), _gradient(*arguments[1])
    assert jax.tree.structure(found) == jax.tree.structure(alone)
    for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-6)


def test_loops_and_the_branches_in_them_are_one(arguments: Any) -> None:
    """Forward is a loop with a branch, its gradient two; the longest that fit are joined, a branch of each pair."""
    one_after_the_other = _whiles(lambda a, b: (_forward(*a), _gradient(*b)), *arguments)
    joined = _whiles(lambda a, b: side_by_side(_forward, a, _gradient, b), *arguments)
    assert [i.opcode for i in one_after_the_other].count("while") == 3
    assert [i.opcode for i in joined].count("while") == 2
    assert sorted(len(i.called) for i in joined if i.opcode == "conditional") == [2, 4]
    assert all("rows/" in i.op_name for i in joined if i.opcode == "conditional")


def test_loops_of_other_lengths_stay_apart(arguments: Any) -> None:
    short = jax.tree.map(lambda a: a[:2], arguments[1])
    joined = _whiles(lambda a, b: side_by_side(_layers, a, _layers, b), arguments[0], short)
    assert [i.trips for i in joined if i.opcode == "while"] in ([L, 2], [2, L])


def test_what_a_function_closes_over_and_returns_as_it_came(arguments: Any) -> None:
    (params, _, x), _ = arguments
    first, second = side_by_side(lambda a: (a, params[0] @ a.T), (x,), lambda: {"n": jnp.float32(2)}, ())
    np.testing.assert_array_equal(first[0], x)
    np.testing.assert_allclose(first[1], params[0] @ x.T, rtol=1e-6)
    assert second == {"n": 2}
