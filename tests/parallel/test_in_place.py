"""Loops that write into larger arrays give what NumPy says, and hold no second copy of what they write."""

# SPDX-License-Identifier: Apache-2.0
# N layers, D features
from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.parallel.in_place import Row, Target, in_place

N, D = 3, 4
Array = jax.Array


def layers(w_NDD: Array, x_D: Array) -> list[Array]:
    """(output, inputs of all layers, something that no loop makes)."""
    x_D, inputs = jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), x), x_D, w_NDD)
    return [x_D, inputs, 2 * w_NDD]


def by_hand(w_NDD: np.ndarray, x_D: np.ndarray) -> list[np.ndarray]:
    inputs = []
    for w in w_NDD:
        inputs.append(x_D)
        x_D = np.tanh(w @ x_D)
    return [x_D, np.stack(inputs), 2 * w_NDD]


@pytest.fixture
def given() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(2, 5, N, D, D)).astype(np.float32), draw.normal(size=D).astype(np.float32)


def add(old: Array, new: Array) -> Array:
    return old + new


def test_rows_are_read_and_written_where_they_lie(given: tuple[np.ndarray, np.ndarray]) -> None:
    weights, x = given
    buffer, total = np.ones((2, N, D), np.float32), np.ones((4, N, D, D), np.float32)

    @jax.jit
    def run(weights: Array, buffer: Array, total: Array) -> list[Array]:
        one, three = jnp.int32(1), jnp.int32(3)
        into = [None, Target(Row(buffer, (one,))), Target(Row(total, (three,)), add)]
        return in_place(layers, [Row(weights, (one, three)), jnp.asarray(x)], into)

    output, buffer_after, total_after = run(weights, buffer, total)
    expected = by_hand(weights[1, 3], x)
    np.testing.assert_allclose(output, expected[0], rtol=1e-5)
    np.testing.assert_allclose(buffer_after, [buffer[0], expected[1]], rtol=1e-5)
    total[3] += expected[2]
    np.testing.assert_allclose(total_after, total, rtol=1e-5)


@pytest.mark.parametrize("grouped", ["reshape", "jit", "checkpoint"])
def test_what_only_groups_or_reshapes_is_looked_through(given: tuple[np.ndarray, np.ndarray], grouped: str) -> None:
    weights, x = given
    sums, ran = np.ones((1, N, D), np.float32), []

    def inputs(w_NDD: Array, x_D: Array) -> Array:
        return layers(w_NDD, x_D)[1]

    wraps = {
        "reshape": lambda w, x: inputs(w, x).reshape(N, 1, D).reshape(N, D),
        "jit": jax.jit(inputs),
        "checkpoint": jax.checkpoint(inputs, prevent_cse=False),
    }

    def note(old: Array, new: Array) -> Array:
        ran.append(new.shape)
        return old + new

    result = in_place(
        lambda w, x: [wraps[grouped](w, x)],
        [Row(jnp.asarray(weights[0]), (jnp.int32(2),)), jnp.asarray(x)],
        [Target(Row(jnp.asarray(sums), (jnp.int32(0),)), note)],
    )
    np.testing.assert_allclose(result[0], sums + by_hand(weights[0, 2], x)[1], rtol=1e-5)
    assert {size for shape in ran for size in shape} <= {1, D}, "a layer at a time"


def test_a_result_that_something_else_reads_is_whole(given: tuple[np.ndarray, np.ndarray]) -> None:
    weights, x = given

    def twice(w_NDD: Array, x_D: Array) -> list[Array]:
        inputs = layers(w_NDD, x_D)[1]
        return [inputs, jnp.sum(inputs)]

    sums = jnp.ones((N, D))
    after, total = in_place(twice, [jnp.asarray(weights[0, 0]), jnp.asarray(x)], [Target(Row(sums), add), None])
    inputs = by_hand(weights[0, 0], x)[1]
    np.testing.assert_allclose(after, sums + inputs, rtol=1e-5)
    np.testing.assert_allclose(total, inputs.sum(), rtol=1e-5)


def test_gradients_are_added_up_without_a_second_copy() -> None:
    count, size = 8, 64
    w, x = jnp.zeros((count, size, size)), jnp.zeros(size)

    def gradients(w: Array, x: Array) -> Sequence[Array]:
        return [jax.grad(lambda w: jnp.sum(layers(w, x)[0]))(w)]

    def apart(total: Array, w: Array, x: Array) -> Array:
        return total + gradients(w, x)[0]

    def here(total: Array, w: Array, x: Array) -> Array:
        return in_place(gradients, [w, x], [Target(Row(total), add)])[0]

    def temporary(function: object) -> int:
        compiled = jax.jit(function, donate_argnums=0).lower(w, w, x).compile()  # type: ignore[arg-type]
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(apart) > w.nbytes
    assert temporary(here) < w.nbytes / 2
