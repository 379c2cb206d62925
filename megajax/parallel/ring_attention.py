"""Ring attention: keys and values travel around a mesh axis while every device keeps its queries."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length and T key length on one device, N query heads, G key/value heads, K head size
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.ops.attention import AttentionMask, attention_block, attention_block_gradients, merge_blocks
from megajax.ops.flash_attention import FlashKernel, sink_gradient

Array = jax.Array
Pair = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Ring:
    """What does not change between calls.

    Attributes:
      axis, size: the mesh axis, which must be manual, and its size (> 1).
      zigzag: device r of n holds chunks r and 2n-1-r of the sequence cut into 2n, else chunk r of n.
      scale, softmax_dtype: as in `dot_product_attention`.
      kernel: computes each block, in place of plain JAX. Unless it is good for `any_part`, it sees whole blocks and
        causal squares only: then there may be no window, segment ids or `keep`, and causality needs the zigzag.
    """

    axis: str
    size: int
    zigzag: bool
    scale: float
    softmax_dtype: jnp.dtype
    kernel: FlashKernel | None = None

    def index(self, rank: Array | int, length: int) -> Array:
        """Index in the whole sequence of each of the `length` rows that device `rank` holds: [length]."""
        if not self.zigzag:
            return rank * length + jnp.arange(length)
        half = length // 2
        chunks = jnp.stack([jnp.asarray(rank), 2 * self.size - 1 - rank])
        return (chunks[:, None] * half + jnp.arange(half)).reshape(-1)

    def send(self, x: Array) -> Array:
        """x of the device before this one."""
        return jax.lax.ppermute(x, self.axis, [(i, (i + 1) % self.size) for i in range(self.size)])


class Block(NamedTuple):
    """Queries [q_start, q_start + q_size) of this device and keys [k_start, k_start + k_size) of the visiting ones."""

    q_start: Array | int
    q_size: int
    k_start: Array | int
    k_size: int
    causal: bool = True
    """Whether causality hides some of these keys from some of these queries."""


def blocks(ring: Ring, mask: AttentionMask, step: int, rank: Array | int, S: int, T: int) -> list[Block]:
    """What device `rank` computes at `step`, when the keys of device rank - step (mod n) are there.

    With zigzag and causality every device computes three quarter blocks at step 0 and two at each other step, which is
    2n+1 of the 4n there are, with no branch. The queries of its late chunk see all of the visiting early chunk, and
    - if the keys come from an earlier device, its early chunk sees the visiting early chunk, too;
    - if they come from a later one, its late chunk sees the visiting late chunk.
    (Megatron and Transformer Engine do the same work as one half block of either form.)
    """
    if not ring.zigzag or (not mask.causal and mask.window is None):
        return [Block(0, S, 0, T)]
    early, late = (0, S // 2, 0, T // 2), (S // 2, S // 2, T // 2, T // 2)
    if not mask.causal or S != T:  # a window, or other keys than the queries' own: whatever there is
        assert ring.kernel is None or ring.kernel.any_part
        return [Block(*q[:2], *k[2:]) for q in (early, late) for k in (early, late)]
    if step == 0 and ring.kernel is None:
        return [Block(*early), Block(*late[:2], 0, T)]
    if step == 0:
        return [Block(*early), Block(*late[:2], 0, T // 2, causal=False), Block(*late)]
    half = S // 2
    same = jnp.where(jnp.asarray(rank) >= step, 0, half)
    return [Block(half, half, 0, half, causal=False), Block(same, half, same, half, causal=False)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(
    ring: Ring, q_BSNK: Array, k_BTGK: Array, v_BTGK: Array, sink_N: Array | None, mask: AttentionMask
) -> Array:
    """Attention of this device's queries to the keys of all devices of the ring (arXiv:2310.01889). [B, S, N, K].

    To be called where `ring.axis` is manual. n-1 sends of keys and values together forward, and backward n-1 of them
    and n-1 of their fp32 gradients. Only inputs, output and log-sum-exp are kept for the backward pass.

    Args:
      ring, q_BSNK, k_BTGK, v_BTGK: of this device; `ring.zigzag` says which rows those are.
      sink_N: fp32 extra logit of each head, or None.
      mask: q_segment_ids of this device's queries; kv_segment_ids of all keys, and `keep` with this device's rows and
        all columns, both in the order in which the devices hold them. The offset is not used.
    """
    return _forward(ring, q_BSNK, k_BTGK, v_BTGK, sink_N, mask)[0]


def _forward(
    ring: Ring, q_BSNK: Array, k_BTGK: Array, v_BTGK: Array, sink_N: Array | None, mask: AttentionMask
) -> tuple[Array, tuple]:
    y = jnp.zeros(q_BSNK.shape, jnp.float32)
    lse = jnp.full(q_BSNK.shape[:3], -jnp.inf)
    kv = jnp.stack((k_BTGK, v_BTGK))
    for step in range(ring.size):
        arriving = ring.send(kv) if step < ring.size - 1 else kv  # before the products, which hide it
        for block, seen, reachable in _visits(ring, mask, step, q_BSNK, k_BTGK):

            def attend(state: Pair, block: Block = block, seen: "_Seen" = seen, kv: Array = kv) -> Pair:
                (q0, rows, k0, columns), (old_y, old_lse) = block[:4], state
                k, v = _cut(kv, k0, columns, dim=2)
                part = _block(ring, seen, _cut(q_BSNK, q0, rows), k, v)
                new_y, new_lse = merge_blocks(_cut(old_y, q0, rows), _cut(old_lse, q0, rows), *part)
                return _put(old_y, new_y, q0), _put(old_lse, new_lse, q0)

            y, lse = _when(reachable, attend, (y, lse))
        kv = arriving
    if sink_N is not None:
        y, lse = merge_blocks(y, lse, jnp.zeros_like(y), jnp.broadcast_to(sink_N, lse.shape))
    elif mask.keep is not None:
        # As in Megatron, a query with no key at all attends to every one equally.
        total_BGK = jax.lax.psum(jnp.sum(v_BTGK, axis=1, dtype=jnp.float32), ring.axis)
        mean_BNK = jnp.repeat(total_BGK / (ring.size * v_BTGK.shape[1]), y.shape[2] // v_BTGK.shape[2], axis=1)
        y = jnp.where(jnp.isneginf(lse)[..., None], mean_BNK[:, None], y)
    y = y.astype(q_BSNK.dtype)
    return y, (q_BSNK, k_BTGK, v_BTGK, sink_N, mask, y, lse)


def _backward(ring: Ring, kept: tuple, dy_BSNK: Array) -> tuple[Array, Array, Array, Array | None, None]:
    q_BSNK, k_BTGK, v_BTGK, sink_N, mask, y_BSNK, lse = kept
    delta = jnp.sum(dy_BSNK.astype(jnp.float32) * y_BSNK.astype(jnp.float32), axis=-1)
    # Values before keys: sent as in the forward pass, XLA would merge the two and keep all that was received till now.
    vk = jnp.stack((v_BTGK, k_BTGK))
    dq = jnp.zeros(q_BSNK.shape, jnp.float32)
    own_dvk = travelling = jnp.zeros(vk.shape, jnp.float32)
    for step in range(ring.size):
        arriving = ring.send(vk) if step < ring.size - 1 else vk
        dvk = travelling
        for block, seen, reachable in _visits(ring, mask, step, q_BSNK, k_BTGK):

            def add(state: Pair, block: Block = block, seen: "_Seen" = seen, vk: Array = vk) -> Pair:
                (q0, rows, k0, columns), (old_dq, old_dvk) = block[:4], state
                of_rows = _OfRows(*(_cut(x, q0, rows) for x in (q_BSNK, y_BSNK, lse, dy_BSNK, delta)))
                row_dq = _cut(old_dq, q0, rows)
                v, k = _cut(vk, k0, columns, dim=2)
                add_dq, dk, dv = _block_gradients(ring, seen, of_rows, k, v)
                sum_dvk = _cut(old_dvk, k0, columns, dim=2) + jnp.stack((dv, dk))
                return _put(old_dq, row_dq + add_dq, q0), _put(old_dvk, sum_dvk, k0, dim=2)

            dq, dvk = _when(reachable, add, (dq, dvk))
        # The device's own part stays; what it found for others goes on, and is at home after the last step.
        if step == 0:
            own_dvk = dvk
        else:
            travelling = ring.send(dvk)
        vk = arriving
    dv, dk = own_dvk + travelling
    dsink = None
    if sink_N is not None:
        dsink = sink_gradient(sink_N, lse, y_BSNK, dy_BSNK)
    elif mask.keep is not None:
        blind_BSNK = jnp.where(jnp.isneginf(lse)[..., None], dy_BSNK.astype(jnp.float32), 0.0)
        total_BNK = jax.lax.psum(jnp.sum(blind_BSNK, axis=1), ring.axis)
        B, T, G, K = v_BTGK.shape
        dv += total_BNK.reshape(B, G, -1, K).sum(2)[:, None] / (ring.size * T)
    return dq.astype(q_BSNK.dtype), dk.astype(k_BTGK.dtype), dv.astype(v_BTGK.dtype), dsink, None


ring_attention.defvjp(_forward, _backward)


class _Seen(NamedTuple):
    """Which keys of a block its queries see: a record for kernels; dense for plain JAX, None where that is all."""

    mask: AttentionMask
    keep: Array | None


def _block(ring: Ring, seen: _Seen, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp of attention to a block of keys, both fp32."""
    if ring.kernel is None:
        return attention_block(q, k, v, seen.keep, **_options(ring, seen))
    y, lse = ring.kernel.forward(q, k, v, None, seen.mask, ring.scale)
    return y.astype(jnp.float32), lse


def _options(ring: Ring, seen: _Seen) -> dict[str, Any]:
    return {"scale": ring.scale, "softmax_dtype": ring.softmax_dtype, "softcap": seen.mask.softcap}


class _OfRows(NamedTuple):
    """What some queries bring along: their output, log-sum-exp and delta are of attention to all keys."""

    q: Array
    y: Array
    lse: Array
    dy: Array
    delta: Array


def _block_gradients(ring: Ring, seen: _Seen, rows: _OfRows, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """What a block of keys adds to dq, and its dk and dv, all fp32."""
    if ring.kernel is None:
        kept = {"dy_BSNK": rows.dy, "lse_BSN": rows.lse, "delta_BSN": rows.delta}
        return attention_block_gradients(rows.q, k, v, seen.keep, **kept, **_options(ring, seen))
    gradients = ring.kernel.backward(rows.q, k, v, None, seen.mask, ring.scale, rows.y, rows.lse, rows.dy)[:3]
    dq, dk, dv = (x.astype(jnp.float32) for x in gradients)
    return dq, dk, dv


def _visits(
    ring: Ring, mask: AttentionMask, step: int, q_BSNK: Array, k_BTGK: Array
) -> list[tuple[Block, _Seen, Array | None]]:
    """Each block of this step, what it sees, and whether any key can be in reach (None: no need to ask)."""
    rank = jax.lax.axis_index(ring.axis)
    source = (rank - step) % ring.size
    S, T = q_BSNK.shape[1], k_BTGK.shape[1]
    q_index, k_index = ring.index(rank, S), ring.index(source, T)
    visits = []
    for block in blocks(ring, mask, step, rank, S, T):
        rows, columns = block[:2], (source * T + block.k_start, block.k_size)
        keep, q_ids, kv_ids = mask.keep, mask.q_segment_ids, mask.kv_segment_ids
        if keep is not None:
            keep = keep if keep.shape[2] == 1 else _cut(keep, *rows, dim=2)
            keep = keep if keep.shape[3] == 1 else _cut(keep, *columns, dim=3)
        here = AttentionMask(
            causal=mask.causal and block.causal,
            window=mask.window,
            q_segment_ids=None if q_ids is None else _cut(q_ids, *rows),
            kv_segment_ids=None if kv_ids is None else _cut(kv_ids, *columns),
            keep=keep,
            softcap=mask.softcap,
        )
        q_rows, k_rows = _cut(q_index, *rows, dim=0), _cut(k_index, block.k_start, block.k_size, dim=0)
        if ring.kernel is None:
            reachable = None if mask.window is None else _in_reach(here, q_rows, k_rows)
            visits.append((block, _Seen(here, here.between(q_rows, k_rows)), reachable))
        else:  # Kernels for any part skip by themselves what is not in reach, which may be all.
            offset = q_rows[0] - k_rows[0] if ring.kernel.any_part else None
            visits.append((block, _Seen(dataclasses.replace(here, offset=offset), None), None))
    return visits


def _in_reach(mask: AttentionMask, q_index_S: Array, k_index_T: Array) -> Array:
    """Whether causality and window leave any of these keys, both in ascending order, to any of these queries."""
    left, right = mask.window or (-1, -1)
    after, before = k_index_T[0] - q_index_S[-1], q_index_S[0] - k_index_T[-1]
    reach = jnp.bool_(True)
    if mask.causal:
        reach &= after <= 0
    if left >= 0:
        reach &= before <= left
    if right >= 0:
        reach &= after <= right
    return reach


def _when(reachable: Array | None, update: Callable[[Pair], Pair], state: Pair) -> Pair:
    return update(state) if reachable is None else jax.lax.cond(reachable, update, lambda state: state, state)


def _cut(x: Array, start: Array | int, size: int, *, dim: int = 1) -> Array:
    return x if x.shape[dim] == size else jax.lax.dynamic_slice_in_dim(x, start, size, dim)


def _put(x: Array, part: Array, start: Array | int, *, dim: int = 1) -> Array:
    return part if x.shape == part.shape else jax.lax.dynamic_update_slice_in_dim(x, part, start, dim)
