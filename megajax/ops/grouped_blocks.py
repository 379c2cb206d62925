"""The grouped matrix product and its gradients in fp8 whose blocks have scales, for experts.

Transformer Engine's GroupedLinear under Float8BlockScaling: rows, and gradients, in tiles of 1 x 128 along the terms of
each sum, kernels in blocks of 128 x 128; and under MXFP8BlockScaling: all of them in tiles of 1 x 32. For the gradient
of a kernel tiles run along an expert's rows, from its first on: so groups are whole tiles, as in DeepSeek's DeepGEMM,
and what is rounded together there is what meets on a device, in the order in which it arrives: that of the tokens, or
with sequence parallelism of its devices. Scales are powers of two, so that Blackwell's tensor cores multiply a tile of
128 as four of MXFP8, to the same result.
"""

# SPDX-License-Identifier: Apache-2.0
# R rows, E experts, D width of rows, F width of products
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.ops.fp8_blocks import TILE, Blocks, in_blocks
from megajax.ops.grouped import GroupedKernel, loop_outer, loop_rows_times

Array = jax.Array


class BlockParts(NamedTuple):
    """What computes products of arrays in blocks, rows in groups as in `Groups`.

    rows_times: (x [R, K] in tiles, w [E, N, K] in blocks, sizes [E], dtype) -> [R, N] in that dtype. outer:
    (x [D, R] and dy [F, R] in tiles, sizes) -> fp32 [E, D, F]. Groups are multiples of `TILE`.
    """

    rows_times: Callable[[Blocks, Blocks, Array, Any], Array]
    outer: Callable[[Blocks, Blocks, Array], Array]


def _loop_rows_times(x_RK: Blocks, w_ENK: Blocks, sizes_E: Array, dtype: Any) -> Array:
    return loop_rows_times(x_RK.numbers(), w_ENK.numbers(), sizes_E, TILE, jnp.float32).astype(dtype)


def _loop_outer(x_DR: Blocks, dy_FR: Blocks, sizes_E: Array) -> Array:
    return loop_outer(x_DR.numbers(), dy_FR.numbers(), sizes_E, TILE)


LOOP_PARTS = BlockParts(_loop_rows_times, _loop_outer)
"""Plain XLA on any device: the reference."""


class _Setting(NamedTuple):
    """What does not depend on arrays. forward, backward: the types that rows and kernels, and gradients, are rounded
    to. tile: numbers of one; square: kernels are in blocks of as many rows."""

    parts: BlockParts
    forward: Any
    backward: Any
    tile: int
    square: bool

    def rows(self, x: Array) -> Blocks:
        """Rows of activations, or columns, in tiles."""
        return in_blocks(x, self.forward, (1, self.tile))

    def gradient(self, dy: Array) -> Blocks:
        """The same of gradients."""
        return in_blocks(dy, self.backward, (1, self.tile))

    def kernels(self, w: Array) -> Blocks:
        """Kernels whose last dim is that of the terms."""
        return in_blocks(w, self.forward, (self.tile if self.square else 1, self.tile))


def block_grouped_kernel(
    parts: BlockParts, forward: Any, backward: Any, *, tile: int = TILE, square: bool = True
) -> GroupedKernel:
    """A product of groups that rounds to these fp8 types, by default in the blocks of Float8BlockScaling."""

    def product(x_RD: Array, w_EDF: Array, sizes_E: Array, block: int) -> Array:
        del block  # the one there is
        return jnp.asarray(_product(_Setting(parts, forward, backward, tile, square), x_RD, w_EDF, sizes_E))

    return GroupedKernel(product, most_rows=TILE, least_rows=TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _forward(setting, x_RD, w_EDF, sizes_E)[0]


def _forward(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array):
    x8, w8 = setting.rows(x_RD), setting.kernels(w_EDF.swapaxes(1, 2))
    return setting.parts.rows_times(x8, w8, sizes_E, x_RD.dtype), (x_RD, w_EDF, sizes_E)


def _backward(setting: _Setting, saved: tuple[Array, Array, Array], dy_RF: Array):
    x_RD, w_EDF, sizes_E = saved
    g8, w8 = setting.gradient(dy_RF), setting.kernels(w_EDF)
    dx_RD = setting.parts.rows_times(g8, w8, sizes_E, x_RD.dtype)
    dw_EDF = setting.parts.outer(setting.rows(x_RD.T), setting.gradient(dy_RF.T), sizes_E)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), np.zeros(sizes_E.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
