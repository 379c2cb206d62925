"""What the engines of a pipeline have in common: the pieces of a model, its parameters in two trees, and its two ends.

Embedding and loss belong to no stage: their table is divided over (pp, tp), and all stages work on the microbatch that
enters or leaves.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.ops.cross_entropy import FusedLoss
from megajax.parallel.gradient_sums import added, combine
from megajax.parallel.in_place import Row
from megajax.parallel.replicas import ALIKE, Replicas, manual_part
from megajax.parallel.sharding import constrain

Array = jax.Array
Tree = Any
Batch = Mapping[str, Array]

PP = "pp"


Path = tuple[str, ...]
"""Of a parameter, or of a module that holds some."""

BlockFn = Callable[[Tree, Tree, Tree, Batch, Array, Array | None], Tree]
"""`(parameters, rows, x, microbatch, weights, key) -> y`: some layers of a block, those that rows says the parameters
are. A loss of their own is `attach`ed to what they return."""


class Pieces(NamedTuple):
    """A model in the pieces of a tick. Keys are a microbatch's dropout key, None without dropout.

    embed: (shared parameters, microbatch, key) -> x, what goes from stage to stage: an array [B, S, D], or a tree of
    such. blocks: the blocks of layers that it passes, one after the other. loss: (shared parameters, y, microbatch,
    weights) -> loss. Embed and loss are called on all stages alike and return the same on each. read_by: for each
    block, the parameters outside of it that its layers read, or modules of such: a copy for each chunk. apart: shared
    parameters, or modules of such, whose gradient each stage gives a part of (see `one_stage`), and not each the whole,
    where `stages_branch`.
    """

    embed: Callable[[Tree, Batch, Array | None], Tree]
    blocks: tuple[BlockFn, ...]
    loss: Callable[[Tree, Tree, Batch, Array], FusedLoss]
    read_by: tuple[tuple[Path, ...], ...] = ()
    apart: tuple[Path, ...] = ()

    @property
    def reads(self) -> tuple[tuple[Path, ...], ...]:
        """`read_by` of all blocks."""
        return self.read_by or ((),) * len(self.blocks)


class Params(NamedTuple):
    """Parameters (or their gradients, or partition specs) in two parts.

    staged: for each block a tree of leaves [p v n, ...], divided over pp: the rows of stage 0 first, on each stage
    chunk after chunk. shared: everything else; of these only the vocabulary's tables are divided over pp.
    """

    staged: tuple[Tree, ...]
    shared: Tree


class Work(NamedTuple):
    """The microbatches of a step: arrays [m, ...] each, and the key that is folded with a microbatch's index."""

    batch: Batch
    weights: Array
    mask: Array
    key: Array | None

    def at(self, microbatch: Array) -> Work:
        """One microbatch of it."""
        batch, weights, mask = at_index((dict(self.batch), self.weights, self.mask), microbatch)
        return Work(batch, weights, mask, None if self.key is None else jax.random.fold_in(self.key, microbatch))


class Sums(NamedTuple):
    """What adds up over the microbatches: gradients of the parameters in fp32, and the sum of the masked losses."""

    gradients: Params
    loss: Array


class Ends:
    """Embedding and loss, worked on by all stages together. `due` must be the same on every stage."""

    def __init__(self, pieces: Pieces, shared: Tree, work: Work, stages: int, gradient_specs: Params | None) -> None:
        self._pieces, self._shared, self._work, self._stages = pieces, shared, work, stages
        self._specs = gradient_specs
        first = work.at(jnp.int32(0))
        self.x_like = jax.eval_shape(pieces.embed, shared, first.batch, first.key)
        """Shapes of what goes from stage to stage."""
        self._embedding = _Read.by(lambda shared: pieces.embed(shared, first.batch, first.key), shared)

    def enter(self, due: Array, microbatch: Array) -> Tree:
        """What stage 0 takes in, or zeros."""

        def embed() -> Tree:
            work = self._work.at(microbatch)
            return as_stream(self._pieces.embed(self._shared, work.batch, work.key))

        return jax.lax.cond(due, embed, self._zeros)

    def leave(self, due: Array, microbatch: Array, y: Tree, sums: Sums) -> tuple[Sums, Tree]:
        """The loss of the microbatch whose y is the last stage's: (sums, gradient of y or zeros)."""

        def finish() -> tuple[Tree, Array, Tree]:
            work = self._work.at(microbatch)

            def loss(shared: Tree, y: Tree) -> tuple[Array, Array]:
                losses = self._pieces.loss(shared, y, work.batch, work.weights)
                return losses.weighted_sum, jnp.sum(losses.per_token * work.mask)

            y_last = broadcast_from(y, self._stages - 1)
            _, pullback, masked_sum = jax.vjp(loss, self._shared, y_last, has_aux=True)
            d_shared, dy = pullback(jnp.float32(1))
            return self._laid_out(added(sums.gradients.shared, d_shared)), sums.loss + masked_sum, as_stream(dy)

        def wait() -> tuple[Tree, Array, Tree]:
            return self._laid_out(sums.gradients.shared), sums.loss, self._zeros()

        shared, loss, dy = jax.lax.cond(due, finish, wait)
        return Sums(sums.gradients._replace(shared=shared), loss), dy

    def loss(self, due: Array, microbatch: Array, y: Tree) -> Array:
        """The masked loss alone, or 0."""

        def finish() -> Array:
            work = self._work.at(microbatch)
            losses = self._pieces.loss(self._shared, broadcast_from(y, self._stages - 1), work.batch, work.weights)
            return jnp.sum(losses.per_token * work.mask)

        return jax.lax.cond(due, finish, lambda: jnp.float32(0))

    def enter_backward(self, due: Array, microbatch: Array, dx: Tree, sums: Sums) -> Sums:
        """Through the embedding, for the microbatch whose dx is stage 0's."""
        totals = sums.gradients.shared

        def backward() -> list[Array]:
            work = self._work.at(microbatch)

            def embed(params: list[Array]) -> Tree:
                return self._pieces.embed(self._embedding.put(self._shared, params), work.batch, work.key)

            _, pullback = jax.vjp(embed, self._embedding.take(self._shared))
            [gradients] = pullback(broadcast_from(dx, 0))
            return self._laid_out_embedding(self._embedding.added(totals, gradients))

        def wait() -> list[Array]:
            return self._laid_out_embedding(self._embedding.take(totals))

        shared = self._embedding.put(totals, jax.lax.cond(due, backward, wait))
        return sums._replace(gradients=sums.gradients._replace(shared=shared))

    def _zeros(self) -> Tree:
        return as_stream(zeros(self.x_like))

    def _laid_out(self, shared: Tree) -> Tree:
        # Both branches of a conditional must lay out what they return alike.
        return shared if self._specs is None else laid_out(shared, self._specs.shared)

    def _laid_out_embedding(self, gradients: list[Array]) -> list[Array]:
        return gradients if self._specs is None else laid_out(gradients, self._embedding.take(self._specs.shared))


class _Read(NamedTuple):
    """Which leaves of a tree a function reads: a branch that is to leave the others alone does not hold them."""

    leaves: tuple[bool, ...]

    def added(self, totals: Tree, gradients: list[Array]) -> list[Array]:
        """Gradients of those leaves, and what there was of them in a tree of totals."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(totals)]
        read = [path for path, wanted in zip(paths, self.leaves, strict=True) if wanted]
        new = [gradient.astype(jnp.float32) for gradient in gradients]
        return [combine(*leaf) for leaf in zip(read, self.take(totals), new, strict=True)]

    @classmethod
    def by(cls, function: Callable[[Tree], Tree], tree: Tree) -> _Read:
        jaxpr = jax.make_jaxpr(function)(tree).jaxpr
        read = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars} | {id(atom) for atom in jaxpr.outvars}
        return cls(tuple(id(var) in read for var in jaxpr.invars))

    def take(self, tree: Tree) -> list[Any]:
        """Those leaves."""
        return [leaf for leaf, read in zip(_leaves(tree), self.leaves, strict=True) if read]

    def put(self, tree: Tree, leaves: list[Any]) -> Tree:
        """The tree with other ones in their place."""
        rest = iter(leaves)
        old, structure = jax.tree.flatten(tree)
        return structure.unflatten([next(rest) if read else leaf for leaf, read in zip(old, self.leaves, strict=True)])


def _leaves(tree: Tree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


class Chunks:
    """What a stage holds of the layers, inside the manual region.

    With v chunks of each block, chunk c is one of block c // v.
    """

    def __init__(self, staged: tuple[Tree, ...], rows: tuple[Tree, ...], chunks: int) -> None:
        """chunks: of all blocks together."""
        self.of_block = chunks // len(staged)
        """Chunks of a block."""
        self.params = tuple(by_chunk(tree, self.of_block) for tree in staged)
        self.rows = tuple(by_chunk(tree, self.of_block) for tree in rows)

    def layers(self, block: int) -> int:
        """Rows of a chunk of a block."""
        return jax.tree.leaves(self.rows[block])[0].shape[1]

    def at(self, block: int, chunk: Array, first: int = 0, count: int | None = None) -> tuple[Tree, Tree]:
        """(parameters, rows) of a chunk of a block, or of `count` of its layers; matrices are `Row`s."""

        def small(row: Row) -> Array | Row:
            return row if row.array.ndim > 3 else row.read()

        params, rows = (self.of_rows(block, t, chunk, first, count) for t in (self.params[block], self.rows[block]))
        return jax.tree.map(small, params), jax.tree.map(lambda row: row.read(), rows)

    def of_rows(self, block: int, tree: Tree, chunk: Array, first: int = 0, count: int | None = None) -> Tree:
        """Of a tree of leaves [v, n, ...] where a chunk lies, or `count` of its layers."""
        place, layers = self.place(block, chunk), self.layers(block)

        def of_leaf(leaf: Array) -> Row:
            row = Row(leaf, (place,))
            whole = count in (None, layers) or leaf.shape[1] != layers  # what all layers read has one row
            return row if whole else row.part(first, count or layers)

        return jax.tree.map(of_leaf, tree)

    def place(self, block: int, chunk: Array) -> Array:
        """Where among those of its block a chunk lies."""
        return chunk - block * self.of_block


def zero_sums(params: Params) -> Sums:
    """Nothing added yet."""
    none = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), tuple(params))
    return Sums(Params(*none), jnp.float32(0))


def stages_branch() -> bool:
    """Whether what is traced is a stage of a pipeline whose stages may compute different things
    (`ParallelConfig.stages_branch`)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return PP in manual and PP in (dict(nn.get_logical_axis_rules()).get("stage") or ())


def finished(gradients: Params, pieces: Pieces) -> Params:
    """What the sums of a step add up to: staged leaves [v, n, ...] become [v n, ...], parts that stages have of shared
    ones meet."""

    def of_shared(path: Any, leaf: Array) -> Array:
        keys = tuple(key.key for key in path)
        is_part = stages_branch() and any(keys[: len(name)] == name for name in pieces.apart)
        return jax.lax.psum(leaf, PP) if is_part else leaf

    staged = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), gradients.staged)
    return Params(staged, jax.tree_util.tree_map_with_path(of_shared, gradients.shared))


def zeros(like: Tree) -> Tree:
    """Arrays of these shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def select(condition: Array, yes: Tree, no: Tree) -> Tree:
    """`jnp.where` for trees and a condition that is one truth."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def by_chunk(tree: Tree, chunks: int) -> Tree:
    """Leaves [v n, ...] of a stage to [v, n, ...]."""
    return jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), tree)


def at_index(tree: Tree, index: Array) -> Tree:
    """Row `index` of every leaf."""
    return jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False), tree)


def put_at(tree: Tree, values: Tree, index: Array) -> Tree:
    """Inverse of `at_index`: every leaf with its row `index` replaced."""
    return jax.tree.map(
        lambda rows, value: jax.lax.dynamic_update_index_in_dim(rows, value.astype(rows.dtype), index, axis=0),
        tree,
        values,
    )


def room(slots: int, like: Tree) -> Tree:
    """Zeros [slots, ...] for arrays of these shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), like)


def shift(x: Tree, stages: int, by: int) -> Tree:
    """x of the stage `by` before; the stages are a ring."""
    return jax.lax.ppermute(x, PP, [(stage, (stage + by) % stages) for stage in range(stages)])


def over_stages(
    region: Callable[..., Any], specs: Params, out_specs: Any, replicas: Replicas = ALIKE
) -> Callable[..., Any]:
    """`region(params, rows, work)` as a manual region over pp, so that it sees one stage's part of params and rows; and
    one replica's samples.
    """

    def apart(params: Params, rows: Tree, work: Work) -> Any:
        with replicas.apart():
            return region(params, rows, work)

    def call(params: Params, rows: Tree, work: Work) -> Any:
        losses = replicas.of_array("loss_mask")
        work_specs = Work(replicas.of_batch(work.batch), losses, losses, PartitionSpec())  # type: ignore[arg-type]
        axes = (PP, *replicas.axes)
        in_specs = (manual_part(specs, axes), PartitionSpec(PP), work_specs)
        whole = jax.shard_map(apart, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)
        return whole(params, rows, work)

    return call


def laid_out(gradients: Tree, specs: Tree) -> Tree:
    """Gradients as their specs say; of the axes of the region nothing is said, and staged leaves are [chunks, rows,
    ...]."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)

    def of_leaf(gradient: Array, spec: PartitionSpec) -> Array:
        inner = [*manual_part(spec, automatic)]
        inner = [None] * (gradient.ndim - len(inner)) + inner
        return jax.lax.with_sharding_constraint(gradient, PartitionSpec(*inner))

    return jax.tree.map(of_leaf, gradients, specs)


def as_stream(x: Tree) -> Tree:
    """x laid out as the residual stream."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", "residual_seq", "act_embed"), x)


def broadcast_from(x: Tree, stage: int) -> Tree:
    """x of one stage, on every stage."""

    def of_leaf(leaf: Array) -> Array:
        # Bits add up exactly where all but one are zero; XLA:CPU cannot sum bf16 in a manual region, and NCCL no int16.
        half = leaf.dtype.itemsize == 2 and leaf.shape[-1] % 2 == 0
        bits = jnp.int32 if half else {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[leaf.dtype.itemsize]
        pairs = leaf.reshape(*leaf.shape[:-1], -1, 2) if half else leaf
        mine = jnp.where(jax.lax.axis_index(PP) == stage, jax.lax.bitcast_convert_type(pairs, bits), 0)
        return jax.lax.bitcast_convert_type(jax.lax.psum(mine, PP), leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(of_leaf, x)
