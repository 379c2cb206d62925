"""Matrix products of linear layers in fp8, with one scale a tensor: of what it holds now, or of what it held before.

Megatron's `--fp8-recipe tensorwise`, Transformer Engine's Float8CurrentScaling, makes a tensor's scale of its largest
magnitude; the scales are those of whole tensors, wherever their parts lie, and each costs an all-reduce of one number.
`--fp8-recipe delayed`, its DelayedScaling, makes it of the largest magnitudes of earlier steps, so that a tensor is
read once only. Either way a model computes the same on every mesh. Products are written as XLA's GemmRewriter knows
them, of operands that are fp8 times a scale: cuBLASLt then computes them.

With delayed scaling each linear has a parameter `fp8_meta` that no optimizer touches: scales and largest magnitudes of
its input, its kernel and the gradient of its output; of experts each has its own. Its "gradient" are the magnitudes of
a microbatch, of which the largest counts (`megajax.parallel.gradient_sums`). After a step `next_meta` makes the next
one of it. So an entry of Transformer Engine's history is a microbatch, and here it is a step: all microbatches of a
step are scaled alike, and no schedule of them, nor the number of data-parallel replicas, changes what is computed. Nor
does expert parallelism: where Transformer Engine takes the largest magnitude of the experts that have the same place on
their devices, here experts share nothing.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T = B S tokens, I and O features of the input and the output, H steps that are remembered
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from megajax.config_kernels import Fp8, Fp8Format
from megajax.parallel.gradient_sums import GRADIENT, INPUT, KERNEL, is_fp8_meta
from megajax.parallel.replicas import largest_of_all
from megajax.parallel.sharding import constrain, gathered, merge_tokens
from megajax.transformer.fp8_blocks import Formats, block_recipe, block_scaled_product

Array = jax.Array


FORMATS: Mapping[Fp8Format, Formats] = MappingProxyType(
    {
        "e4m3": Formats(jnp.float8_e4m3fn, jnp.float8_e4m3fn),
        "hybrid": Formats(jnp.float8_e4m3fn, jnp.float8_e5m2),
    }
)


def meta_shape(fp8: Fp8) -> tuple[int, int] | None:
    """Shape of a linear's `fp8_meta`: for each tensor its scale (0 before the first step: 1 is used) and the largest
    magnitudes of H steps, the last one first. None: the recipe has none."""
    return (3, 1 + fp8.amax_history_len) if fp8.recipe == "delayed" else None


def next_meta(fp8: Fp8, meta: Array, gradient: Array) -> Array:
    """What a step makes of `fp8_meta` [..., 3, 1 + H] and of its "gradient". Transformer Engine:
    `common/recipe/delayed_scaling.cu`; a tensor that was all zeros keeps its scale."""
    forward, backward = (float(fp8_ops.get_fp8_max(dtype, jnp.float32)) for dtype in FORMATS[fp8.format])
    history = jnp.concatenate([gradient[..., 1:2], meta[..., 1:-1]], axis=-1)
    amax = history[..., 0] if fp8.amax_compute_algo == "most_recent" else jnp.max(history, axis=-1)
    largest = jnp.array([forward, forward, backward], jnp.float32)
    scale = fp8_ops.compute_scale(amax, _scales(meta), largest, fp8.margin)
    return jnp.concatenate([scale[..., None], history], axis=-1)


def with_next_meta(fp8: Fp8 | None, params: Any, gradients: Any) -> Any:
    """Parameters with every `fp8_meta` in it replaced by what a step makes of it."""
    if fp8 is None or meta_shape(fp8) is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, gradient: next_meta(fp8, leaf, gradient) if is_fp8_meta(path) else leaf, params, gradients
    )


def _scales(meta: Array) -> Array:
    return jnp.where(meta[..., 0] > 0, meta[..., 0], 1.0)


@jax.custom_vjp
def scales_of(meta: Array, kernel: Array) -> Array:
    """The scales [..., 3] in `fp8_meta` [..., 3, 1 + H] of linears with these kernels [..., I, O]. Their "gradients"
    are the largest magnitudes of inputs and gradients; those of kernels, also of such as nothing was multiplied with,
    are added here."""
    return _scales(meta)


def _scales_forward(meta: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scales(meta), (meta, kernel)


def _scales_backward(kept: tuple[Array, Array], largest: Array) -> tuple[Array, None]:
    meta, kernel = kept
    largest = largest.at[..., KERNEL].set(jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=(-2, -1)))
    return jnp.zeros_like(meta).at[..., 1].set(largest), None


scales_of.defvjp(_scales_forward, _scales_backward)


class Scaled(NamedTuple):
    """values * scale is the tensor, nearly; values fp8, scale fp32 []."""

    values: Array
    scale: Array

    def as_operand(self, dtype: Any) -> Array:
        """The tensor in the dtype of activations, as a product is to read it."""
        return fp8_ops.dequantize(self.values, dtype, self.scale)


def quantized(x: Array, dtype: Any, compute_dtype: Any, scale: Array | None = None) -> Scaled:
    """x in an fp8 type, by a scale that the compute dtype holds. None: the one that brings x's largest magnitude to the
    type's largest number."""
    x = x.astype(jnp.float32)
    if scale is None:
        largest = fp8_ops.get_fp8_max(dtype, jnp.float32)
        scale = fp8_ops.compute_scale(largest_of_all(_amax(x)), jnp.float32(1.0), largest)
    scale = scale.astype(compute_dtype).astype(jnp.float32)
    return Scaled(fp8_ops.quantize(x, dtype, scale, jnp.float32), scale)


def _amax(x: Array) -> Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32)))


def fp8_product(fp8: Fp8, axes: tuple[str, str], x: Array, kernel_IO: Array, meta: Array | None = None) -> Array:
    """`x @ kernel`, and its gradients, in fp8. x [B, S, I] or [T, I], bf16 or fp32 -> [..., O] in x's dtype.

    Keeps its arguments as they lie for the backward pass, and rounds them again.

    Args:
      axes: logical axes of the kernel's dims; "embed" is where x leaves, or y enters, sequence parallelism.
      meta: [3, 1 + H], if `meta_shape` says so.
    """
    blocks = block_recipe(fp8)
    if blocks is not None:
        return block_scaled_product(fp8, blocks, FORMATS[fp8.format], axes, x, kernel_IO)
    scales = None if meta is None else scales_of(meta, kernel_IO)
    return jnp.asarray(_product(fp8, axes, x, kernel_IO, scales))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(fp8: Fp8, axes: tuple[str, str], x: Array, kernel_IO: Array, scales: Array | None) -> Array:
    return _forward(fp8, axes, x, kernel_IO, scales)[0]


class _Operands:
    """The three tensors of a product and its gradients, rounded."""

    def __init__(self, fp8: Fp8, axes: tuple[str, str], x: Array, kernel_IO: Array, scales: Array | None) -> None:
        self._formats, self._axes, self._dtype = FORMATS[fp8.format], axes, x.dtype
        self._scales = (None,) * 3 if scales is None else tuple(scales)
        # Gathered before it is rounded: then products that share x share that, too.
        entering = axes[0] == "embed" and x.ndim == 3
        self.x, self.kernel = constrain(x, "batch", "seq", "act_embed") if entering else x, kernel_IO

    def input(self) -> Array:
        """x [..., I], as a product reads it."""
        x8 = quantized(self.x, self._formats.forward, self._dtype, self._scales[INPUT])
        return merge_tokens(x8.as_operand(self._dtype))

    def weight(self) -> Array:
        """The kernel [I, O], whole along what ZeRO-3 divides: gathered in fp8."""
        w8 = quantized(self.kernel, self._formats.forward, self._dtype, self._scales[KERNEL])
        return w8._replace(values=gathered(w8.values, *self._axes)).as_operand(self._dtype)

    def gradient(self, dy: Array) -> Array:
        """dy [..., O]."""
        g8 = quantized(dy, self._formats.backward, self._dtype, self._scales[GRADIENT])
        g8 = g8._replace(values=self.whole(g8.values))
        return merge_tokens(g8.as_operand(self._dtype))

    def whole(self, dy: Array) -> Array:
        """dy as both products want it, with the whole sequence."""
        leaving = self._axes[1] == "embed" and dy.ndim == 3
        return constrain(dy, "batch", "seq", "act_embed") if leaving else dy


def _forward(
    fp8: Fp8, axes: tuple[str, str], x: Array, kernel_IO: Array, scales: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    operands = _Operands(fp8, axes, x, kernel_IO, scales)
    y = jnp.dot(operands.input(), operands.weight())
    return y.reshape(*x.shape[:-1], -1), (x, kernel_IO, scales)


def _backward(
    fp8: Fp8, axes: tuple[str, str], kept: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel_IO, scales = kept
    operands = _Operands(fp8, axes, x, kernel_IO, scales)
    gradient = operands.gradient(dy)
    dx = jnp.dot(gradient, operands.weight().T)
    if fp8.wgrad:
        rows = operands.input()
    else:
        rows, gradient = merge_tokens(operands.x), merge_tokens(operands.whole(dy))
    tokens = tuple(range(rows.ndim - 1))
    dkernel = jnp.tensordot(rows, gradient, (tokens, tokens), preferred_element_type=jnp.float32)
    [dkernel] = jax.vjp(lambda kernel: gathered(kernel, *axes), kernel_IO)[1](dkernel.astype(kernel_IO.dtype))
    largest = None
    if scales is not None:
        largest = jnp.zeros_like(scales).at[INPUT].set(_amax(operands.x)).at[GRADIENT].set(_amax(dy))
    return dx.reshape(x.shape), dkernel, largest


_product.defvjp(_forward, _backward)
