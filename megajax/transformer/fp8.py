"""Matrix products of linear layers in fp8, with one scale a tensor, made of what it holds now.

Megatron's `--fp8-recipe tensorwise`, Transformer Engine's Float8CurrentScaling. The scales are those of whole tensors,
wherever their parts lie, so a model computes the same on every mesh; each costs an all-reduce of one number. Products
are written as XLA's GemmRewriter knows them, of operands that are fp8 times a scale: cuBLASLt then computes them.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T = B S tokens, I and O features of the input and the output
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from megajax.config_kernels import Fp8Format
from megajax.parallel.sharding import constrain, gathered, merge_tokens

Array = jax.Array


class Formats(NamedTuple):
    """What activations and weights, and what gradients are rounded to."""

    forward: Any
    backward: Any


FORMATS: Mapping[Fp8Format, Formats] = MappingProxyType(
    {
        "e4m3": Formats(jnp.float8_e4m3fn, jnp.float8_e4m3fn),
        "hybrid": Formats(jnp.float8_e4m3fn, jnp.float8_e5m2),
    }
)


class Scaled(NamedTuple):
    """values * scale is the tensor, nearly; values fp8, scale fp32 []."""

    values: Array
    scale: Array

    def as_operand(self, dtype: Any) -> Array:
        """The tensor in the dtype of activations, as a product is to read it."""
        return fp8_ops.dequantize(self.values, dtype, self.scale)


def quantized(x: Array, dtype: Any, compute_dtype: Any) -> Scaled:
    """x with its largest magnitude at the largest number of an fp8 type, by a scale that the compute dtype holds."""
    x = x.astype(jnp.float32)
    largest = fp8_ops.get_fp8_max(dtype, jnp.float32)
    scale = fp8_ops.compute_scale(jnp.max(jnp.abs(x)), jnp.float32(1.0), largest)
    scale = scale.astype(compute_dtype).astype(jnp.float32)
    return Scaled(fp8_ops.quantize(x, dtype, scale, jnp.float32), scale)


def fp8_product(fp8: Fp8Format, axes: tuple[str, str], x: Array, kernel_IO: Array) -> Array:
    """`x @ kernel`, and its gradients, in fp8. x [B, S, I] or [T, I], bf16 or fp32 -> [..., O] in x's dtype.

    Keeps its arguments as they lie for the backward pass, and rounds them again.

    Args:
      axes: logical axes of the kernel's dims; "embed" is where x leaves, or y enters, sequence parallelism.
    """
    return jnp.asarray(_product(fp8, axes, x, kernel_IO))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(fp8: Fp8Format, axes: tuple[str, str], x: Array, kernel_IO: Array) -> Array:
    return _forward(fp8, axes, x, kernel_IO)[0]


def _operand_x(fp8: Fp8Format, axes: tuple[str, str], x: Array) -> Array:
    # Gathered before it is rounded: then products that share x share that, too.
    x = constrain(x, "batch", "seq", "act_embed") if axes[0] == "embed" and x.ndim == 3 else x
    return merge_tokens(quantized(x, FORMATS[fp8].forward, x.dtype).as_operand(x.dtype))


def _operand_kernel(fp8: Fp8Format, axes: tuple[str, str], kernel_IO: Array, dtype: Any) -> Array:
    w8 = quantized(kernel_IO, FORMATS[fp8].forward, dtype)
    return w8._replace(values=gathered(w8.values, *axes)).as_operand(dtype)


def _forward(fp8: Fp8Format, axes: tuple[str, str], x: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    y = jnp.dot(_operand_x(fp8, axes, x), _operand_kernel(fp8, axes, kernel_IO, x.dtype))
    return y.reshape(*x.shape[:-1], -1), (x, kernel_IO)


def _backward(fp8: Fp8Format, axes: tuple[str, str], kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel_IO = kept
    g8 = quantized(dy, FORMATS[fp8].backward, x.dtype)
    if axes[1] == "embed" and dy.ndim == 3:  # both products want the whole sequence
        g8 = g8._replace(values=constrain(g8.values, "batch", "seq", "act_embed"))
    gradient = merge_tokens(g8.as_operand(x.dtype))
    rows, kernel = _operand_x(fp8, axes, x), _operand_kernel(fp8, axes, kernel_IO, x.dtype)
    dx = jnp.dot(gradient, kernel.T)
    tokens = tuple(range(rows.ndim - 1))
    dkernel = jnp.tensordot(rows, gradient, (tokens, tokens), preferred_element_type=jnp.float32)
    [dkernel] = jax.vjp(lambda kernel: gathered(kernel, *axes), kernel_IO)[1](dkernel.astype(kernel_IO.dtype))
    return dx.reshape(x.shape), dkernel


_product.defvjp(_forward, _backward)
