"""The grouped matrix product and its gradients in fp8: each expert's rows, and its kernel, have a scale of their own.

Transformer Engine's GroupedLinear under Float8CurrentScaling. What is rounded together is the rows that meet on a
device, so a mesh that divides them otherwise rounds otherwise. fp8 products of a GPU want the terms of their sums side
by side in memory: so kernels and, for their gradients, rows are transposed while they are rounded.
"""

# SPDX-License-Identifier: Apache-2.0
# R rows, E experts, D width of rows, F width of products, K terms of a sum, N its products
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.ops.grouped import GroupedKernel, Groups, loop_outer, loop_rows_times

Array = jax.Array

LEAST = 32
"""What all sizes of an fp8 product must be multiples of: the terms that a GPU adds up at once."""


class Fp8Parts(NamedTuple):
    """What computes products of fp8 arrays, rows in groups as in `Groups`, without scales.

    rows_times: (x [R, K], w [E, N, K], sizes [E], block, dtype) -> [R, N] in that dtype. outer: (x [D, R], dy [F, R],
    sizes, block) -> fp32 [E, D, F]. most_rows: as of `GroupedKernel`.
    """

    rows_times: Callable[[Array, Array, Array, int, Any], Array]
    outer: Callable[[Array, Array, Array, int], Array]
    most_rows: int


LOOP_PARTS = Fp8Parts(loop_rows_times, loop_outer, most_rows=512)
"""Plain XLA on any device: the reference."""


class _Setting(NamedTuple):
    """What does not depend on arrays. forward, backward: the types that rows and kernels, and gradients, are rounded
    to."""

    parts: Fp8Parts
    forward: Any
    backward: Any
    block: int


def fp8_grouped_kernel(parts: Fp8Parts, forward: Any, backward: Any) -> GroupedKernel:
    """A product of groups that rounds to these fp8 types."""

    def product(x_RD: Array, w_EDF: Array, sizes_E: Array, block: int) -> Array:
        return jnp.asarray(_product(_Setting(parts, forward, backward, block), x_RD, w_EDF, sizes_E))

    return GroupedKernel(product, parts.most_rows, least_rows=LEAST)


class _Rounded(NamedTuple):
    """values * scale is the array: of rows [R, ...] the scale of their expert, of kernels [E, ...] that of each."""

    values: Array
    scales: Array


def _rounded_rows(x_RD: Array, groups: Groups, dtype: Any) -> _Rounded:
    E, expert_R = groups.sizes.shape[0], groups.expert_of_row(x_RD.shape[0])
    x_RD = jnp.where(expert_R[:, None] < E, x_RD.astype(jnp.float32), 0)
    largest_R = jnp.max(jnp.abs(x_RD), axis=1)
    largest_E = jax.ops.segment_max(largest_R, expert_R, E + 1, indices_are_sorted=True)[:-1]
    scales = _scale(jnp.maximum(largest_E, 0), dtype)  # of no row at all the largest is -inf
    return _Rounded(_cast(x_RD / _of_rows(scales, expert_R), dtype), scales)


def _rounded_kernels(w_EDF: Array, dtype: Any) -> _Rounded:
    w_EDF = w_EDF.astype(jnp.float32)
    scales = _scale(jnp.max(jnp.abs(w_EDF), axis=(1, 2)), dtype)
    return _Rounded(_cast(w_EDF / scales[:, None, None], dtype), scales)


def _scale(largest: Array, dtype: Any) -> Array:
    scale = largest / float(jnp.finfo(dtype).max)
    return jnp.where((largest > 0) & jnp.isfinite(largest), scale, 1.0)


def _cast(x: Array, dtype: Any) -> Array:
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def _of_rows(scales: Array, expert_R: Array) -> Array:
    return scales.at[expert_R].get(mode="fill", fill_value=1.0)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _forward(setting, x_RD, w_EDF, sizes_E)[0]


def _forward(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array):
    groups = Groups(sizes_E, setting.block)
    x8, w8 = _rounded_rows(x_RD, groups, setting.forward), _rounded_kernels(w_EDF, setting.forward)
    y_RF = setting.parts.rows_times(x8.values, w8.values.swapaxes(1, 2), sizes_E, setting.block, x_RD.dtype)
    return _scaled_rows(y_RF, x8.scales * w8.scales, groups), (x_RD, w_EDF, sizes_E)


def _backward(setting: _Setting, saved: tuple[Array, Array, Array], dy_RF: Array):
    x_RD, w_EDF, sizes_E = saved
    groups, parts = Groups(sizes_E, setting.block), setting.parts
    x8, w8 = _rounded_rows(x_RD, groups, setting.forward), _rounded_kernels(w_EDF, setting.forward)
    g8 = _rounded_rows(dy_RF, groups, setting.backward)
    dx_RD = parts.rows_times(g8.values, w8.values, sizes_E, setting.block, x_RD.dtype)
    dw_EDF = parts.outer(x8.values.T, g8.values.T, sizes_E, setting.block)
    dw_EDF = (dw_EDF * (x8.scales * g8.scales)[:, None, None]).astype(w_EDF.dtype)
    no_gradient = np.zeros(sizes_E.shape, jax.dtypes.float0)
    return _scaled_rows(dx_RD, g8.scales * w8.scales, groups), dw_EDF, no_gradient


def _scaled_rows(y: Array, scales: Array, groups: Groups) -> Array:
    return (y * _of_rows(scales, groups.expert_of_row(y.shape[0]))).astype(y.dtype)


_product.defvjp(_forward, _backward)
