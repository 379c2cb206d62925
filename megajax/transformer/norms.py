"""Normalisation layers: a scale (and bias) over the last dim."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops import norms

Array = jax.Array


def _scale(module: nn.Module, config: TransformerConfig, axis: str, size: int) -> Any:
    # Zero-centred: the parameter starts at 0 and is applied as 1 + scale, so weight decay pulls towards the identity.
    zero_centred = config.layernorm_zero_centered_gamma
    init = nn.initializers.zeros if zero_centred else nn.initializers.ones
    dtype = jnp.dtype(config.params_dtype)
    scale: Any = module.param("scale", nn.with_logical_partitioning(init, (axis,)), (size,), dtype)
    return scale.astype(jnp.float32) + 1.0 if zero_centred else scale


class LayerNorm(nn.Module):
    """x [..., D] -> [..., D]; parameters scale, bias [D]. Statistics in fp32 (arXiv:1607.06450)."""

    config: TransformerConfig
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1]
        scale = _scale(self, self.config, self.axis, size)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
        bias: Any = self.param("bias", bias_init, (size,), jnp.dtype(self.config.params_dtype))
        return norms.layer_norm(x, scale, bias, epsilon=self.config.layernorm_epsilon)


class RMSNorm(nn.Module):
    """x [..., D] -> [..., D]; parameter scale [D]. Statistics in fp32 (arXiv:1910.07467)."""

    config: TransformerConfig
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = _scale(self, self.config, self.axis, x.shape[-1])
        return norms.rms_norm(x, scale, epsilon=self.config.layernorm_epsilon)


class L2Norm(nn.Module):
    """x [..., D] -> x / sqrt(mean(x^2) + epsilon), no parameters (Megatron `qk_l2_norm`)."""

    config: TransformerConfig
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return norms.l2_norm(x, epsilon=self.config.layernorm_epsilon)
