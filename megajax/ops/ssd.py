"""State space duality (Mamba-2, arXiv:2405.21060): the recurrence in chunks of matrix products, and its companions.

With heads h of group g(h), step sizes dt, decay rates A < 0 and a state S [P, N] for each head:

    S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) b_t^T        y_t = S_t c_t

Where a document starts, S_{t-1} is taken to be 0. Everything is computed in fp32.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, C chunks, L tokens of a chunk (M: those looked back at), H heads, G groups, R = H/G heads of a
# group, P head size, N state size; K tokens that a convolution sees, F features, T = S + K - 1
import jax
import jax.numpy as jnp

from megajax.ops.recompute import recomputed_in_backward

Array = jax.Array


@recomputed_in_backward
def ssd_scan(
    x_BSHP: Array,
    dt_BSH: Array,
    A_H: Array,
    b_BSGN: Array,
    c_BSGN: Array,
    state_BHPN: Array | None = None,
    starts_BS: Array | None = None,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """The recurrence over a whole sequence.

    Within a chunk it is attention with a mask of decays; between chunks it passes on states (section 6 of the paper).

    Args:
      state_BHPN: S before the first token; None is 0.
      starts_BS: bool, True where a document starts; None: all tokens go on from the ones before.
      chunk_size: tokens of a chunk; any number gives the same result. S need not be a multiple.

    Returns:
      y fp32 [B, S, H, P], and the state after the last token, fp32 [B, H, P, N].
    """
    (B, S, H, P), (G, N) = x_BSHP.shape, b_BSGN.shape[2:]
    L = min(chunk_size, S)

    def chunked(a: Array, *heads: int) -> Array:
        a = jnp.pad(a, [(0, 0), (0, -S % L)] + [(0, 0)] * (a.ndim - 2))  # steps of size 0 leave the state as it is
        return a.reshape(B, -1, L, *heads, *a.shape[3 if heads else 2 :])

    dt = chunked(dt_BSH.astype(jnp.float32), G, H // G)
    x = chunked(x_BSHP.astype(jnp.float32), G, H // G) * dt[..., None]
    b, c = (chunked(a.astype(jnp.float32)) for a in (b_BSGN, c_BSGN))
    decay = jnp.cumsum(dt * A_H.astype(jnp.float32).reshape(G, H // G), axis=2)  # its logarithm, [B, C, L, G, R]
    runs = None if starts_BS is None else _runs(chunked(starts_BS))

    y = _within_chunks(x, b, c, decay, runs)
    last, before = (None, None) if runs is None else (runs[:, :, -1:], _shifted(runs[:, :, -1:]))
    to_end = _decays(decay[:, :, -1:] - decay, runs, last)
    states = jnp.einsum("BCLGN,BCLGRP->BCGRPN", b, x * to_end[..., None])
    kept = _decays(decay[:, :, -1:], last, before)[:, :, 0]
    first = jnp.zeros((B, H, P, N)) if state_BHPN is None else state_BHPN
    entering, final = _pass_on(first.astype(jnp.float32).reshape(B, G, H // G, P, N), states, kept)
    from_start = _decays(decay, runs, before)
    y += jnp.einsum("BCLGN,BCGRPN->BCLGRP", c, entering) * from_start[..., None]
    return y.reshape(B, -1, H, P)[:, :S], final.reshape(B, H, P, N)


def _runs(starts_BCL: Array) -> Array:
    """The number of the document of each token, int [B, C, L]; that of what came before the first is 0."""
    B, C, L = starts_BCL.shape
    return jnp.cumsum(starts_BCL.reshape(B, C * L).astype(jnp.int32), axis=1).reshape(B, C, L)


def _shifted(last_BC1: Array) -> Array:
    """Of each chunk, the number of the document that the chunk before it ends in."""
    return jnp.pad(last_BC1, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def _decays(log_decay: Array, runs: Array | None, others: Array | None) -> Array:
    """exp(log_decay) [B, C, L, G, R], 0 between different documents."""
    if runs is None:
        return jnp.exp(log_decay)
    return jnp.exp(jnp.where((runs == others)[..., None, None], log_decay, -jnp.inf))


def _within_chunks(x: Array, b: Array, c: Array, decay: Array, runs: Array | None) -> Array:
    """What the tokens of a chunk give each other: x [B, C, L, G, R, P] -> [B, C, L, G, R, P]."""
    L = x.shape[2]
    seen = jnp.tril(jnp.ones((L, L), bool))
    if runs is not None:
        seen = seen & (runs[..., :, None] == runs[..., None, :])[:, :, None, None]
    decay = jnp.moveaxis(decay, 2, -1)  # [B, C, G, R, L]
    # -inf before the exponential, not 0 after it: what is not seen may overflow, and its gradient would be nan.
    weights = jnp.exp(jnp.where(seen, decay[..., :, None] - decay[..., None, :], -jnp.inf))
    scores = jnp.einsum("BCLGN,BCMGN->BCGLM", c, b)
    return jnp.einsum("BCGRLM,BCMGRP->BCLGRP", scores[:, :, :, None] * weights, x)


def _pass_on(first: Array, states: Array, kept: Array) -> tuple[Array, Array]:
    """(the state that enters each chunk [B, C, G, R, P, N], the state after the last)."""

    def step(state: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        added, kept = chunk
        return state * kept[..., None, None] + added, state

    final, entering = jax.lax.scan(step, first, (jnp.moveaxis(states, 1, 0), jnp.moveaxis(kept, 1, 0)))
    return jnp.moveaxis(entering, 0, 1), final


def ssd_step(
    x_BHP: Array, dt_BH: Array, A_H: Array, b_BGN: Array, c_BGN: Array, state_BHPN: Array
) -> tuple[Array, Array]:
    """One token: (y fp32 [B, H, P], the state after it)."""
    (B, H, P), (G, N) = x_BHP.shape, b_BGN.shape[1:]
    dt = dt_BH.astype(jnp.float32)
    x = (x_BHP.astype(jnp.float32) * dt[..., None]).reshape(B, G, H // G, P)
    kept = jnp.exp(dt * A_H.astype(jnp.float32))
    added = jnp.einsum("BGRP,BGN->BGRPN", x, b_BGN.astype(jnp.float32)).reshape(B, H, P, N)
    state_BHPN = state_BHPN.astype(jnp.float32) * kept[..., None, None] + added
    y = jnp.einsum("BGRPN,BGN->BGRP", state_BHPN.reshape(B, G, H // G, P, N), c_BGN.astype(jnp.float32))
    return y.reshape(B, H, P), state_BHPN


def ssd_of_state(dt_BSH: Array, A_H: Array, c_BSGN: Array, state_BHPN: Array, starts_BS: Array | None = None) -> Array:
    """What a state before the first token adds to y: by how much `ssd_scan` with it exceeds `ssd_scan` without."""
    (B, _, H), G = dt_BSH.shape, c_BSGN.shape[2]
    log_decay = jnp.cumsum(dt_BSH.astype(jnp.float32) * A_H.astype(jnp.float32), axis=1)
    if starts_BS is not None:
        log_decay = jnp.where(_first_document(starts_BS)[..., None], log_decay, -jnp.inf)
    state = state_BHPN.reshape(B, G, H // G, *state_BHPN.shape[2:])
    y = jnp.einsum("BSGN,BGRPN->BSGRP", c_BSGN.astype(jnp.float32), state)
    return y.reshape(B, -1, H, y.shape[-1]) * jnp.exp(log_decay)[..., None]


def ssd_kept(dt_BSH: Array, A_H: Array, starts_BS: Array | None = None) -> Array:
    """The part of a state before the first token that is left after the last, fp32 [B, H]."""
    kept = jnp.exp(jnp.sum(dt_BSH.astype(jnp.float32) * A_H.astype(jnp.float32), axis=1))
    return kept if starts_BS is None else kept * _first_document(starts_BS)[:, -1:]


def _first_document(starts_BS: Array) -> Array:
    """bool [B, S]: no document has started since before the first token."""
    return jnp.cumsum(starts_BS.astype(jnp.int32), axis=1) == 0


@recomputed_in_backward
def causal_conv1d(
    x_BTF: Array, kernel_K1F: Array, bias_F: Array | None = None, starts_BT: Array | None = None
) -> Array:
    """Depthwise causal convolution, then SiLU: each token sees itself and the K - 1 before it, of its own document.

    Args:
      x_BTF: the K - 1 inputs before the first token, zeros where there are none, then those of the S tokens.
      starts_BT: bool, True where a document starts.

    Returns:
      [B, S, F] in x's dtype; computed in fp32.
    """
    K = kernel_K1F.shape[0]
    S = x_BTF.shape[1] - K + 1
    runs = None if starts_BT is None else jnp.cumsum(starts_BT.astype(jnp.int32), axis=1)
    y = jnp.zeros((x_BTF.shape[0], S, x_BTF.shape[2]), jnp.float32)
    for k in range(K):
        seen = x_BTF[:, k : k + S].astype(jnp.float32)
        if runs is not None:
            seen = jnp.where((runs[:, k : k + S] == runs[:, K - 1 :])[..., None], seen, 0)
        y += seen * kernel_K1F[k, 0].astype(jnp.float32)
    if bias_F is not None:
        y += bias_F.astype(jnp.float32)
    return jax.nn.silu(y).astype(x_BTF.dtype)


@recomputed_in_backward
def gated_group_rms_norm(y: Array, gate: Array, scale: Array, *, groups: int, epsilon: float) -> Array:
    """`y * silu(gate)`, divided by the root mean square of each group of features, times `scale`: gate before norm.

    y, gate [..., F], scale [F] -> [..., F] in y's dtype. Megatron: `ExtendedRMSNorm` of `core/ssm/mamba_mixer.py`.
    """
    y32 = gated(y, gate).reshape(*y.shape[:-1], groups, -1)
    y32 = y32 * jax.lax.rsqrt(jnp.mean(y32**2, axis=-1, keepdims=True) + epsilon)
    return (y32.reshape(y.shape) * scale.astype(jnp.float32)).astype(y.dtype)


def gated(y: Array, gate: Array) -> Array:
    """`y * silu(gate)` in fp32."""
    return y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
