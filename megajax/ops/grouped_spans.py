"""All that experts do to their rows, a span of rows at a time: work and memory follow what the router chose.

Where tokens come from many devices, the buffer that experts could be given is far longer than what they are given: with
64 devices and 8 of 256 experts a token, 32 times. So there is none. Each turn of a loop whose length is known at run
time only fetches a span of the rows that exist, takes them through their experts, and adds the results to their tokens;
backward does the same, and computes the inside of the experts again. A span has room for what a router that balances
gives, and then there is one turn.

Legend: N tokens, K experts a token, E experts, R rows of all spans at the most, C rows of a span, D width.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from megajax.ops.grouped import Groups, Placement, round_up, take
from megajax.ops.zeros import zeros_beside
from megajax.parallel.gradient_sums import combine

Array = jax.Array
Tree = Any
Experts = Callable[[Tree, Array, Array, Groups], Array]
"""(parameters, x [C, D], probs [C], groups) -> y [C, D]; empty rows are zero."""

SPANS = "spans_of_rows"
"""Name of the loop, in the names of its operations."""


def span_of(average: int, experts: int, block: int) -> int:
    """Rows of a span, where an expert gets `average` rows: a quarter more, each group rounded up to `block`."""
    return round_up(experts * (average * 5 // 4 + block), block)


def through_spans(
    fn: Experts, params: Tree, x_ND: Array, probs_NK: Array, placement: Placement, groups: Groups, span: int
) -> Array:
    """Sum over a token's experts of fn, [N, D] in x's dtype. Sums are in fp32, on a GPU in no certain order.

    Args:
      params: leaves [E, ...].
      placement, groups: of `place_grouped`, for a multiple of `span` rows.
    """
    rows = (placement.source, groups.sizes)
    return _through(fn, groups.block, span, probs_NK.shape[1], params, x_ND, probs_NK.reshape(-1), rows)


def _each_span(span: int, sizes: Array, body: Callable[[Array, Any], Any], init: Any) -> Any:
    """Folds body(first row, carry) over the spans that hold rows."""
    with jax.named_scope(SPANS):
        return lax.fori_loop(0, -(-jnp.sum(sizes) // span), lambda i, carry: body(i * span, carry), init)


def _groups(sizes: Array, row: Array, span: int, block: int) -> Groups:
    """Those of a span."""
    ends = jnp.clip(jnp.cumsum(sizes), row, row + span)
    return Groups(ends - jnp.concatenate([row[None], ends[:-1]]), block)


def _rows(source_R: Array, row: Array, span: int, N: int, K: int) -> tuple[Array, Array]:
    """(assignments, tokens) of a span; those of empty rows lie outside of the arrays, each elsewhere."""
    assignment = lax.dynamic_slice_in_dim(source_R, row, span)
    return assignment, jnp.where(assignment >= N * K, N + jnp.arange(span), assignment // K)


def _sum_like(x_ND: Array, K: int) -> jax.ShapeDtypeStruct:
    """What to add up in. With one expert a token there is nothing to sum."""
    dtype = x_ND.dtype if K == 1 else jnp.promote_types(x_ND.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(x_ND.shape, dtype)


def _add(total_ND: Array, tokens: Array, rows: Array, K: int) -> Array:
    return total_ND.at[tokens].add(rows.astype(total_ND.dtype), mode="drop", unique_indices=K == 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _through(
    fn: Experts, block: int, span: int, K: int, params: Tree, x_ND: Array, probs: Array, rows: tuple[Array, Array]
) -> Array:
    source_R, sizes = rows

    def body(row: Array, y_ND: Array) -> Array:
        assignment, tokens = _rows(source_R, row, span, x_ND.shape[0], K)
        y = fn(params, take(x_ND, tokens), take(probs, assignment), _groups(sizes, row, span, block))
        return _add(y_ND, tokens, y, K)

    zeros, x_ND = zeros_beside(_sum_like(x_ND, K), x_ND)
    return _each_span(span, sizes, body, zeros).astype(x_ND.dtype)


def _forward(fn: Experts, block: int, span: int, K: int, *saved: Any):
    return _through(fn, block, span, K, *saved), saved


def _backward(fn: Experts, block: int, span: int, K: int, saved: Any, dy_ND: Array):
    params, x_ND, probs, (source_R, sizes) = saved

    def body(row: Array, sums: tuple[Tree, Array, Array]) -> tuple[Tree, Array, Array]:
        d_params, dx_ND, d_probs = sums
        assignment, tokens = _rows(source_R, row, span, x_ND.shape[0], K)
        groups = _groups(sizes, row, span, block)
        again = jax.checkpoint(lambda params, x, p: fn(params, x, p, groups), prevent_cse=False)
        _, pullback = jax.vjp(again, params, take(x_ND, tokens), take(probs, assignment))
        of_params, dx, dp = pullback(take(dy_ND, tokens))
        return (
            jax.tree_util.tree_map_with_path(combine, d_params, of_params),
            _add(dx_ND, tokens, dx, K),
            d_probs.at[assignment].set(dp, mode="drop"),
        )

    sums, dy_ND = zeros_beside((params, _sum_like(x_ND, K), probs), dy_ND)
    d_params, dx_ND, d_probs = _each_span(span, sizes, body, sums)
    return d_params, dx_ND.astype(x_ND.dtype), d_probs, None


_through.defvjp(_forward, _backward)
