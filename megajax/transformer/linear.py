"""Linear layers. Column- and row-parallel differ only in which of their dims carries the sharded logical axis."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, I features of the input
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax import kernels
from megajax.config import TransformerConfig
from megajax.config_kernels import Fp8
from megajax.kernels import Choice
from megajax.ops.linear import linear
from megajax.parallel.gradient_sums import FP8_META
from megajax.parallel.sharding import constrain, constrain_gradient, gathered, merge_tokens
from megajax.transformer.fp8 import fp8_product, meta_shape

Array = jax.Array


def init_std(config: TransformerConfig) -> float:
    """Standard deviation of ordinary weights."""
    return config.init_method_std


def output_init_std(config: TransformerConfig) -> float:
    """Standard deviation of the weights that write to the residual stream: smaller, as many of them add up."""
    return config.init_method_std / config.residual_branches**0.5


def normal_init(std: float, axes: tuple[str, ...]) -> nn.initializers.Initializer:
    """N(0, std) with the logical axes of the parameter."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def zeros_init(axes: tuple[str, ...]) -> nn.initializers.Initializer:
    """Zeros with the logical axes of the parameter."""
    return nn.with_logical_partitioning(nn.initializers.zeros, axes)


class _Fp8Linear(nn.Module):
    """What the linears have in common."""

    config: TransformerConfig
    features: int
    axis: str
    use_bias: bool
    fp8: Fp8 | None = None

    def how(self) -> tuple[Fp8 | None, Array | None]:
        """How it computes in fp8, and the parameter that delayed scaling needs."""
        if self.fp8 is None or self.config.leaves_fp8_out:
            return None, None
        shape, init = meta_shape(self.fp8), zeros_init(("whole", "whole"))
        return self.fp8, None if shape is None else self.param(FP8_META, init, shape, jnp.float32)


def _linear(
    x: Array, kernel: Array, bias: Array | None, axes: tuple[str, str], fp8: Fp8 | None, meta: Array | None
) -> Array:
    """`linear` that keeps, between forward and backward pass, its arguments as they lie.

    What is made of them for the product, a kernel that is cast or gathered by ZeRO-3, an x that is gathered from
    sequence parallelism, is made again. A pipeline, above all, would otherwise hold it for each microbatch under way.
    """

    if fp8 is not None:
        kernels.record(Choice("linears", fp8.title))
        y = fp8_product(fp8, axes, x, kernel, meta)
        return y if bias is None else y + bias.astype(y.dtype)

    def product(x: Array, kernel: Array, bias: Array | None) -> Array:
        if axes[0] == "embed" and x.ndim == 3:  # merged tokens tell that nothing divides the sequence
            x = constrain(x, "batch", "seq", "act_embed")
        return linear(merge_tokens(x), gathered(kernel.astype(x.dtype), *axes), bias)

    # A new function each time: JAX remembers what it has traced by function, not by the sharding table in context.
    return jax.checkpoint(product, prevent_cse=False)(x, kernel, bias).reshape(*x.shape[:-1], kernel.shape[-1])


class ColumnParallelLinear(_Fp8Linear):
    """`x @ kernel + bias` from the hidden size to `features`, whose dim is sharded as logical axis `axis`.

    Here x leaves sequence parallelism (arXiv:2205.05198): of x [B, S, I] the whole sequence is gathered.

    x [..., I] -> [..., features]. Kernel [I, features] and bias [features], in `params_dtype`. Computes
    in x's dtype, or in fp8.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.params_dtype)
        axes = ("embed", self.axis)
        init = normal_init(init_std(self.config), axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        bias = self.param("bias", zeros_init((self.axis,)), (self.features,), dtype) if self.use_bias else None
        return _linear(x, kernel, bias, axes, *self.how())

    def matrix(self, dtype: Any) -> Array | None:
        """The kernel [I, features] as a product in this dtype reads it, once it is there; None in fp8."""
        if self.fp8 is not None and not self.config.leaves_fp8_out:
            return None
        kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        return gathered(kernel.astype(dtype), "embed", self.axis)


class RowParallelLinear(_Fp8Linear):
    """`x @ kernel + bias` back to the hidden size, from a dim that is sharded as logical axis `axis`.

    x [..., I] -> [..., features]. Kernel [I, features] and bias [features], in `params_dtype`. Computes
    in x's dtype, or in fp8.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.params_dtype)
        axes = (self.axis, "embed")
        init = normal_init(output_init_std(self.config), axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        bias = self.param("bias", zeros_init(("norm",)), (self.features,), dtype) if self.use_bias else None
        fp8, meta = self.how()
        y = _linear(x, kernel, bias, axes, fp8, meta)
        # Gathered once for both of its products, where sequence parallelism has divided it.
        return constrain_gradient(y, "batch", "seq", "act_embed") if y.ndim == 3 and fp8 is None else y
