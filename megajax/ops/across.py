"""Sums over what several devices have of one microbatch, where each computes its part of the loss by itself."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Across:
    """Manual mesh axes of several devices that divide the samples, and the tokens of each. Without any, everything is
    here and there is nothing to add.

    The loss is the sum of what all devices make of it, so the gradients of these sums are sums as well.
    """

    batch: MeshAxes = ()
    seq: MeshAxes = ()

    def tokens(self, x: Any) -> Any:
        """The sum over all tokens; x is that over the tokens here, an array or a number."""
        axes = self.batch + self.seq
        return jax.lax.psum(x, axes) if axes else x

    def samples(self, x: Any) -> Any:
        """The sum over all samples; x is that over those here, as the device with their first tokens sees them."""
        if self.seq:
            x = jnp.where(jax.lax.axis_index(self.seq) == 0, x, jnp.zeros_like(x))
        return self.tokens(x)

    def sequence(self, x: Any) -> Any:
        """The sum over all tokens of each sample; x is that over those here."""
        return jax.lax.psum(x, self.seq) if self.seq else x

    def every_sample(self, x_B: Array) -> Array:
        """What all samples have, those here at `first_sample` and behind it; x is what those here have."""
        return jax.lax.all_gather(x_B, self.batch, tiled=True) if self.batch else x_B

    def first_sample(self, count: int) -> Any:
        """The index, among all samples, of the first of the `count` that are here."""
        return jax.lax.axis_index(self.batch) * count if self.batch else 0

    def mean_of_samples(self, x_B: Array) -> Array:
        """The mean of what each sample has."""
        mean = jnp.mean(x_B)
        return jax.lax.pmean(mean, self.batch) if self.batch else mean

    def mean_of_tokens(self, x_BS: Array) -> Array:
        """The mean of what each token has."""
        mean, axes = jnp.mean(x_BS), self.batch + self.seq
        return jax.lax.pmean(mean, axes) if axes else mean

    def of_next(self, x: Array) -> Array:
        """x of the device that has the next tokens of the sequence; zeros on the one that has the last."""
        if not self.seq:
            return jnp.zeros_like(x)
        size = jax.lax.axis_size(self.seq)
        return jax.lax.ppermute(x, self.seq, [(i + 1, i) for i in range(size - 1)])


WHOLE = Across()
"""Everything is here."""
