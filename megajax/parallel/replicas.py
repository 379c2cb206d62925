"""Data-parallel replicas that add up the gradients of all their microbatches before they meet, once a step.

Left to XLA, gradients are summed over replicas wherever they arise: once a layer and microbatch. Here the region that
accumulates them is manual over the data axes, so that a replica sees its own samples only and its sums stay its own
until `Replicas.reduced`. Megatron: `core/distributed/distributed_data_parallel.py`, `no_sync` for all microbatches but
the last. That is of use where parameters are whole on each replica (ZeRO-0 and 1), and possible where a sample's loss
does not depend on samples of other replicas.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.parallel.gradient_sums import combined_devices
from megajax.parallel.mesh import AXES, ZERO_AXES

Array = jax.Array
Tree = Any

REPLICA_AXES = ("replica", "dp")
"""Of the data axes those along which dense and expert parameters are copies of each other."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """axes: mesh axes between the replicas; with none, XLA sums gradients when it sees fit.

    specs: of the reduced gradients, a tree of partition specs like the parameters.
    """

    axes: tuple[str, ...] = ()
    specs: Tree = None

    @property
    def of_batch(self) -> PartitionSpec:
        """Of arrays [M, B, ...]: what these axes divide of them."""
        return PartitionSpec(None, self.axes) if self.axes else PartitionSpec()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Where one replica is traced by itself: logical axes no longer mean the axes between replicas."""
        rules = {
            name: axes if axes is None else tuple(axis for axis in axes if axis not in self.axes)
            for name, axes in dict(nn.get_logical_axis_rules()).items()
        }
        with nn.logical_axis_rules(tuple(rules.items())):
            yield

    def each(
        self, accumulate: Callable[[Tree, Tree], tuple[Tree, Array]]
    ) -> Callable[[Tree, Tree], tuple[Tree, Array]]:
        """`accumulate(parameters, arrays [M, B, ...]) -> (gradients, loss)` of each replica, and the sums of these."""
        if not self.axes:
            return accumulate

        def apart(params: Tree, batch: Tree) -> tuple[Tree, Array]:
            with self.apart():
                return self.reduced(*accumulate(params, batch))

        out_specs = (manual_part(self.specs, self.axes), PartitionSpec())
        in_specs = (PartitionSpec(), self.of_batch)
        return jax.shard_map(apart, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.axes), check_vma=False)

    def reduced(self, gradients: Tree, loss: Array) -> tuple[Tree, Array]:
        """Sums over replicas, fp32; of a gradient that `specs` divide over them, each gets its part."""
        if not self.axes:
            return gradients, loss
        # Manual over the rest as well: where it is automatic, XLA gathers what reduce-scatter is to sum.
        mesh = jax.sharding.get_abstract_mesh()
        others = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and axis not in ZERO_AXES)
        places = manual_part(self.specs, others)
        several = tuple(axis for axis in self.axes if mesh.shape[axis] > 1)
        each = jax.shard_map(
            lambda tree: jax.tree_util.tree_map_with_path(partial(_reduced, several), tree, self.specs),
            in_specs=(places,),
            out_specs=places,
            axis_names=set(others),
            check_vma=False,
        )
        return each(gradients), jax.lax.psum(loss, several)


def _reduced(axes: tuple[str, ...], path: Any, gradient: Array, spec: PartitionSpec) -> Array:
    rest = axes
    for dim, entry in enumerate(spec):
        scattered = tuple(axis for axis in names_of(entry) if axis in rest)
        if scattered:
            gradient = jax.lax.psum_scatter(gradient, scattered, scatter_dimension=dim, tiled=True)
            rest = tuple(axis for axis in rest if axis not in scattered)
    return combined_devices(path, gradient, rest) if rest else gradient


def largest_of_all(x: Array) -> Array:
    """The largest x of the devices whose parts of a tensor a manual region sees apart; stages of a pipeline have their
    own tensors. Elsewhere x is of the whole tensor as it is."""
    axes = tuple(axis for axis in AXES[1:] if axis in jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.pmax(x, axes) if axes else x


ALIKE = Replicas()
"""XLA sums gradients."""


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def manual_part(specs: Tree, axes: tuple[str, ...]) -> Tree:
    """What partition specs say of these axes alone: the others stay automatic in a region that is manual over them."""

    def of_leaf(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(tuple(axis for axis in names_of(entry) if axis in axes) or None for entry in spec))

    return jax.tree.map(of_leaf, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
