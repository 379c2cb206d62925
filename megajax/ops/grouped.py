"""Rows grouped by expert: where each token goes, capacity and dropping, and the matrix product of every group.

Legend: N tokens, K experts a token, E experts, R rows of the buffer that experts read, C rows an expert, D, F widths.
"""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
DropPolicy = Literal["probs", "position"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sizes"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows [R, ...] that lie expert after expert: `sizes` int32 [E], each a multiple of `block`, sum <= R.

    Rows behind the last group belong to nobody and hold zeros.
    """

    sizes: Array
    block: int

    def expert_of_row(self, rows: int) -> Array:
        """int32 [rows]: the expert whose row it is; E for rows behind the last group."""
        return jnp.searchsorted(jnp.cumsum(self.sizes), jnp.arange(rows), side="right").astype(jnp.int32)


class Placement(NamedTuple):
    """A one-to-one map between assignments (token, choice) and rows of a buffer.

    rows: [N, K], the row of each assignment, R where it has none. source: [R], the assignment n * K + k of each
    row, N * K where the row is empty.
    """

    rows: Array
    source: Array


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows an expert accepts from `tokens` tokens: ceil(tokens * K / E * factor), at most one a token.

    Source: Megatron's `get_capacity` and `apply_router_token_dropping` (transformer/moe/moe_utils.py).
    """
    return min(math.ceil((tokens * top_k / num_experts) * factor), tokens)


def round_up(size: int, block: int) -> int:
    """`size` up to a multiple of `block`."""
    return -(-size // block) * block


def expert_counts(ids_NK: Array, num_experts: int) -> Array:
    """int32 [E]: assignments of every expert. Ids outside [0, E) are assignments to nobody."""
    return jnp.zeros(num_experts + 1, jnp.int32).at[_nobody_last(ids_NK, num_experts).reshape(-1)].add(1)[:-1]


def _nobody_last(ids: Array, num_experts: int) -> Array:
    return jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def rank_in_expert(ids_NK: Array, num_experts: int, priority_NK: Array | None = None) -> tuple[Array, Array]:
    """Place of every assignment in the queue of its expert.

    Args:
      ids_NK: int32; an id outside [0, E) is an assignment to nobody.
      priority_NK: who stands in front; without it, or where equal, the earlier token does.

    Returns:
      (rank int32 [N, K], 0 in front; counts int32 [E]). The rank of an assignment to nobody means nothing.
    """
    ids = _nobody_last(ids_NK, num_experts).reshape(-1)
    index = jnp.arange(ids.size, dtype=jnp.int32)
    if priority_NK is None:
        order = jnp.argsort(ids, stable=True)
    else:
        priority = -lax.stop_gradient(priority_NK).reshape(-1)
        order = lax.sort((ids, priority, index), num_keys=2, is_stable=True)[-1]
    counts = expert_counts(ids_NK, num_experts)
    # Nobody's queue stands behind all others.
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
    rank = jnp.zeros_like(index).at[order].set(index) - starts[ids]
    return rank.reshape(ids_NK.shape), counts


def drop(ids_NK: Array, probs_NK: Array, num_experts: int, limit: int, policy: DropPolicy) -> Array:
    """ids, but E (nobody) for every assignment beyond the first `limit` of its expert. Nothing is renormalised.

    `probs` keeps the most probable, `position` the earliest tokens: Megatron's policies. (Its `position` leaves which
    tokens stay to the order of torch.topk's ties.)
    """
    rank, _ = rank_in_expert(ids_NK, num_experts, probs_NK if policy == "probs" else None)
    return jnp.where(rank < limit, ids_NK, num_experts)


def place(ids_NK: Array, starts_E: Array, rows: int) -> Placement:
    """Gives every assignment the next free row from `starts_E[expert]` on; tokens of an expert stay in order."""
    num_experts = starts_E.shape[0]
    rank, _ = rank_in_expert(ids_NK, num_experts)
    return _placement(ids_NK, rank, starts_E, rows)


def block_for(rows: int, least: int, most: int) -> int:
    """Rows that a group is rounded up to where an expert gets `rows` on average: `least`, and up to `most` for many.

    Half a block of each group is computed in vain: a power of two of at most an eighth of the rows.
    """
    return max(least, min(most, 1 << max(0, (rows // 8).bit_length() - 1)))


def place_grouped(ids_NK: Array, num_experts: int, rows: int, block: int) -> tuple[Placement, Groups]:
    """Expert after expert, each group rounded up to `block` rows: what a grouped matrix product reads."""
    rank, counts = rank_in_expert(ids_NK, num_experts)
    sizes = -(-counts // block) * block
    return _placement(ids_NK, rank, jnp.cumsum(sizes) - sizes, rows), Groups(sizes, block)


def _placement(ids_NK: Array, rank_NK: Array, starts_E: Array, rows: int) -> Placement:
    somebody = (ids_NK >= 0) & (ids_NK < starts_E.shape[0])
    rows_NK = jnp.where(somebody, starts_E[ids_NK] + rank_NK, rows).astype(jnp.int32)
    source = jnp.full(rows, ids_NK.size, jnp.int32)
    source = source.at[rows_NK.reshape(-1)].set(jnp.arange(ids_NK.size, dtype=jnp.int32), mode="drop")
    return Placement(rows_NK, source)


def permute(x_ND: Array, placement: Placement) -> Array:
    """Token rows to buffer rows, [N, ...] -> [R, ...]; empty rows are zero. Its gradient is `unpermute`."""
    rows_NK, source = placement
    return _permute(x_ND, source // rows_NK.shape[1], rows_NK)


def permute_choices(x_NK: Array, placement: Placement) -> Array:
    """The same for what every assignment has of its own, such as its probability: [N, K, ...] -> [R, ...]."""
    return _permute(x_NK.reshape(-1, *x_NK.shape[2:]), placement.source, placement.rows.reshape(-1, 1))


def unpermute(y_RD: Array, placement: Placement) -> Array:
    """Buffer rows back to tokens, the K rows of a token summed: [R, ...] -> [N, ...]. Its gradient is `permute`."""
    rows_NK, source = placement
    return _unpermute(y_RD, source // rows_NK.shape[1], rows_NK)


def take(x: Array, index: Array) -> Array:
    """Rows of x; an index outside of it takes zeros."""
    return x.at[index].get(mode="fill", fill_value=0)


# The two are each other's transpose. Said so, both directions are gathers; autodiff would scatter rows one by one.
@jax.custom_vjp
def _permute(x_ND: Array, token_R: Array, rows_NK: Array) -> Array:
    return take(x_ND, token_R)


@jax.custom_vjp
def _unpermute(y_RD: Array, token_R: Array, rows_NK: Array) -> Array:
    return take(y_RD, rows_NK).sum(1)


_permute.defvjp(
    lambda x, token, rows: (_permute(x, token, rows), (token, rows)),
    lambda saved, dy: (_unpermute(dy, *saved), None, None),
)
_unpermute.defvjp(
    lambda y, token, rows: (_unpermute(y, token, rows), (token, rows)),
    lambda saved, dx: (_permute(dx, *saved), None, None),
)


class GroupedKernel(NamedTuple):
    """What computes the product of groups. product: (x [R, D], w [E, D, F], sizes [E], block) -> [R, F], with gradients
    of x and w; in fp8 also of scales (`megajax.ops.grouped_fp8`). most_rows: of the blocks it does best with, of many
    rows an expert. least_rows: of any block."""

    product: Callable[..., Array]
    most_rows: int
    least_rows: int = 16


def grouped_matmul(
    x: Array, w_EDF: Array, groups: Groups | None, kernel: GroupedKernel | None = None, scales_E3: Array | None = None
) -> Array:
    """Rows times the kernel of their expert, in x's dtype.

    Args:
      x: [E, C, D] with `groups` None (one batched product of 2 E C D F FLOPs), or [R, D] with `groups`.
      w_EDF: kernels.
      kernel: computes groups; `LOOP` by default.
      scales_E3: given to a kernel of `megajax.ops.grouped_fp8`.

    Returns:
      [E, C, F] or [R, F]. With `groups` the work is 2 sum(sizes) D F FLOPs.
    """
    w_EDF = w_EDF.astype(x.dtype)
    if groups is None:
        return jnp.einsum("ecd,edf->ecf", x, w_EDF)
    scales = () if scales_E3 is None else (scales_E3,)
    return (kernel or LOOP).product(x, w_EDF, groups.sizes, groups.block, *scales)


def grouped_bias(bias_EF: Array, x: Array, groups: Groups | None) -> Array:
    """The bias of each row's expert, to be added to [E, C, F] or [R, F]; zero behind the last group."""
    bias_EF = bias_EF.astype(x.dtype)
    return bias_EF[:, None] if groups is None else take(bias_EF, groups.expert_of_row(x.shape[0]))


def _each_block(sizes: Array, block: int, body, init: Array) -> Array:
    """Folds body(expert, first row, carry) over the blocks that hold rows."""
    ends = jnp.cumsum(sizes) // block

    def step(b: Array, carry: Array) -> Array:
        return body(jnp.searchsorted(ends, b, side="right", method="compare_all"), b * block, carry)

    return lax.fori_loop(0, ends[-1], step, init)


def _rows_times(x_RD: Array, w_EDF: Array, sizes: Array, block: int) -> Array:
    def body(expert: Array, row: Array, y_RF: Array) -> Array:
        x = lax.dynamic_slice_in_dim(x_RD, row, block)
        w = lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
        return lax.dynamic_update_slice_in_dim(y_RF, x @ w, row, 0)

    return _each_block(sizes, block, body, jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_RD: Array, w_EDF: Array, sizes: Array, block: int) -> Array:
    return _rows_times(x_RD, w_EDF, sizes, block)


def _grouped_matmul_fwd(x_RD: Array, w_EDF: Array, sizes: Array, block: int):
    return _rows_times(x_RD, w_EDF, sizes, block), (x_RD, w_EDF, sizes)


def _grouped_matmul_bwd(block: int, saved: tuple[Array, Array, Array], dy_RF: Array):
    x_RD, w_EDF, sizes = saved
    dw_EDF = _outer(x_RD, dy_RF, sizes, block)
    no_gradient = np.zeros(sizes.shape, jax.dtypes.float0)
    return _rows_times(dy_RF, w_EDF.swapaxes(1, 2), sizes, block), dw_EDF.astype(w_EDF.dtype), no_gradient


def _outer(x_RD: Array, dy_RF: Array, sizes: Array, block: int) -> Array:
    def body(expert: Array, row: Array, dw_EDF: Array) -> Array:
        x, dy = (lax.dynamic_slice_in_dim(a, row, block) for a in (x_RD, dy_RF))
        dw = lax.dynamic_index_in_dim(dw_EDF, expert, keepdims=False)
        dw += jnp.dot(x.T, dy, preferred_element_type=jnp.float32)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw, expert, 0)

    shape = (sizes.shape[0], x_RD.shape[1], dy_RF.shape[1])
    return _each_block(sizes, block, body, jnp.zeros(shape, jnp.float32))


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def loop_rows_times(x_RK: Array, w_ENK: Array, sizes: Array, block: int, dtype: Any) -> Array:
    """The loop's product of rows with kernels that are transposed: see `megajax.ops.grouped_fp8.Fp8Parts`."""
    return _rows_times(x_RK.astype(dtype), w_ENK.astype(dtype).swapaxes(1, 2), sizes, block)


def loop_outer(x_DR: Array, dy_FR: Array, sizes: Array, block: int) -> Array:
    """The loop's gradients of kernels, likewise."""
    return _outer(x_DR.T.astype(jnp.float32), dy_FR.T.astype(jnp.float32), sizes, block)


# For each block an expert's kernel is read anew, and of 128 rows a GPU reads it for longer than it computes.
LOOP = GroupedKernel(_grouped_matmul, most_rows=512)  # pyright: ignore[reportArgumentType]
"""Plain XLA on any device: over the blocks that hold rows, whose number is known at run time only. XLA's own
`ragged_dot` computes every row for every expert, on CPU and on GPU."""
