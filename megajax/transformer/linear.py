"""Linear layers. Column- and row-parallel differ only in which of their dims carries the sharded logical axis."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.linear import linear
from megajax.parallel.sharding import merge_tokens

Array = jax.Array


def init_std(config: TransformerConfig) -> float:
    """Standard deviation of ordinary weights."""
    return config.init_method_std


def output_init_std(config: TransformerConfig) -> float:
    """Standard deviation of the weights that write to the residual stream: smaller, as 2 L of them add up."""
    return config.init_method_std / (2.0 * config.num_layers) ** 0.5


def normal_init(std: float, axes: tuple[str, ...]) -> nn.initializers.Initializer:
    """N(0, std) with the logical axes of the parameter."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def zeros_init(axes: tuple[str, ...]) -> nn.initializers.Initializer:
    """Zeros with the logical axes of the parameter."""
    return nn.with_logical_partitioning(nn.initializers.zeros, axes)


class ColumnParallelLinear(nn.Module):
    """`x @ kernel + bias` from the hidden size to `features`, whose dim is sharded as logical axis `axis`.

    x [..., I] -> [..., features]. Kernel [I, features], bias [features], in `params_dtype`; computes in x's dtype.
    """

    config: TransformerConfig
    features: int
    axis: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.params_dtype)
        init = normal_init(init_std(self.config), ("embed", self.axis))
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        bias = self.param("bias", zeros_init((self.axis,)), (self.features,), dtype) if self.use_bias else None
        return linear(merge_tokens(x), kernel, bias).reshape(*x.shape[:-1], self.features)


class RowParallelLinear(nn.Module):
    """`x @ kernel + bias` back to the hidden size, from a dim that is sharded as logical axis `axis`.

    x [..., I] -> [..., features]. Kernel [I, features], bias [features], in `params_dtype`; computes in x's dtype.
    """

    config: TransformerConfig
    features: int
    axis: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.params_dtype)
        init = normal_init(output_init_std(self.config), (self.axis, "embed"))
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        bias = self.param("bias", zeros_init(("norm",)), (self.features,), dtype) if self.use_bias else None
        return linear(merge_tokens(x), kernel, bias).reshape(*x.shape[:-1], self.features)
