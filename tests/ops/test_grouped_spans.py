"""Experts that take their rows a span at a time, against a sum over all experts, and how much they compute and hold."""

# SPDX-License-Identifier: Apache-2.0
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.grouped import Groups, grouped_bias, grouped_matmul, place_grouped, round_up
from megajax.ops.grouped_fp8 import LOOP_PARTS, fp8_grouped_kernel
from megajax.ops.grouped_spans import span_of, through_spans
from megajax.parallel.gradient_sums import FP8_META
from megajax.parallel.hlo import executed

N, K, E, D, F, BLOCK = 40, 2, 4, 6, 10, 8
WORST = N * K + E * (BLOCK - 1)


def mlp(params: Any, x: Any, probs: Any, groups: Groups | None) -> Any:
    h = jnp.tanh(grouped_matmul(x, params["up"], groups) + grouped_bias(params["bias"], x, groups))
    return grouped_matmul(h * probs[..., None].astype(x.dtype), params["down"], groups)


def spans(params: Any, x: Any, probs: Any, ids: Any, *, span: int) -> Any:
    where, groups = place_grouped(ids, E, round_up(WORST, span), BLOCK)
    return through_spans(mlp, params, x, probs, where, groups, span)


def all_experts(params: Any, x: Any, probs: Any, ids: Any) -> Any:
    """Every token through every expert, weighted; an id of E counts for nothing."""
    weights = (jax.nn.one_hot(ids, E) * probs[..., None]).sum(1)
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]) + params["bias"])
    return jnp.einsum("tef,te,efd->td", hidden, weights, params["down"])


@pytest.fixture
def inputs() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        "up": rng.standard_normal((E, D, F)),
        "bias": rng.standard_normal((E, F)),
        "down": rng.standard_normal((E, F, D)),
    }
    ids = np.stack([rng.permutation(E + 1)[:K] for _ in range(N)])  # E: another device's
    ids[:, 0] = np.where(ids[:, 0] == 2, E, ids[:, 0])
    ids[:, 1] = np.where(ids[:, 1] == 2, E, ids[:, 1])  # nobody chooses expert 2
    x, probs = rng.standard_normal((N, D)), rng.uniform(size=(N, K))
    params, x, probs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x, probs))
    return params, x, probs, jnp.asarray(ids, jnp.int32)


def grads(function: Any, inputs: Any) -> Any:
    *moving, ids = inputs
    weights = jnp.arange(D, dtype=jnp.float32)
    loss = lambda *moving: (function(*moving, ids) * weights).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*moving)


@pytest.mark.parametrize("span", [BLOCK, 3 * BLOCK, 16 * BLOCK])
def test_equals_the_sum_over_all_experts(inputs: Any, span: int) -> None:
    """Spans shorter than a group, that cut groups, and longer than all rows."""
    found, expected = grads(partial(spans, span=span), inputs), grads(all_experts, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_no_buffer_is_as_long_as_the_worst_case(inputs: Any) -> None:
    """No array of floats has a row for each that could come."""
    params, x, probs, ids = inputs

    def step(params: Any, x: Any, probs: Any) -> Any:
        return (spans(params, x, probs, ids, span=2 * BLOCK) ** 2).sum()

    text = jax.jit(jax.grad(step, (0, 1, 2))).lower(params, x, probs).compile().as_text() or ""
    shapes = [instruction.shape for instruction, _ in executed(text)]
    assert any(f"f32[{2 * BLOCK},{F}]" in shape for shape in shapes)
    assert not any(f"f32[{round_up(WORST, 2 * BLOCK)}," in shape for shape in shapes)


def test_a_span_has_room_for_what_a_router_that_balances_gives() -> None:
    for average, block in ((4096, 512), (100, 128), (7, 8)):
        fullest = E * round_up(average, block)
        assert fullest <= span_of(average, E, block) <= 1.25 * fullest + E * block


def test_magnitudes_of_spans_do_not_add_up() -> None:
    """What experts report of their rows for delayed scaling in fp8: the largest counts."""
    rng, tokens, span = np.random.default_rng(1), 3 * N, 32
    x, w = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in ((tokens, 32), (E, 32, 32)))
    ids, probs = jnp.asarray(rng.integers(E - 1, size=(tokens, 1)), jnp.int32), jnp.ones((tokens, 1), jnp.float32)
    kernel = fp8_grouped_kernel(LOOP_PARTS, jnp.float8_e4m3fn, jnp.float8_e5m2)

    def expert(params: Any, x: Any, probs: Any, groups: Groups) -> Any:
        return grouped_matmul(x, w, groups, kernel, params[FP8_META])

    def y(params: Any) -> Any:
        where, groups = place_grouped(ids, E, round_up(tokens + E * 31, span), 32)
        return through_spans(expert, params, x, probs, where, groups, span)

    _, pull = jax.vjp(y, {FP8_META: jnp.ones((E, 3))})
    [found] = pull(dy := jnp.asarray(rng.standard_normal(x.shape), jnp.float32))
    for e in range(E):
        rows = np.asarray(ids)[:, 0] == e
        largest = [np.abs(np.asarray(a)[rows]).max(initial=0) for a in (x, dy)]
        np.testing.assert_array_equal(found[FP8_META][e], [largest[0], 0, largest[1]])
