"""Which experts a token goes to, with what weight, and how far that is from an even spread.

Source: Megatron's `transformer/moe/router.py` and `moe_utils.py`.

Legend: T tokens, E experts, K experts a token, G groups of experts, B sequences, S tokens of a sequence.
"""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from megajax.ops.across import WHOLE, Across

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Routing:
    """The rule.

    score: sigmoid of each logit; or softmax, over the chosen experts ("softmax") or, before the choice, over all
      ("pre_softmax"). normalize: sigmoids are made to sum to 1 over the chosen.
    groups: a token's experts lie in the best `group_top_k` of so many groups, a group being as good as the sum of its
      best `group_score_top_k`.
    """

    top_k: int
    score: Literal["softmax", "pre_softmax", "sigmoid"] = "softmax"
    groups: int | None = None
    group_top_k: int | None = None
    group_score_top_k: int = 1
    normalize: bool = True
    scaling_factor: float | None = None


def route(logits_TE: Array, rule: Routing, bias_E: Array | None = None) -> tuple[Array, Array]:
    """(experts int32 [..., K], weights fp32 [..., K]) of logits fp32 [..., E].

    bias_E is added to sigmoid scores for the choice only.
    """
    if rule.score == "sigmoid":
        scores = jax.nn.sigmoid(logits_TE)
        chosen = _choose(scores if bias_E is None else scores + bias_E, rule)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if rule.top_k > 1 and rule.normalize:
            weights /= jnp.sum(weights, -1, keepdims=True) + 1e-20
    else:
        scores = jax.nn.softmax(logits_TE, -1) if rule.score == "pre_softmax" else logits_TE
        chosen = _choose(scores, rule)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if rule.score == "softmax":
            weights = jax.nn.softmax(weights, -1)
    return chosen, weights if rule.scaling_factor is None else weights * rule.scaling_factor


def _choose(scores_TE: Array, rule: Routing) -> Array:
    scores_TE = jax.lax.stop_gradient(scores_TE)
    if rule.groups is not None and rule.group_top_k is not None:
        by_group = scores_TE.reshape(*scores_TE.shape[:-1], rule.groups, -1)
        best, _ = jax.lax.top_k(by_group, rule.group_score_top_k)
        _, kept = jax.lax.top_k(jnp.sum(best, -1), rule.group_top_k)
        keep = jnp.any(jax.nn.one_hot(kept, rule.groups, dtype=bool), axis=-2)
        scores_TE = jnp.where(keep[..., None], by_group, -jnp.inf).reshape(scores_TE.shape)
    return jax.lax.top_k(scores_TE, rule.top_k)[1].astype(jnp.int32)


def sinkhorn_route(logits_TE: Array, top_k: int) -> tuple[Array, Array]:
    """As `route`, with a choice that is balanced over all T tokens: logits fp32 [T, E] (arXiv:2202.08906's S-BASE)."""
    _, chosen = jax.lax.top_k(sinkhorn(jax.lax.stop_gradient(logits_TE)), top_k)
    scores = jax.nn.sigmoid(logits_TE) if top_k == 1 else jax.nn.softmax(logits_TE, -1)
    return chosen.astype(jnp.int32), jnp.take_along_axis(scores, chosen, -1)


def sinkhorn(logits_TE: Array, tolerance: float = 1e-4) -> Array:
    """exp(logits) [T, E] with rows and columns scaled until the columns' scales settle: an even assignment."""
    cost = jnp.exp(logits_TE.astype(jnp.float32))
    T, E = cost.shape

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, columns, _ = carry
        rows = 1 / (T * (cost @ columns + 1e-8))
        new = 1 / (E * (rows @ cost + 1e-8))
        return rows, new, jnp.mean(jnp.abs(columns - new))

    start = (jnp.ones(T), jnp.ones(E), jnp.float32(jnp.inf))
    rows, columns, _ = jax.lax.while_loop(lambda carry: carry[2] > tolerance, step, start)
    return columns * cost * rows[:, None]


def load_balancing_loss(
    logits_BSE: Array,
    rule: Routing,
    *,
    per_sequence: bool = False,
    keep_BS: Array | None = None,
    across: Across = WHOLE,
) -> Array:
    """`E / (K T^2) sum_e (sum_t score_te) count_e`: 1 where experts share scores and choices evenly, fp32 scalar.

    Scores are over all experts (of sigmoids, their share), and the choice is by them alone, without bias or groups.
    per_sequence: of each sequence, then the mean over them (arXiv:2412.19437, 2.1.2). keep_BS: tokens that count.
    across: devices that have the other tokens.
    """
    E, K = logits_BSE.shape[-1], rule.top_k
    if rule.score == "sigmoid":
        scores = jax.nn.sigmoid(logits_BSE)
        scores /= jnp.sum(scores, -1, keepdims=True) + 1e-20
    else:
        scores = jax.nn.softmax(logits_BSE, -1)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), K)[1]
    picked = jnp.sum(jax.nn.one_hot(chosen, E, dtype=jnp.float32), axis=-2)
    axes, total = ((1,), across.sequence) if per_sequence else ((0, 1), across.tokens)
    mean = across.mean_of_samples if per_sequence else jnp.sum
    tokens: Array | int = total(math.prod(logits_BSE.shape[axis] for axis in axes))
    if keep_BS is not None:
        keep = keep_BS.astype(jnp.float32)
        # Of sequences of unequal length Megatron takes the mean length, so that a short one counts less.
        tokens = jnp.maximum(mean(total(jnp.sum(keep, axes))), 1.0)
        scores, picked = scores * keep[..., None], picked * keep[..., None]
    sums, counts = total(jnp.stack([jnp.sum(scores, axes), jnp.sum(picked, axes)]))
    return mean(jnp.sum(sums * counts, -1)) * E / (K * jnp.square(jnp.float32(tokens)))


def z_loss(logits_BSE: Array, keep_BS: Array | None = None, *, across: Across = WHOLE) -> Array:
    """`mean(logsumexp(logits)^2)` (arXiv:2202.08906), fp32 scalar. across: devices that have the other tokens."""
    squares = jnp.square(jax.nn.logsumexp(logits_BSE, -1))
    if keep_BS is None:
        return across.mean_of_tokens(squares)
    keep = keep_BS.astype(jnp.float32)
    return across.tokens(jnp.sum(squares * keep)) / jnp.maximum(across.tokens(jnp.sum(keep)), 1.0)
