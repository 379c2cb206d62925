"""Matrix products of linear layers in fp8 whose blocks have scales: Megatron's `--fp8-recipe mxfp8` and `blockwise`.

mxfp8, Transformer Engine's MXFP8BlockScaling: 32 neighbours along the terms of each sum share one. GPUs multiply that
from Blackwell on, here by cuDNN (`jax.nn.scaled_matmul`). blockwise, its Float8BlockScaling, DeepSeek-V3's recipe:
activations and gradients in tiles of 1 x 128 along the terms of each sum, kernels in blocks of 128 x 128, so that
forward product and gradient of the input are of tiles by squares and the gradient of the kernel of tiles by tiles
(`common/recipe/__init__.py`: {x,w,grad}_block_scaling_dim = 1, 2, 1); in e4m3, or with gradients in e5m2. A Pallas
kernel multiplies them on Hopper; on Blackwell a tile is four blocks of MXFP8 with one scale, as in Transformer Engine.
Elsewhere, for tests, the rounded numbers are multiplied as they are.

Forward, blocks run along the input's features; for the gradient of the input along the output's; for that of the kernel
along the tokens of a device. They end where a device's part ends: a mesh that divides tokens, or widths that are no
whole blocks, otherwise rounds otherwise.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T tokens of a device, I and O features of the input and the output, K terms of a sum
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.config import ConfigError
from megajax.config_kernels import Fp8
from megajax.ops.fp8_blocks import MX_BLOCK, TILE, Blocks, in_blocks
from megajax.parallel.local_product import Axes, local_product
from megajax.parallel.sharding import constrain, gathered

Array = jax.Array


def _by_cudnn(dtype: Any, a_MK: Blocks, b_NK: Blocks) -> Array:
    a, b = (x.values[None] for x in (a_MK, b_NK))
    a_scales, b_scales = (x.mx_scales()[None] for x in (a_MK, b_NK))
    return jax.nn.scaled_matmul(a, b, a_scales, b_scales, preferred_element_type=dtype)[0]


def _by_pallas(dtype: Any, a_MK: Blocks, b_NK: Blocks) -> Array:
    from megajax.ops.grouped_kernel import block_product  # loads Pallas, which not every machine needs

    return block_product(a_MK, b_NK, dtype)


def _as_they_are(dtype: Any, a_MK: Blocks, b_NK: Blocks) -> Array:
    return jnp.dot(a_MK.numbers(), b_NK.numbers().T).astype(dtype)


class BlockRecipe(NamedTuple):
    """terms: numbers of a block along the terms of a sum. rows: of a block of a kernel. least: what widths of linears,
    on a device, are multiples of. on_gpu: what multiplies."""

    terms: int
    rows: int
    least: int
    on_gpu: Callable[[Any, Blocks, Blocks], Array]


def block_recipe(fp8: Fp8) -> BlockRecipe | None:
    """None: the recipe is not one of blocks."""
    if fp8.recipe == "mxfp8":
        return BlockRecipe(terms=MX_BLOCK, rows=1, least=MX_BLOCK, on_gpu=_by_cudnn)
    if fp8.recipe == "blockwise":
        return BlockRecipe(terms=TILE, rows=TILE, least=16, on_gpu=_by_cudnn if fp8.as_mxfp8 else _by_pallas)
    return None


def multiply(recipe: BlockRecipe, a_MK: Blocks, b_NK: Blocks, dtype: Any) -> Array:
    """a times b, transposed: [M, N]."""
    on_gpu, elsewhere = partial(recipe.on_gpu, dtype), partial(_as_they_are, dtype)
    product = partial(jax.lax.platform_dependent, cuda=on_gpu, default=elsewhere)
    # A layer is initialised under `vmap`, for which cuDNN's product has no rule where one operand alone is many.
    return jnp.asarray(jax.custom_batching.sequential_vmap(product)(a_MK, b_NK))


class Formats(NamedTuple):
    """What activations and weights, and what gradients are rounded to."""

    forward: Any
    backward: Any


class _Setting(NamedTuple):
    """What does not depend on arrays. name: of the recipe; axes: of the kernel."""

    name: str
    recipe: BlockRecipe
    formats: Formats
    axes: tuple[str, str]

    def tiles(self, x_MK: Array, dtype: Any) -> Blocks:
        """Of activations and gradients."""
        return in_blocks(x_MK, dtype, (1, self.recipe.terms))

    def weights(self, kernel_MK: Array) -> Blocks:
        """The kernel as it lies, or transposed, with the terms of the sum last."""
        return in_blocks(kernel_MK, self.formats.forward, (self.recipe.rows, self.recipe.terms))

    def check(self, size: int, which: str) -> None:
        """Of a width on a device."""
        if size % self.recipe.least:
            raise ConfigError(
                f"fp8_recipe={self.name!r} needs widths of linear layers, on a device, that are multiples of"
                f" {self.recipe.least}, and the {which} of one is {size}; change hidden_size, ffn_hidden_size or"
                " tensor_model_parallel_size"
            )


def block_scaled_product(
    fp8: Fp8, recipe: BlockRecipe, formats: Formats, axes: tuple[str, str], x: Array, kernel_IO: Array
) -> Array:
    """`x @ kernel`, and its gradients: see `megajax.transformer.fp8.fp8_product`.

    Raises:
      ConfigError: a width, on a device, is not what the recipe needs.
    """
    return jnp.asarray(_product(_Setting(fp8.recipe, recipe, formats, axes), x, kernel_IO))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(setting: _Setting, x: Array, kernel_IO: Array) -> Array:
    return _forward(setting, x, kernel_IO)[0]


def _layouts(axes: tuple[str, str], ndim: int) -> tuple[Axes, Axes, Axes]:
    """Logical axes of x, of the kernel and of y in a product. ZeRO-3's division of the kernel is undone before."""
    inwards, outwards = (None if axis == "embed" else axis for axis in axes)
    tokens = ("batch",) if ndim == 2 else ("batch", "seq")
    return (*tokens, inwards), (inwards, outwards), (*tokens, outwards)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _entering(x: Array, axis: str) -> Array:
    """x, or a gradient, with the whole sequence, where it comes from sequence parallelism."""
    return constrain(x, "batch", "seq", "act_embed") if axis == "embed" and x.ndim == 3 else x


def _forward(setting: _Setting, x: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    recipe, formats, axes = setting.recipe, setting.formats, setting.axes

    def product(x: Array, kernel: Array) -> Array:
        for size, which in zip(kernel.shape, ("input", "output"), strict=True):
            setting.check(size, which)
        y = multiply(recipe, setting.tiles(_rows(x), formats.forward), setting.weights(kernel.T), x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    kernel = gathered(kernel_IO.astype(x.dtype), *axes)
    y = local_product(product, _entering(x, axes[0]), kernel, _layouts(axes, x.ndim))
    return y, (x, kernel_IO)


def _backward(setting: _Setting, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, kernel_IO), recipe, formats, axes = kept, setting.recipe, setting.formats, setting.axes
    of_x, of_kernel, of_y = _layouts(axes, x.ndim)
    dy = _entering(dy, axes[1])

    def of_input(dy: Array, kernel: Array) -> Array:
        dx = multiply(recipe, setting.tiles(_rows(dy), formats.backward), setting.weights(kernel), x.dtype)
        return dx.reshape(*dy.shape[:-1], -1)

    def of_weights(x: Array, dy: Array) -> Array:
        x8, dy8 = setting.tiles(_rows(x).T, formats.forward), setting.tiles(_rows(dy).T, formats.backward)
        return multiply(recipe, x8, dy8, jnp.float32)

    dx = local_product(of_input, dy, gathered(kernel_IO.astype(x.dtype), *axes), (of_y, of_kernel, of_x))
    dkernel = local_product(of_weights, _entering(x, axes[0]), dy, (of_x, of_y, of_kernel))
    [dkernel] = jax.vjp(lambda kernel: gathered(kernel, *axes), kernel_IO)[1](dkernel.astype(kernel_IO.dtype))
    return dx, dkernel


_product.defvjp(_forward, _backward)
