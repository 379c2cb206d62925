"""Dropout of activations that a mesh divides."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden
import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.parallel.noise import bernoulli

Array = jax.Array


class Dropout(nn.Module):
    """`nn.Dropout` of the residual stream, x [B, S, D]: the same masks on every mesh, also where replicas are apart.

    rate: the share that is dropped; what is kept is divided by the rest.
    """

    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x_BSD: Array, *, deterministic: bool | None = None) -> Array:
        if nn.merge_param("deterministic", self.deterministic, deterministic) or self.rate == 0.0:
            return x_BSD
        if self.rate == 1.0:
            return jnp.zeros_like(x_BSD)
        keep = 1.0 - self.rate
        kept_BSD = bernoulli(self.make_rng("dropout"), keep, x_BSD.shape, "batch", "residual_seq", None)
        return jnp.where(kept_BSD, x_BSD / keep, 0.0)
