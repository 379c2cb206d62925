"""The grouped matrix product and its gradients in fp8: each expert's rows, and its kernel, have a scale of their own.

Transformer Engine's GroupedLinear, which has quantizers of input, weight and output gradient for each of its products
(`pytorch/module/grouped_linear.py`), under Float8CurrentScaling: what is rounded together is the rows that meet on a
device, so a mesh that divides them otherwise rounds otherwise. Under DelayedScaling scales are given, and every mesh
rounds alike. fp8 products of a GPU want the terms of their sums side by side in memory: so kernels and, for their
gradients, rows are transposed while they are rounded.
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
from megajax.parallel.gradient_sums import GRADIENT, INPUT, KERNEL

Array = jax.Array

LEAST = 32
"""What all sizes of an fp8 product must be multiples of: the terms that a GPU adds up at once."""


class Fp8Parts(NamedTuple):
    """What computes products of fp8 arrays, rows in groups as in `Groups`, without scales.

    rows_times: (x [R, K], w [E, N, K], sizes [E], block, dtype) -> [R, N] in that dtype. outer: (x [D, R], dy [F, R],
    sizes, block) -> fp32 [E, D, F], also of arrays that are not fp8. most_rows: as of `GroupedKernel`.
    """

    rows_times: Callable[[Array, Array, Array, int, Any], Array]
    outer: Callable[[Array, Array, Array, int], Array]
    most_rows: int


LOOP_PARTS = Fp8Parts(loop_rows_times, loop_outer, most_rows=512)
"""Plain XLA on any device: the reference."""


class _Setting(NamedTuple):
    """What does not depend on arrays. forward, backward: the types that rows and kernels, and gradients, are rounded
    to. wgrad: gradients of kernels are products in fp8, too."""

    parts: Fp8Parts
    forward: Any
    backward: Any
    wgrad: bool
    block: int


def fp8_grouped_kernel(parts: Fp8Parts, forward: Any, backward: Any, *, wgrad: bool = True) -> GroupedKernel:
    """A product of groups that rounds to these fp8 types. Without scales [E, 3], of each expert's input, kernel and
    gradient, it finds them; the "gradients" of those given are the largest magnitudes of an expert's rows of input and
    gradient."""

    def product(x_RD: Array, w_EDF: Array, sizes_E: Array, block: int, scales_E3: Array | None = None) -> Array:
        setting = _Setting(parts, forward, backward, wgrad, block)
        return jnp.asarray(_product(setting, x_RD, w_EDF, sizes_E, scales_E3))

    return GroupedKernel(product, parts.most_rows, least_rows=LEAST)


class _Rounded(NamedTuple):
    """values * scale is the array: of rows [R, ...] the scale of their expert, of kernels [E, ...] that of each."""

    values: Array
    scales: Array


class _Operands:
    """The three arrays of a product and its gradients, rounded."""

    def __init__(self, setting: _Setting, groups: Groups, scales_E3: Array | None) -> None:
        self._setting, self._groups = setting, groups
        self._scales = (None,) * 3 if scales_E3 is None else tuple(scales_E3.T)

    def rows(self, x_RD: Array) -> _Rounded:
        return self._rounded_rows(x_RD, self._scales[INPUT], self._setting.forward)

    def kernels(self, w_EDF: Array) -> _Rounded:
        w_EDF, dtype, scales = w_EDF.astype(jnp.float32), self._setting.forward, self._scales[KERNEL]
        if scales is None:
            scales = _scale(jnp.max(jnp.abs(w_EDF), axis=(1, 2)), dtype)
        return _Rounded(_cast(w_EDF / scales[:, None, None], dtype), scales)

    def gradient(self, dy_RF: Array) -> _Rounded:
        return self._rounded_rows(dy_RF, self._scales[GRADIENT], self._setting.backward)

    def _rounded_rows(self, x_RD: Array, scales: Array | None, dtype: Any) -> _Rounded:
        expert_R, x_RD = _rows_of_experts(x_RD, self._groups)
        if scales is None:
            scales = _scale(_largest(x_RD, self._groups), dtype)
        return _Rounded(_cast(x_RD / _of_rows(scales, expert_R), dtype), scales)


def _rows_of_experts(x_RD: Array, groups: Groups) -> tuple[Array, Array]:
    """(expert of each row, the rows in fp32, zero behind the last group)."""
    expert_R = groups.expert_of_row(x_RD.shape[0])
    return expert_R, jnp.where(expert_R[:, None] < groups.sizes.shape[0], x_RD.astype(jnp.float32), 0)


def _largest(x_RD: Array, groups: Groups) -> Array:
    """[E], the largest magnitude in the rows of each expert."""
    expert_R, x_RD = _rows_of_experts(x_RD, groups)
    largest_R = jnp.max(jnp.abs(x_RD), axis=1)
    largest_E = jax.ops.segment_max(largest_R, expert_R, groups.sizes.shape[0] + 1, indices_are_sorted=True)[:-1]
    return jnp.maximum(largest_E, 0)  # of no row at all the largest is -inf


def _scale(largest: Array, dtype: Any) -> Array:
    scale = largest / float(jnp.finfo(dtype).max)
    return jnp.where((largest > 0) & jnp.isfinite(largest), scale, 1.0)


def _cast(x: Array, dtype: Any) -> Array:
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def _of_rows(scales: Array, expert_R: Array) -> Array:
    return scales.at[expert_R].get(mode="fill", fill_value=1.0)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array, scales_E3: Array | None) -> Array:
    return _forward(setting, x_RD, w_EDF, sizes_E, scales_E3)[0]


def _forward(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array, scales_E3: Array | None):
    groups = Groups(sizes_E, setting.block)
    operands = _Operands(setting, groups, scales_E3)
    x8, w8 = operands.rows(x_RD), operands.kernels(w_EDF)
    y_RF = setting.parts.rows_times(x8.values, w8.values.swapaxes(1, 2), sizes_E, setting.block, x_RD.dtype)
    return _scaled_rows(y_RF, x8.scales * w8.scales, groups), (x_RD, w_EDF, sizes_E, scales_E3)


def _backward(setting: _Setting, saved: tuple[Array, Array, Array, Array | None], dy_RF: Array):
    x_RD, w_EDF, sizes_E, scales_E3 = saved
    groups, parts = Groups(sizes_E, setting.block), setting.parts
    operands = _Operands(setting, groups, scales_E3)
    w8, g8 = operands.kernels(w_EDF), operands.gradient(dy_RF)
    dx_RD = parts.rows_times(g8.values, w8.values, sizes_E, setting.block, x_RD.dtype)
    if setting.wgrad:
        x8 = operands.rows(x_RD)
        dw_EDF = parts.outer(x8.values.T, g8.values.T, sizes_E, setting.block)
        dw_EDF *= (x8.scales * g8.scales)[:, None, None]
    else:
        dw_EDF = parts.outer(x_RD.T, dy_RF.T, sizes_E, setting.block)
    largest_E3 = None
    if scales_E3 is not None:
        largest_E3 = jnp.zeros_like(scales_E3)
        for tensor, rows in ((INPUT, x_RD), (GRADIENT, dy_RF)):
            largest_E3 = largest_E3.at[:, tensor].set(_largest(rows, groups))
    no_gradient = np.zeros(sizes_E.shape, jax.dtypes.float0)
    dx_RD = _scaled_rows(dx_RD, g8.scales * w8.scales, groups)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), no_gradient, largest_E3


def _scaled_rows(y: Array, scales: Array, groups: Groups) -> Array:
    return (y * _of_rows(scales, groups.expert_of_row(y.shape[0]))).astype(y.dtype)


_product.defvjp(_forward, _backward)
