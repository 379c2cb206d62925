"""The inner loops of flash attention: what is computed for one block of queries or of keys, for Triton to compile.

FlashAttention-2 (arXiv:2307.08691), with masks told by segment ids and indices. `megajax.ops.pallas_attention` calls
them through Pallas. Gradients take two kernels, one a block of queries and one a block of keys, so that none adds to
what another writes: results do not change from run to run.
"""

# SPDX-License-Identifier: Apache-2.0
# O rows of the block that stays, P of those that pass by; K head size, V that of values; R query heads of a key head
import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from megajax.ops.threefry import bits_of_rows

Array = jax.Array
Ref = Any
"""Of a part of an array in the GPU's memory: indexing it loads."""
Pieces = list[Array]
"""Rows [O, K], cut along K: sizes of Triton's arrays are powers of two, 192 is 128 and 64."""

_HIDDEN = -1e30
"""Score of a key that a query may not see: finite, so that a block with none it may see gives no NaN."""
_LOG2_E = math.log2(math.e)  # GPUs have an instruction for powers of two


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is the same in all blocks.

    Attributes:
      causal, left, right, softcap: as in `AttentionMask`; -1 is unlimited.
      heads: of queries.
      own, other: rows of the block that stays and of those that pass by.
    """

    scale: float
    causal: bool
    left: int
    right: int
    heads: int
    own: int
    other: int
    dropout: "Dropout | None" = None
    softcap: float | None = None


class Dropout(NamedTuple):
    """Of probabilities [samples, heads, queries, keys]: `threshold` of 2^23 are kept, and multiplied by `scale`."""

    threshold: int
    scale: float
    heads: int
    queries: int
    keys: int


class Inputs(NamedTuple):
    """What all kernels read: arrays, or the part of each that a block needs.

    Attributes:
      reach: [3], the first of the other blocks that is visible, the one after the last, and `AttentionMask.offset`.
      q: [rows, K], or [rows, R, K] where keys stay. k, v: [rows, K or V].
      q_ids, k_ids: [rows] or None.
      bias: [queries, keys], or [R, queries, keys] where keys stay, or None.
      dropout: int32 [3], the two words of the key, and the row of the first sample, head and query; or None.
    """

    reach: Ref
    q: Ref
    k: Ref
    v: Ref
    q_ids: Ref
    k_ids: Ref
    bias: Ref
    dropout: Ref


class Upstream(NamedTuple):
    """What the backward kernels read besides: dy like q, with V features; lse and delta [O], or [R, rows]."""

    dy: Ref
    lse: Ref
    delta: Ref


def attention_forward(inputs: Inputs, y_ref: Ref, lse_ref: Ref, *, problem: Problem) -> None:
    """Output [O, V] and log-sum-exp [O] of a block of queries."""
    queries = _own_rows(problem, inputs.q, inputs.q_ids)
    sample, head = pl.program_id(2), pl.program_id(1)

    def add(block: Array, state: tuple[Pieces, Array, Array]) -> tuple[Pieces, Array, Array]:
        y, top_O, total_O = state
        keys = _other_rows(problem, block, inputs.k, inputs.k_ids)
        scores_OP, _ = _scores_of_queries(problem, inputs, queries, keys)
        new_top_O = jnp.maximum(top_O, jnp.max(scores_OP, axis=1))
        weights_OP, shrink_O = jnp.exp2(scores_OP - new_top_O[:, None]), jnp.exp2(top_O - new_top_O)
        total_O = total_O * shrink_O + jnp.sum(weights_OP, axis=1)
        weights_OP = _dropped(problem, inputs, weights_OP, sample, head, queries, keys)
        v = _pieces(inputs.v, keys.at)
        y = [old * shrink_O[:, None] + triton.dot(weights_OP.astype(x.dtype), x) for old, x in zip(y, v, strict=True)]
        return y, new_top_O, total_O

    start = _zeros(problem.own, y_ref), jnp.full(problem.own, _HIDDEN), jnp.zeros(problem.own)
    y, top_O, total_O = jax.lax.fori_loop(inputs.reach[0], inputs.reach[1], add, start)
    blind_O = top_O <= _HIDDEN / 2
    total_O = jnp.where(blind_O, 1.0, total_O)
    share_O = jnp.where(blind_O, 0.0, 1.0 / total_O)
    _store(y_ref, [x * share_O[:, None] for x in y])
    lse_ref[...] = jnp.where(blind_O, -jnp.inf, (top_O + jnp.log2(total_O)) / _LOG2_E)


def attention_backward_q(inputs: Inputs, upstream: Upstream, dq_ref: Ref, *, problem: Problem) -> None:
    """Gradient [O, K] of a block of queries."""
    queries = _own_rows(problem, inputs.q, inputs.q_ids)
    sample, head = pl.program_id(2), pl.program_id(1)
    dy, lse_O, delta_O = _pieces(upstream.dy, slice(None)), upstream.lse[...] * _LOG2_E, upstream.delta[...]

    def add(block: Array, dq: Pieces) -> Pieces:
        keys = _other_rows(problem, block, inputs.k, inputs.k_ids)
        scores_OP, slope_OP = _scores_of_queries(problem, inputs, queries, keys)
        probs_OP = jnp.exp2(scores_OP - lse_O[:, None])
        dprobs_OP = _product(dy, _pieces(inputs.v, keys.at))
        dprobs_OP = _dropped(problem, inputs, dprobs_OP, sample, head, queries, keys)
        dscores_OP = (probs_OP * (dprobs_OP - delta_O[:, None]) * slope_OP).astype(inputs.k.dtype)
        return [old + triton.dot(dscores_OP, x) for old, x in zip(dq, keys.x, strict=True)]

    dq = jax.lax.fori_loop(inputs.reach[0], inputs.reach[1], add, _zeros(problem.own, dq_ref))
    _store(dq_ref, [x * problem.scale for x in dq])


def attention_backward_kv(inputs: Inputs, upstream: Upstream, dk_ref: Ref, dv_ref: Ref, *, problem: Problem) -> None:
    """Gradients [O, K] and [O, V] of a block of keys and of their values, from all R heads that read them."""
    keys = _own_rows(problem, inputs.k, inputs.k_ids)
    v, sample, group = _pieces(inputs.v, slice(None)), pl.program_id(2), pl.program_id(1)
    first, blocks, heads = inputs.reach[0], inputs.reach[1] - inputs.reach[0], inputs.q.shape[1]

    def add(turn: Array, state: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
        dk, dv = state
        head = jax.lax.div(turn, blocks)
        queries = _other_rows(problem, first + turn - head * blocks, inputs.q, inputs.q_ids, head)
        dy, lse_P, delta_P = (
            _pieces(upstream.dy, queries.at, head),
            upstream.lse[head, queries.at] * _LOG2_E,
            upstream.delta[head, queries.at],
        )
        bias_OP = None if inputs.bias is None else inputs.bias[head, queries.at, :].T
        distance_OP = keys.index[:, None] - queries.index[None, :] - inputs.reach[2]
        scores_OP, slope_OP = _scores(problem, keys, queries, distance_OP, bias_OP)
        probs_OP = jnp.exp2(scores_OP - lse_P[None, :])
        place = sample, group * heads + head, queries, keys
        kept_OP = _dropped(problem, inputs, probs_OP, *place, keys_stay=True)
        dv = [old + triton.dot(kept_OP.astype(x.dtype), x) for old, x in zip(dv, dy, strict=True)]
        dprobs_OP = _dropped(problem, inputs, _product(v, dy), *place, keys_stay=True)
        dscores_OP = (probs_OP * (dprobs_OP - delta_P[None, :]) * slope_OP).astype(inputs.q.dtype)
        return [old + triton.dot(dscores_OP, x) for old, x in zip(dk, queries.x, strict=True)], dv

    start = _zeros(problem.own, dk_ref), _zeros(problem.own, dv_ref)
    dk, dv = jax.lax.fori_loop(0, heads * jnp.maximum(blocks, 0), add, start)
    _store(dk_ref, [x * problem.scale for x in dk])
    _store(dv_ref, dv)


def attention_backward_bias(inputs: Inputs, upstream: Upstream, dbias_ref: Ref, *, problem: Problem) -> None:
    """Gradient [O, P] of a block of the bias, from all samples that share it: they are the first dim of all inputs."""
    block, other, pair, every = pl.program_id(0), pl.program_id(1), pl.program_id(2), slice(None)
    first_sample, head = jax.lax.div(pair, problem.heads), jax.lax.rem(pair, problem.heads)

    def add(sample: Array, dbias_OP: Array) -> Array:
        at_sample = jnp.minimum(sample, inputs.reach.shape[0] - 1)

        def visit(_: Array, dbias_OP: Array) -> Array:
            queries, keys = (
                _Rows(
                    every,
                    block * size + jnp.arange(size),
                    _pieces(ref, sample, every),
                    None if ids is None else ids[jnp.minimum(sample, ids.shape[0] - 1), every],
                )
                for block, size, ref, ids in (
                    (block, problem.own, inputs.q, inputs.q_ids),
                    (other, problem.other, inputs.k, inputs.k_ids),
                )
            )
            distance_OP = keys.index[None, :] - queries.index[:, None] - inputs.reach[at_sample, 2]
            scores_OP = _scores(problem, queries, keys, distance_OP, inputs.bias[...])[0]
            probs_OP = jnp.exp2(scores_OP - upstream.lse[sample, every][:, None] * _LOG2_E)
            dprobs_OP = _product(_pieces(upstream.dy, sample, every), _pieces(inputs.v, sample, every))
            dprobs_OP = _dropped(problem, inputs, dprobs_OP, first_sample + sample, head, queries, keys)
            return dbias_OP + probs_OP * (dprobs_OP - upstream.delta[sample, every][:, None])

        seen = (inputs.reach[at_sample, 0] <= other) & (other < inputs.reach[at_sample, 1])
        return jax.lax.fori_loop(0, seen.astype(jnp.int32), visit, dbias_OP)

    start = jnp.zeros((problem.own, problem.other))
    dbias_ref[...] = jax.lax.fori_loop(0, inputs.q.shape[0], add, start).astype(dbias_ref.dtype)


class _Rows(NamedTuple):
    """A block of queries or keys: where it lies, the index of each row in its sequence, features, segment ids."""

    at: Any
    index: Array
    x: Pieces
    ids: Array | None


def _own_rows(problem: Problem, ref: Ref, ids: Ref) -> _Rows:
    at = slice(None)
    index = pl.program_id(0) * problem.own + jnp.arange(problem.own)
    return _Rows(at, index, _pieces(ref, at), None if ids is None else ids[at])


def _other_rows(problem: Problem, block: Array, ref: Ref, ids: Ref, *head: Array) -> _Rows:
    at = pl.ds(block * problem.other, problem.other)
    index = block * problem.other + jnp.arange(problem.other)
    return _Rows(at, index, _pieces(ref, at, *head), None if ids is None else ids[at])


def _scores_of_queries(problem: Problem, inputs: Inputs, queries: _Rows, keys: _Rows) -> tuple[Array, Array | float]:
    bias_OP = None if inputs.bias is None else inputs.bias[:, keys.at]
    distance_OP = keys.index[None, :] - queries.index[:, None] - inputs.reach[2]
    return _scores(problem, queries, keys, distance_OP, bias_OP)


def _scores(
    problem: Problem, own: _Rows, other: _Rows, distance_OP: Array, bias_OP: Array | None
) -> tuple[Array, Array | float]:
    """Of keys that come so far after the queries: in powers of two, `_HIDDEN` where a query may not see a key; and how
    they grow with the scaled products: less where a soft cap bends them.
    """
    slope_OP: Array | float = 1.0
    if problem.softcap is None:
        scores_OP = _product(own.x, other.x) * (problem.scale * _LOG2_E)
    else:
        bent_OP = jnp.tanh(_product(own.x, other.x) * (problem.scale / problem.softcap))
        scores_OP, slope_OP = bent_OP * (problem.softcap * _LOG2_E), 1.0 - bent_OP * bent_OP
    if bias_OP is not None:
        scores_OP += bias_OP.astype(jnp.float32) * _LOG2_E
    seen = [] if own.ids is None or other.ids is None else [own.ids[:, None] == other.ids[None, :]]
    seen += [distance_OP <= 0] if problem.causal else []
    seen += [distance_OP >= -problem.left] if problem.left >= 0 else []
    seen += [distance_OP <= problem.right] if problem.right >= 0 else []
    if seen:
        scores_OP = jnp.where(functools.reduce(operator.and_, seen), scores_OP, _HIDDEN)
    return scores_OP, slope_OP


def _dropped(
    problem: Problem,
    inputs: Inputs,
    x_OP: Array,
    sample: Any,
    head: Any,
    queries: _Rows,
    keys: _Rows,
    *,
    keys_stay: bool = False,
) -> Array:
    """x, scaled where dropout keeps it and 0 elsewhere. As `jax.random.bernoulli` of the whole array has it: each
    element is the hash of the key and its own index, of 64 bits, so that any part can be made by itself.
    """
    if problem.dropout is None:
        return x_OP
    threshold, scale, heads, S, T = problem.dropout  # words of 32 bits are int32, as in `megajax.ops.threefry`
    row = inputs.dropout[2] + (sample * heads + head) * S + queries.index
    row, key = (row[None, :], keys.index[:, None]) if keys_stay else (row[:, None], keys.index[None, :])
    bits_OP = bits_of_rows((inputs.dropout[0], inputs.dropout[1]), row, T, key)
    return jnp.where(bits_OP < threshold, x_OP * scale, 0.0)


def _product(a: Pieces, b: Pieces) -> Array:
    """a b' [O, P] in fp32."""
    first, *rest = (triton.dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True))
    return sum(rest, first)


def pieces_of(size: int) -> list[tuple[int, int]]:
    """(first, number) of features that make up `size`: powers of two, the largest first."""
    first, found = 0, []
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            found.append((first, 1 << bit))
            first += 1 << bit
    return found


def _pieces(ref: Ref, *at: Any) -> Pieces:
    return [ref[*at, pl.ds(*piece)] for piece in pieces_of(ref.shape[-1])]


def _zeros(rows: int, ref: Ref) -> Pieces:
    return [jnp.zeros((rows, size)) for _, size in pieces_of(ref.shape[-1])]


def _store(ref: Ref, pieces: Pieces) -> None:
    for (first, size), value in zip(pieces_of(ref.shape[-1]), pieces, strict=True):
        ref[:, pl.ds(first, size)] = value.astype(ref.dtype)
