"""Vocabulary parallelism: embedding lookup and loss over a table whose rows are divided over the mesh.

Both are manual regions with their own gradients, so that every collective is written here and nowhere else. The table
says which axes divide the vocabulary: tp, and pp too in a pipeline, where all stages share the work of both ends.
Megatron: `core/tensor_parallel/{layers,cross_entropy}.py`.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, V vocabulary (rows of the table, padding included)
import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.ops.cross_entropy import CrossEntropyOptions, FusedLoss, LinearCrossEntropy, LossComputation, LossGradients
from megajax.ops.zeros import zeros_beside

Array = jax.Array
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class VocabLayout:
    """Which mesh axes divide what; those of size 1 are left out.

    Attributes:
      manual: axes that become manual here.
      surrounding: axes that are manual already, around this region (pp in a pipeline).
      vocab, embed: of the table, rows and features. batch, seq, residual_seq: of the activations.
    """

    manual: Axes
    surrounding: Axes
    vocab: Axes
    embed: Axes
    batch: Axes
    seq: Axes
    residual_seq: Axes

    @classmethod
    def in_context(cls) -> "VocabLayout | None":
        """The layout that mesh and table in context say; None where nothing is divided."""
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules or math.prod(mesh.shape.values()) == 1:
            return None

        def axes(logical: str) -> Axes:
            return tuple(axis for axis in rules[logical] or () if mesh.shape[axis] > 1)

        return cls(
            manual=tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes),
            surrounding=tuple(mesh.manual_axes),
            **{name: axes(name) for name in ("vocab", "embed", "batch", "seq", "residual_seq")},
        )

    @property
    def sequence_parallel(self) -> Axes:
        """Axes that divide the sequence outside of this region only (Megatron's sequence parallelism)."""
        return tuple(axis for axis in self.residual_seq if axis not in self.seq)

    @property
    def tokens(self) -> Axes:
        """Axes that divide the tokens inside the region: those the gradient of the table is summed over."""
        return (*self.batch, *self.seq)

    def spec(self, *dims: Axes) -> PartitionSpec:
        """Partition spec of this region's arrays: the axes of the surrounding one are not its business."""
        return PartitionSpec(*(tuple(axis for axis in dim if axis not in self.surrounding) or None for dim in dims))

    def region(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """`function` as a manual region."""
        # The replication checker does not see through custom gradients; there are none to get wrong inside.
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names=set(self.manual), check_vma=False
        )

    def gathered(self, table: Array, dim: int) -> Array:
        """This device's rows of the table with all their features (ZeRO-3 divides them)."""
        return jax.lax.all_gather(table, self.embed, axis=dim, tiled=True) if self.embed else table

    def summed(self, gradient: Array, dim: int) -> Array:
        """A gradient of the gathered table, fp32, summed over tokens and scattered back as the table lies."""
        scattered = tuple(axis for axis in self.embed if axis in self.tokens)
        if scattered:
            gradient = jax.lax.psum_scatter(gradient, scattered, scatter_dimension=dim, tiled=True)
        # Where sequences are whole, devices along the inner axes have the same: each keeps its part.
        copies = tuple(axis for axis in self.embed if axis not in self.tokens)
        if copies:
            size = gradient.shape[dim] // math.prod(jax.lax.axis_size(axis) for axis in copies)
            gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(copies) * size, size, dim)
        rest = tuple(axis for axis in self.tokens if axis not in self.embed)
        return jax.lax.psum(gradient, rest) if rest else gradient


def rows_here(num: int) -> int:
    """Rows of a vocabulary's table that the code sees: all of them, or a stage's share inside a pipeline."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    divided = [axis for axis in rules.get("vocab") or () if axis in mesh.manual_axes]
    return num // math.prod(mesh.shape[axis] for axis in divided)


def vocab_parallel_embedding(table_VD: Array, ids_BS: Array) -> Array:
    """`table[ids]`. table [V, D], ids int [B, S] -> [B, S, D] in the table's dtype, laid out as the residual stream."""
    layout = VocabLayout.in_context()
    if layout is None or ids_BS.shape[0] % _shards(layout.batch):  # a lone sequence, as when text is generated
        return jnp.take(table_VD, ids_BS, axis=0)
    return _lookup(table_VD, ids_BS, layout)


def embedding(table_PD: Array, ids_BS: Array) -> Array:
    """`table[ids]` like `vocab_parallel_embedding`, of a table whose rows are not divided, such as that of positions.

    Every device looks up the tokens it has. Left to XLA, the gradient of a divided table would be sent back and forth.
    """
    layout = VocabLayout.in_context()
    if layout is None or ids_BS.shape[0] % _shards(layout.batch):
        return jnp.take(table_PD, ids_BS, axis=0)  # takes numpy parameters, too
    return _lookup(table_PD, ids_BS, dataclasses.replace(layout, vocab=(), seq=layout.residual_seq))


def _shards(axes: Axes) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table_VD: Array, ids_BS: Array, layout: VocabLayout) -> Array:
    def local(table_vd: Array, ids_bs: Array) -> Array:
        table_vD = layout.gathered(table_vd, dim=1)
        row, mine = _local_rows(ids_bs, table_vD.shape[0], layout)
        x_bsD = jnp.where(mine[..., None], table_vD[row], 0.0)
        scattered = tuple(axis for axis in layout.sequence_parallel if axis in layout.vocab)
        rest = tuple(axis for axis in layout.vocab if axis not in scattered)
        if scattered:  # first, so that less is left to sum over the others, which may be far away
            x_bsD = jax.lax.psum_scatter(x_bsD, scattered, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_bsD, rest) if rest else x_bsD

    return layout.region(
        local,
        (layout.spec(layout.vocab, layout.embed), layout.spec(layout.batch, layout.seq)),
        layout.spec(layout.batch, layout.residual_seq, ()),
    )(table_VD, ids_BS)


def _local_rows(ids: Array, rows: int, layout: VocabLayout) -> tuple[Array, Array]:
    """(row of each id in this device's part of the table, whether it is there)."""
    start = jax.lax.axis_index(layout.vocab) * rows if layout.vocab else 0
    mine = (ids >= start) & (ids < start + rows)
    return jnp.where(mine, ids - start, 0), mine


def _lookup_forward(table_VD: Array, ids_BS: Array, layout: VocabLayout) -> Any:
    # The table goes along for its shape and dtype alone; nothing of it is read.
    return _lookup(table_VD, ids_BS, layout), (table_VD, ids_BS)


def _lookup_backward(layout: VocabLayout, residuals: Any, d_x_BSD: Array) -> Any:
    table_VD, ids_BS = residuals

    def local(table_vd: Array, ids_bs: Array, d_x_bsD: Array) -> Array:
        if layout.sequence_parallel:
            d_x_bsD = jax.lax.all_gather(d_x_bsD, layout.sequence_parallel, axis=1, tiled=True)
        v, D = table_vd.shape[0], d_x_bsD.shape[-1]
        row, mine = _local_rows(ids_bs, v, layout)
        d_x_bsD = jnp.where(mine[..., None], d_x_bsD, 0.0).astype(jnp.float32)
        zeros, d_x_bsD = zeros_beside(jax.ShapeDtypeStruct((v, D), jnp.float32), d_x_bsD)  # not those of the loss
        return layout.summed(zeros.at[row].add(d_x_bsD), dim=1)

    table_spec = layout.spec(layout.vocab, layout.embed)
    d_table = layout.region(
        local,
        (table_spec, layout.spec(layout.batch, layout.seq), layout.spec(layout.batch, layout.residual_seq, ())),
        table_spec,
    )(table_VD, ids_BS, d_x_BSD)
    return d_table.astype(table_VD.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


@dataclasses.dataclass(frozen=True)
class VocabParallelCrossEntropy:
    """`LinearCrossEntropy` over the mesh: x as the residual stream lies, kernel [D, V] and bias [V] by the table."""

    options: CrossEntropyOptions
    layout: VocabLayout
    softcap: float | None = None

    def losses(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> FusedLoss:
        """See `LinearCrossEntropy.losses`."""

        def local(x: Array, kernel: Array, bias: Array | None, labels: Array, weights: Array) -> Any:
            x, kernel = self._gathered(x, kernel)
            total, per_token = self._compute.losses(x, kernel, bias, labels, weights)
            return self._summed_over_tokens(total), per_token

        layout = self.layout
        region = layout.region(local, self._in_specs, (PartitionSpec(), layout.spec(layout.batch, layout.seq)))
        return FusedLoss(*region(x_BSD, kernel_DV, bias_V, labels_BS, weights_BS))

    def with_gradients(
        self, x_BSD: Array, kernel_DV: Array, bias_V: Array | None, labels_BS: Array, weights_BS: Array
    ) -> LossGradients:
        """See `LinearCrossEntropy.with_gradients`."""
        layout = self.layout

        def local(x: Array, kernel: Array, bias: Array | None, labels: Array, weights: Array) -> Any:
            x, kernel = self._gathered(x, kernel)
            total, per_token, d_x, d_kernel, d_bias = self._compute.with_gradients(x, kernel, bias, labels, weights)
            # fp32: it is a sum over the vocabulary's shards, and XLA:CPU cannot sum bf16 in a nested manual region.
            d_x = d_x.astype(jnp.float32)
            scattered = layout.sequence_parallel
            rest = tuple(axis for axis in layout.vocab if axis not in scattered)
            if scattered:
                d_x = jax.lax.psum_scatter(d_x, scattered, scatter_dimension=1, tiled=True)
            d_x = jax.lax.psum(d_x, rest) if rest else d_x
            d_bias = None if d_bias is None else self._summed_over_tokens(d_bias)
            return self._summed_over_tokens(total), per_token, d_x, layout.summed(d_kernel, dim=0), d_bias

        in_specs = self._in_specs
        out_specs = (PartitionSpec(), layout.spec(layout.batch, layout.seq), *in_specs[:3])
        region = layout.region(local, in_specs, out_specs)
        return LossGradients(*region(x_BSD, kernel_DV, bias_V, labels_BS, weights_BS))

    @property
    def _compute(self) -> LinearCrossEntropy:
        return LinearCrossEntropy(self.options, self.layout.vocab, self.softcap)

    @property
    def _in_specs(self) -> tuple[PartitionSpec, ...]:
        layout = self.layout
        tokens = layout.spec(layout.batch, layout.seq)
        residual = layout.spec(layout.batch, layout.residual_seq, ())
        return residual, layout.spec(layout.embed, layout.vocab), layout.spec(layout.vocab), tokens, tokens

    def _gathered(self, x: Array, kernel: Array) -> tuple[Array, Array]:
        if self.layout.sequence_parallel:
            x = jax.lax.all_gather(x, self.layout.sequence_parallel, axis=1, tiled=True)
        return x, self.layout.gathered(kernel, dim=0)

    def _summed_over_tokens(self, total: Array) -> Array:
        return jax.lax.psum(total, self.layout.tokens) if self.layout.tokens else total


def loss_computation(options: CrossEntropyOptions, softcap: float | None = None) -> LossComputation:
    """The loss for the mesh in context, or for one device where there is none. softcap: of the logits."""
    layout = VocabLayout.in_context()
    if layout is None:
        return LinearCrossEntropy(options, softcap=softcap)
    return VocabParallelCrossEntropy(options, layout, softcap)
