"""The core of a state space layer, which a backend supplies."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, H heads, P head size
import jax
from flax import linen as nn

from megajax.ops.state_space import Dynamics, Projected, Sizes
from megajax.parallel.state_space import state_space

Array = jax.Array


class StateSpace(nn.Module):
    """The core of the mixer in plain JAX: convolution and recurrence over whole sequences -> y [B, S, H, P].

    zigzag: where the mesh divides the sequence, tokens lie in the order of `parallel.token_order.zigzag_indices`.
    """

    sizes: Sizes
    zigzag: bool = False

    def __call__(self, projected: Projected, dynamics: Dynamics, segment_ids: Array | None) -> Array:
        """Arguments as for `megajax.parallel.state_space.state_space`."""
        return state_space(projected, dynamics, self.sizes, segment_ids=segment_ids, zigzag=self.zigzag)
