"""The product of two tiles of fp8 numbers inside a Pallas kernel for Triton, on the tensor cores' own fp8 instructions.

`pallas.triton.dot` does not get there: it demands sums that are exact to fp32, which Hopper's tensor cores do not make
of fp8, so that Triton casts the tiles to fp16 and multiplies those; and it refuses tiles of two types, such as e5m2
gradients and e4m3 weights. So this is an operation of our own. It tells Triton that the sums of one tile may be the
tensor cores'; what a kernel adds up over tiles, it adds in fp32 (as DeepSeek-V3 does, arXiv:2412.19437, section 3.3.2).
Another one is for tiles in the blocks of MXFP8, whose scales Blackwell's tensor cores take with the numbers; for GPUs
before it Triton makes bf16 of them. The rules that hand these to Triton are registered with JAX's internals, which have
no public place for one.
"""

# SPDX-License-Identifier: Apache-2.0
# M rows, N columns, K terms of each sum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.triton import dialect
from jax._src.pallas.triton import lowering
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from megajax.ops.fp8_blocks import MX_BLOCK

Array = jax.Array


def fp8_dot(a_MK: Array, b_NK: Array) -> Array:
    """a times b transposed, [M, N] in fp32, of fp8 tiles of one type or two. K is a multiple of 32."""
    return _fp8_dot.bind(a_MK, b_NK)


def _plainly(a_MK: Array, b_NK: Array) -> Array:
    """What it computes, for kernels that are interpreted."""
    return jnp.dot(a_MK.astype(jnp.float32), b_NK.astype(jnp.float32).T)


_fp8_dot = Primitive("fp8_dot")
_fp8_dot.def_impl(_plainly)


@_fp8_dot.def_abstract_eval
def _shape(a_MK: Any, b_NK: Any) -> Any:
    return ShapedArray((a_MK.shape[0], b_NK.shape[0]), jnp.float32)


mlir.register_lowering(_fp8_dot, mlir.lower_fun(_plainly, multiple_results=False))


@lowering.register_lowering(_fp8_dot)
def _to_triton(context: Any, a_MK: Any, b_NK: Any) -> Any:
    K = context.avals_in[0].shape[1]
    zeros = lowering._zeros(ir.RankedTensorType.get(context.avals_out[0].shape, ir.F32Type.get()))
    # More terms than there are: Triton would else break the tile up again, and run out of registers.
    return dialect.dot(a_MK, dialect.trans(b_NK, (1, 0)), zeros, max_num_imprecise_acc=2 * K)


def mx_dot(sums_MN: Array, a_MK: Array, a_scales: Array, b_NK: Array, b_scales: Array) -> Array:
    """sums and the same of tiles in blocks. Scales uint8 [M, K / 32] and [N, K / 32], n for 2^(n - 127)."""
    return _mx_dot.bind(sums_MN, a_MK, a_scales, b_NK, b_scales)


def _mx_plainly(sums_MN: Array, a_MK: Array, a_scales: Array, b_NK: Array, b_scales: Array) -> Array:
    """What it computes, for kernels that are interpreted."""

    def numbers(x: Array, exponents: Array) -> Array:
        scales = jnp.ldexp(jnp.float32(1), exponents.astype(jnp.int32) - 127)
        return x.astype(jnp.float32) * jnp.repeat(scales, MX_BLOCK, axis=1)

    return sums_MN + jnp.dot(numbers(a_MK, a_scales), numbers(b_NK, b_scales).T)


_mx_dot = Primitive("mx_dot")
_mx_dot.def_impl(_mx_plainly)


@_mx_dot.def_abstract_eval
def _mx_shape(sums_MN: Any, *operands: Any) -> Any:
    return ShapedArray(sums_MN.shape, sums_MN.dtype)


mlir.register_lowering(_mx_dot, mlir.lower_fun(_mx_plainly, multiple_results=False))

_TYPES: Mapping[str, dialect.ScaleDotElemType] = MappingProxyType(
    {"float8_e4m3fn": dialect.ScaleDotElemType.E4M3, "float8_e5m2": dialect.ScaleDotElemType.E5M2}
)


@lowering.register_lowering(_mx_dot)
def _mx_to_triton(context: Any, sums_MN: Any, a_MK: Any, a_scales: Any, b_NK: Any, b_scales: Any) -> Any:
    def type_of(operand: int) -> Any:
        value = _TYPES[str(context.avals_in[operand].dtype)].value
        return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value)

    return dialect.dot_scaled(
        sums_MN.type, a_MK, dialect.trans(b_NK, (1, 0)), sums_MN, type_of(1), type_of(3), False,
        a_scale=a_scales, b_scale=b_scales, lhs_k_pack=True, rhs_k_pack=True,
    )  # fmt: skip
