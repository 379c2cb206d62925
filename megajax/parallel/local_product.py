"""A product that XLA cannot divide: each device computes that of its parts, and partial sums are summed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import jax
from flax import linen as nn

from megajax.parallel.replicas import manual_part, names_of
from megajax.parallel.sharding import spec_of

Array = jax.Array
Axes = tuple[str | None, ...]
"""Logical axes, one (or None) a dim."""


def local_product(product: Callable[[Array, Array], Array], a: Array, b: Array, axes: tuple[Axes, Axes, Axes]) -> Array:
    """`product(a, b)` of each device's parts, summed over the mesh axes that divide what it sums over.

    Args:
      product: sees parts as they lie on a device.
      axes: of a, b and the result. A logical axis that is not the result's is one that is summed over.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    if mesh.empty or not rules:
        return product(a, b)
    free = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    *inputs, output = (manual_part(spec_of(dims, rules), free) for dims in axes)
    divided = [name for spec in inputs for entry in spec for name in names_of(entry)]
    kept = [name for entry in output for name in names_of(entry)]
    summed = tuple(name for name in free if name in divided and name not in kept and mesh.shape[name] > 1)

    def region(a: Array, b: Array) -> Array:
        y = product(a, b)
        return jax.lax.psum(y, summed) if summed else y

    apart = jax.shard_map(region, in_specs=tuple(inputs), out_specs=output, axis_names=set(free), check_vma=False)
    return apart(a, b)
