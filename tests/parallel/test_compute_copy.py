"""Which parameters a program does nothing with but cast them, once: found, and told from all others."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.parallel.compute_copy import cast, cast_once

Array = jax.Array
X = jnp.ones(3, jnp.bfloat16)


def low(w: Array) -> Array:
    return w.astype(jnp.bfloat16)


def scanned(w: Array) -> Array:
    """A stack [3, 3, 3] of which each turn reads a row."""
    return jax.lax.scan(lambda x, row: (x @ low(row), None), X, w)[0]


def read_by_all_turns(w: Array) -> Array:
    return jax.lax.scan(lambda x, _: (x @ low(w[0]), None), X, None, length=2)[0]


@jax.custom_vjp
def own_rule(w: Array) -> Array:
    return X @ low(w[0])


own_rule.defvjp(lambda w: (own_rule(w), None), lambda kept, g: (jnp.zeros((3, 3, 3)),))

YES: dict[str, Callable[[Array], Any]] = {
    "one product": lambda w: X @ low(w[0]),
    "cast before it is cut": lambda w: X @ low(w)[0],
    "turned": lambda w: X @ low(w.transpose(0, 2, 1).reshape(9, 3)[:3]),
    "scanned": scanned,
    "recomputed": lambda w: jax.checkpoint(scanned)(w),
    "compiled apart": lambda w: jax.jit(scanned)(w),
    "two stacks of layers": lambda w: X @ low(w[:2])[0] @ low(w[2:])[0],
    "one branch or the other": lambda w: jax.lax.cond(X[0] > 0, lambda w: X @ low(w[0]), lambda w: X @ low(w[1]), w),
}
NO: dict[str, Callable[[Array], Any]] = {
    "twice": lambda w: X @ low(w)[0] @ low(w)[1],
    "in fp32 as well": lambda w: (X @ low(w[0])).sum() + (w**2).sum(),
    "in fp32": lambda w: X.astype(jnp.float32) @ w[0],
    "in every turn": read_by_all_turns,
    "given back": lambda w: (w, low(w)),
    "to another dtype": lambda w: w.astype(jnp.float16),
    "never": lambda w: X,
    "with a rule of its own": own_rule,
    "added to": lambda w: X @ low(w[0] + 1),
}


@pytest.mark.parametrize(("name", "expected"), [(name, True) for name in YES] + [(name, False) for name in NO])
def test_what_is_found(name: str, expected: bool) -> None:
    read = {**YES, **NO}[name]
    found = cast_once(lambda params: read(params["w"]), {"w": jnp.ones((3, 3, 3))}, jnp.bfloat16)
    assert found == {"w": expected}


@pytest.mark.parametrize("name", [name for name in YES if "branch" not in name])
def test_numbers_and_gradients_are_the_same(name: str) -> None:
    """Gradients come in the dtype of the copy, without having lost anything: they were of that dtype before."""
    read, w = YES[name], jax.random.normal(jax.random.key(0), (3, 3, 3))
    copy = cast({"w": w}, {"w": True}, jnp.bfloat16)["w"]

    def loss(w: Array) -> Array:
        return read(w).astype(jnp.float32).sum()

    assert copy.dtype == jnp.bfloat16 and float(loss(copy)) == float(loss(w))
    gradient = jax.grad(loss)(copy)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), jax.grad(loss)(w))


def test_what_has_the_dtype_already_stays() -> None:
    found = cast_once(lambda w: X @ low(w), jnp.ones((3, 3), jnp.bfloat16), jnp.bfloat16)
    assert found is False
