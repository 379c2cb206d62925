"""Replicas that add up the gradients of all their microbatches before they meet, once a step.

Left to XLA, gradients are summed over devices wherever they arise: once a layer and microbatch. Here the region that
accumulates them is manual over the axes that divide samples and their sequences, so that a replica sees its own tokens
only and its sums stay its own until `Replicas.reduced`. Megatron: `core/distributed/distributed_data_parallel.py`,
`no_sync` for all microbatches but the last. That is of use where parameters are whole on each replica (ZeRO-0 and 1).

What a replica computes of a loss is a part of it, and the parts add up. So what depends on tokens of others, such as
the balance of experts, needs a `psum` (`across`) and nothing else: its transpose collects what all parts make of it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.ops.across import Across
from megajax.parallel.gradient_sums import combined_devices
from megajax.parallel.mesh import DATA_AXES, SEQUENCE_AXES, stem

Array = jax.Array
Tree = Any
MeshAxes = tuple[str, ...]

APART = "apart: "
"""Before the name of a logical axis in the table in context: the mesh axes that divide it between replicas."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """axes: mesh axes between the replicas; with none, XLA sums gradients when it sees fit.

    parameters, specs: partition specs of the parameters and of the reduced gradients, trees like the parameters.
    arrays: name of an array of a microbatch -> partition spec of all microbatches' [M, B, ...].
    """

    axes: MeshAxes = ()
    parameters: Tree = None
    specs: Tree = None
    arrays: Callable[[str], PartitionSpec] = lambda name: PartitionSpec()

    def of_batch(self, names: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """What these axes divide of arrays with these names."""
        return {name: self.of_array(name) for name in names}

    def of_array(self, name: str) -> PartitionSpec:
        """What these axes divide of an array."""
        return manual_part(self.arrays(name), self.axes)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Where one replica is traced by itself: logical axes no longer mean the axes between replicas."""
        rules: dict[str, Any] = {}
        for name, axes in dict(nn.get_logical_axis_rules()).items():
            rules[name] = axes if axes is None else tuple(axis for axis in names_of(axes) if axis not in self.axes)
            rules[APART + name] = tuple(axis for axis in names_of(axes) if axis in self.axes)
        with nn.logical_axis_rules(tuple(rules.items())):
            yield

    def each(
        self, accumulate: Callable[[Tree, Tree, Tree], tuple[Tree, Array]]
    ) -> Callable[[Tree, tuple[Mapping[str, Array], Array], Tree], tuple[Tree, Array]]:
        """`accumulate(parameters, (arrays [M, B, ...], weights of the losses), key) -> (gradients, loss)` of each
        replica, and the sums of these.
        """
        if not self.axes:
            return accumulate

        def apart(params: Tree, inputs: Tree, key: Tree) -> tuple[Tree, Array]:
            with self.apart():
                return self.reduced(*accumulate(params, inputs, key))

        def call(params: Tree, inputs: tuple[Mapping[str, Array], Array], key: Tree) -> tuple[Tree, Array]:
            arrays = (self.of_batch(inputs[0]), self.of_array("loss_mask"))
            in_specs = (manual_part(self.parameters, self.axes), arrays, PartitionSpec())
            out_specs = (manual_part(self.specs, self.axes), PartitionSpec())
            region = jax.shard_map(
                apart, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.axes), check_vma=False
            )
            return region(params, inputs, key)

        return call

    def reduced(self, gradients: Tree, loss: Array) -> tuple[Tree, Array]:
        """Sums over replicas, fp32; of a gradient that `specs` divide over them, each gets its part."""
        if not self.axes:
            return gradients, loss
        # Manual over the rest as well: where it is automatic, XLA gathers what reduce-scatter is to sum.
        mesh = jax.sharding.get_abstract_mesh()
        others = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
        several = tuple(axis for axis in self.axes if mesh.shape[axis] > 1)

        def every(tree: Tree) -> Tree:
            reduced = partial(_reduced, several, others)
            return jax.tree_util.tree_map_with_path(reduced, tree, self.parameters, self.specs)

        each = jax.shard_map(
            every,
            in_specs=(manual_part(self.parameters, others),),
            out_specs=manual_part(self.specs, others),
            axis_names=set(others),
            check_vma=False,
        )
        return each(gradients), jax.lax.psum(loss, several)


def _reduced(
    axes: MeshAxes, others: MeshAxes, path: Any, gradient: Array, before: PartitionSpec, after: PartitionSpec
) -> Array:
    """The sum over `axes`, but for those that divide the parameter: with all of them, each has the gradient of its own.

    before, after: how the gradient lies, and how it is to lie. others: the axes that are no replicas'.
    """
    divided = {axis for entry in before for axis in names_of(entry)}
    rest = tuple(axis for axis in axes if axis not in divided)
    for dim, entry in enumerate(after):
        new = tuple(axis for axis in names_of(entry) if axis not in divided)
        scattered = tuple(axis for axis in new if axis in rest)
        if scattered:
            gradient = jax.lax.psum_scatter(gradient, scattered, scatter_dimension=dim, tiled=True)
            rest = tuple(axis for axis in rest if axis not in scattered)
        # Of copies along axes that are inside of those, each device keeps its part.
        copies = tuple(axis for axis in new if axis in others)
        if copies:
            size = gradient.shape[dim] // math.prod(jax.lax.axis_size(axis) for axis in copies)
            gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(copies) * size, size, dim)
    return combined_devices(path, gradient, rest) if rest else gradient


def largest_of_all(x: Array) -> Array:
    """The largest x of the devices whose parts of a tensor a manual region sees apart; stages of a pipeline have their
    own tensors. Elsewhere x is of the whole tensor as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = (axis for axis in mesh.axis_names if axis in mesh.manual_axes and mesh.shape[axis] > 1)
    axes = tuple(axis for axis in manual if stem(axis) != "pp")
    return jax.lax.pmax(x, axes) if axes else x


ALIKE = Replicas()
"""XLA sums gradients."""


def across() -> Across:
    """What divides the tokens of a microbatch between replicas where one is traced by itself."""
    return Across(axes_apart("batch"), axes_apart("seq"))


def axes_apart(logical: str) -> MeshAxes:
    """Mesh axes, of several devices, that divide a logical axis between replicas where one is traced by itself."""
    shape = jax.sharding.get_abstract_mesh().shape
    axes = dict(nn.get_logical_axis_rules()).get(APART + logical) or ()
    return tuple(axis for axis in names_of(axes) if shape[axis] > 1)


def parts_apart(logical: str) -> int:
    """Into how many parts replicas divide a logical axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes_apart(logical))


def axes_between_replicas(shape: Mapping[str, int]) -> MeshAxes:
    """Of a mesh, the axes that divide samples and sequences, in its order; none where all are of one device.

    All of them, those of one device too: of nested regions XLA wants the axes in the order of the mesh (JAX 0.12).
    """
    axes = tuple(axis for axis in shape if stem(axis) in (*DATA_AXES, *SEQUENCE_AXES))
    return axes if math.prod(shape[axis] for axis in axes) > 1 else ()


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def manual_part(specs: Tree, axes: tuple[str, ...]) -> Tree:
    """What partition specs say of these axes alone: the others stay automatic in a region that is manual over them."""

    def of_leaf(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(tuple(axis for axis in names_of(entry) if axis in axes) or None for entry in spec))

    return jax.tree.map(of_leaf, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
