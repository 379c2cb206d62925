"""Matrix products of linear layers in MXFP8: 32 neighbours along the terms of a sum share a scale, a power of two.

Megatron's `--fp8-recipe mxfp8`, Transformer Engine's MXFP8BlockScaling, the microscaling format of the Open Compute
Project. GPUs multiply it from Blackwell on, here by cuDNN (`jax.nn.scaled_matmul`); elsewhere, for tests, the rounded
numbers are multiplied as they are. Forward, blocks run along the input's features; for the gradient of the input along
the output's; for that of the kernel along the tokens of a device, filled up with zeros to whole blocks.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T tokens of a device, I and O features of the input and the output, K terms of a sum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.config import ConfigError
from megajax.parallel.local_product import Axes, local_product
from megajax.parallel.sharding import constrain, gathered

Array = jax.Array

BLOCK = 32
"""Numbers that share a scale."""


class Blocks(NamedTuple):
    """values [M, K] fp8, each times the power of two that its block has in scales [M, K / BLOCK] fp32."""

    values: Array
    scales: Array


def in_blocks(x_MK: Array, dtype: Any) -> Blocks:
    """x rounded: each block by the smallest power of two with which none of its numbers exceeds the type's largest."""
    M, K = x_MK.shape
    x = x_MK.astype(jnp.float32).reshape(M, K // BLOCK, BLOCK)
    most = float(jnp.finfo(dtype).max)
    fraction, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=-1) / most)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)  # a power of two itself
    exponent = jnp.clip(jnp.where(fraction == 0, 0, exponent), -126, 127)
    scales = jnp.ldexp(jnp.ones(exponent.shape, jnp.float32), exponent)  # exp2 is not exact everywhere
    values = jnp.clip(x / scales[..., None], -most, most).astype(dtype)
    return Blocks(values.reshape(M, K), scales)


def block_product(a: Blocks, b: Blocks, dtype: Any) -> Array:
    """a [M, K] times b [N, K], transposed: [M, N]."""
    # A layer is initialised under `vmap`, for which cuDNN's product has no rule where one operand alone is many.
    product = partial(jax.lax.platform_dependent, cuda=partial(_by_cudnn, dtype), default=partial(_as_they_are, dtype))
    return jnp.asarray(jax.custom_batching.sequential_vmap(product)(*a, *b))


def _by_cudnn(dtype: Any, a: Array, a_scales: Array, b: Array, b_scales: Array) -> Array:
    scales = (scales.astype(jnp.float8_e8m0fnu)[None] for scales in (a_scales, b_scales))
    return jax.nn.scaled_matmul(a[None], b[None], *scales, preferred_element_type=dtype)[0]


def _as_they_are(dtype: Any, a: Array, a_scales: Array, b: Array, b_scales: Array) -> Array:
    a, b = (
        values.astype(jnp.float32) * jnp.repeat(scales, BLOCK, axis=1)
        for values, scales in ((a, a_scales), (b, b_scales))
    )
    return jnp.dot(a, b.T).astype(dtype)


class Formats(NamedTuple):
    """What activations and weights, and what gradients are rounded to."""

    forward: Any
    backward: Any


def mxfp8_product(formats: Formats, axes: tuple[str, str], x: Array, kernel_IO: Array) -> Array:
    """`x @ kernel`, and its gradients: see `megajax.transformer.fp8.fp8_product`.

    Raises:
      ConfigError: a width, on a device, is no multiple of `BLOCK`.
    """
    return jnp.asarray(_product(formats, axes, x, kernel_IO))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(formats: Formats, axes: tuple[str, str], x: Array, kernel_IO: Array) -> Array:
    return _forward(formats, axes, x, kernel_IO)[0]


def _layouts(axes: tuple[str, str], ndim: int) -> tuple[Axes, Axes, Axes]:
    """Logical axes of x, of the kernel and of y in a product. ZeRO-3's division of the kernel is undone before."""
    inwards, outwards = (None if axis == "embed" else axis for axis in axes)
    tokens = ("batch",) if ndim == 2 else ("batch", "seq")
    return (*tokens, inwards), (inwards, outwards), (*tokens, outwards)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _check_width(size: int, name: str) -> None:
    if size % BLOCK:
        raise ConfigError(
            f"fp8_recipe='mxfp8' needs widths of linear layers, on a device, that are multiples of {BLOCK}, and the"
            f" {name} of one is {size}; change hidden_size, ffn_hidden_size or tensor_model_parallel_size"
        )


def _entering(x: Array, axis: str) -> Array:
    """x, or a gradient, with the whole sequence, where it comes from sequence parallelism."""
    return constrain(x, "batch", "seq", "act_embed") if axis == "embed" and x.ndim == 3 else x


def _forward(formats: Formats, axes: tuple[str, str], x: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    def product(x: Array, kernel: Array) -> Array:
        _check_width(kernel.shape[0], "input")
        y = block_product(in_blocks(_rows(x), formats.forward), in_blocks(kernel.T, formats.forward), x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    kernel = gathered(kernel_IO.astype(x.dtype), *axes)
    y = local_product(product, _entering(x, axes[0]), kernel, _layouts(axes, x.ndim))
    return y, (x, kernel_IO)


def _backward(formats: Formats, axes: tuple[str, str], kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel_IO = kept
    of_x, of_kernel, of_y = _layouts(axes, x.ndim)
    dy = _entering(dy, axes[1])

    def of_input(dy: Array, kernel: Array) -> Array:
        _check_width(kernel.shape[1], "output")
        dx = block_product(in_blocks(_rows(dy), formats.backward), in_blocks(kernel, formats.forward), x.dtype)
        return dx.reshape(*dy.shape[:-1], -1)

    def of_weights(x: Array, dy: Array) -> Array:
        x_IT, dy_OT = (jnp.pad(_rows(a).T, ((0, 0), (0, -(a.size // a.shape[-1]) % BLOCK))) for a in (x, dy))
        return block_product(in_blocks(x_IT, formats.forward), in_blocks(dy_OT, formats.backward), jnp.float32)

    dx = local_product(of_input, dy, gathered(kernel_IO.astype(x.dtype), *axes), (of_y, of_kernel, of_x))
    dkernel = local_product(of_weights, _entering(x, axes[0]), dy, (of_x, of_y, of_kernel))
    [dkernel] = jax.vjp(lambda kernel: gathered(kernel, *axes), kernel_IO)[1](dkernel.astype(kernel_IO.dtype))
    return dx, dkernel


_product.defvjp(_forward, _backward)
