"""Normalisations over the last dim, with statistics in fp32 whatever the input dtype."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp

from megajax.ops.recompute import recomputed_in_backward

Array = jax.Array


@recomputed_in_backward
def layer_norm(x: Array, scale: Array, bias: Array | None, *, epsilon: float) -> Array:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias` over the last dim (arXiv:1607.06450). x [..., D], scale [D]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


@recomputed_in_backward
def rms_norm(x: Array, scale: Array, *, epsilon: float) -> Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last dim (arXiv:1910.07467). x [..., D], scale [D]."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


@recomputed_in_backward
def l2_norm(x: Array, *, epsilon: float) -> Array:
    """RMS normalisation without a weight (Llama 4; Megatron's `L2Norm`)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
