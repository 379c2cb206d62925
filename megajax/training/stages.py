"""A training state divided over pipeline stages: where its layers lie, and how it comes from and goes to storage.

Checkpoints hold the layers in their order. In a pipeline with several chunks a stage, or with stages of unequal size,
the rows of a stack lie in another order, with padding between them: they are moved when a state is saved or restored.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from megajax.checkpoint.tree import spread_evenly
from megajax.config import Config, ConfigError
from megajax.models.family import Family
from megajax.parallel.gradient_sums import combine, combined_rows
from megajax.parallel.pipeline_layout import parse_layout, split_layers
from megajax.parallel.pipeline_pieces import Params, Path
from megajax.parallel.sharding import is_box
from megajax.transformer.block import StackRows
from megajax.transformer.stack import Segment
from megajax.transformer.stages import PADDING, Placement, StackPlacement, place_layers

Array = jax.Array
Tree = Any


def layers_per_stage(config: Config) -> tuple[int, ...]:
    """How many layers of the last block each virtual stage runs; a model has one block, or others before it."""
    parallel, num_layers = config.parallel, config.model.num_layers
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_layout is not None:
        layout = parse_layout(parallel.pipeline_model_parallel_layout, stages, chunks, num_layers=num_layers)
        return tuple(stage.count("t") for stage in layout)
    return split_layers(
        num_layers,
        stages,
        chunks,
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss=parallel.account_for_loss_in_pipeline_split,
    )


def _layers_before(config: Config, segments: tuple[Segment, ...], block: Path) -> tuple[int, ...]:
    """How many layers of a block before the last each virtual stage runs: all the same."""
    parallel, count = config.parallel, sum(len(segment.stacks) * segment.repeats for segment in segments)
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_layout is not None:
        layout = parallel.pipeline_model_parallel_layout
        raise ConfigError(
            f"pipeline_model_parallel_layout={layout!r} has no letter for layers of the {'/'.join(block)}; drop it"
        )
    if count % (stages * chunks):
        raise ConfigError(
            f"the {count} layers of the {'/'.join(block)} are not divisible by pipeline_model_parallel_size={stages}"
            f" times num_virtual_stages_per_pipeline_rank={chunks}; change one of them"
        )
    return (count // (stages * chunks),) * (stages * chunks)


_WORTH_A_BRANCH = 1 / 16
"""Padding of more than this share of the rows is not computed. A branch has a price: around the layers of Llama 3.1
405B on 1,024 H100s, of which 1.6% are padding, it leaves 64% of the bytes of their collectives with work beside them;
without it all have some."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Where the layers of a model lie; without a pipeline, one stage with all of them in order.

    Attributes:
      blocks: the blocks of layers that are divided over stages, by their paths, in the order in which they run.
      chunks: of each block, all stages together.
      skips_padding: where stages have far fewer layers than others, they compute nothing instead.
    """

    blocks: dict[Path, Placement]
    chunks: int = 1
    skips_padding: bool = True

    @classmethod
    def of(cls, model: nn.Module, family: Family, config: Config) -> Stages:
        """The stages that a config asks for.

        Raises:
          ConfigError: the layers cannot be divided like that.
        """
        parallel = config.parallel
        stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
        if stages == 1:
            return cls({})
        if family.layer_segments is None:
            raise ConfigError(
                f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}: --model {family.name} has no"
                " pipeline; set it to 1"
            )
        segments = family.layer_segments(model)
        *before, last = segments
        layers = {block: _layers_before(config, segments[block], block) for block in before}
        layers[last] = layers_per_stage(config)
        return cls(
            {block: place_layers(segments[block], layers[block], stages=stages, chunks=chunks) for block in segments},
            stages * chunks,
            skips_padding=parallel.stages_branch,
        )

    @property
    def in_order(self) -> bool:
        """Whether layers lie as they are stored."""
        return all(stack.is_order_of_layers for block in self.blocks.values() for stack in block.values())

    def rows(self) -> tuple[dict[str, StackRows], ...]:
        """What a stage is told of its rows, by block; leaves [p v n]."""

        def of_stack(stack: StackPlacement) -> StackRows:
            rows = StackRows(jnp.asarray(stack.layer, jnp.int32))
            if not stack.has_padding:
                return rows
            real = jnp.asarray(stack.source != PADDING)
            branches = self.skips_padding and stack.padding > _WORTH_A_BRANCH
            return rows._replace(wanted=real) if branches else rows._replace(masked=real)

        return tuple({name: of_stack(stack) for name, stack in block.items()} for block in self.blocks.values())

    def placed_shapes(self, boxed: Tree) -> Tree:
        """Shapes as stored (boxed with their axes) to shapes as they lie."""

        def place(path: Any, box: Any) -> Any:
            stack = self._stack(path)
            if stack is None:
                whole = self.blocks and box.names[:1] == ("layers",)
                return box.replace(names=("every_stage", *box.names[1:])) if whole else box
            shape = (len(stack.source), *box.value.shape[1:])
            return box.replace(value=jax.ShapeDtypeStruct(shape, box.value.dtype))

        return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)

    def place(self, params: Tree) -> Tree:
        """Parameters as stored to parameters as they lie; traceable."""

        def of_leaf(path: Any, leaf: Array) -> Array:
            stack = self._stack(path)
            return leaf if stack is None or stack.is_order_of_layers else _placed(leaf, stack)

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    def abstract_stored(self, abstract_state: Tree) -> Tree:
        """Shapes and shardings of a state as it is stored."""

        def of_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            stack = self._stack(path)
            if stack is None or stack.is_order_of_layers:
                return leaf
            shape = (len(stack.destination()), *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=spread_evenly(leaf.sharding, shape))  # type: ignore[arg-type]

        return jax.tree_util.tree_map_with_path(of_leaf, abstract_state)

    def to_stored(self, state: Tree) -> Tree:
        """A state, or a part of it, as it is stored; one leaf at a time."""

        def of_leaf(path: Any, leaf: Array) -> Array:
            stack = self._stack(path)
            if stack is None or stack.is_order_of_layers:
                return leaf
            rows = stack.destination()
            place = spread_evenly(leaf.sharding, (len(rows), *leaf.shape[1:]))  # type: ignore[arg-type]
            return jax.jit(partial(jnp.take, indices=rows, axis=0), out_shardings=place)(leaf)

        return jax.tree_util.tree_map_with_path(of_leaf, state)

    def from_stored(self, state: Tree, abstract_state: Tree) -> Tree:
        """A state as it was stored, or a part of it, to how it lies."""

        def of_leaf(path: Any, leaf: Array, target: jax.ShapeDtypeStruct) -> Array:
            stack = self._stack(path)
            if stack is None or stack.is_order_of_layers:
                return leaf
            return jax.jit(partial(_placed, stack=stack), out_shardings=target.sharding)(leaf)

        return jax.tree_util.tree_map_with_path(of_leaf, state, abstract_state)

    def _stack(self, path: Any) -> StackPlacement | None:
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for block, stacks in self.blocks.items():
            # An optimizer's state holds trees like the parameters, some of them under keys of its own.
            for start in range(len(keys) - len(block)):
                end = start + len(block)
                if keys[start:end] == block and keys[end] in stacks:
                    return stacks[keys[end]]
        return None

    def split(self, params: Tree, reads: tuple[tuple[Path, ...], ...], each: Callable[[Any], Any]) -> Params:
        """A tree like the parameters into what lies on stages and what all stages share.

        reads: see `Pieces`. each: a leaf that a block reads to one with a row for each chunk.
        """
        named: dict[Path, Any] = flatten_dict(params)  # type: ignore[assignment]
        staged: list[dict[Path, Any]] = []
        taken: set[Path] = set()
        for (block, stacks), read in zip(self.blocks.items(), reads, strict=True):
            own = {(*block, stack) for stack in stacks}
            mine = {path: leaf for path, leaf in named.items() if path[: len(block) + 1] in own}
            others = [path for path in named if any(path[: len(name)] == name for name in read)]
            taken |= mine.keys() | set(others)
            staged.append(mine | {path: each(named[path]) for path in others})
        shared = {path: leaf for path, leaf in named.items() if path not in taken}
        return Params(tuple(unflatten_dict(tree) for tree in staged), unflatten_dict(shared))

    def merge(self, gradients: Params, reads: tuple[tuple[Path, ...], ...]) -> Tree:
        """Inverse of `split`, for gradients: those of what blocks read add up over the chunks."""
        merged: dict[Path, Any] = dict(flatten_dict(gradients.shared))  # type: ignore[arg-type]
        for tree, read in zip(gradients.staged, reads, strict=True):
            for path, leaf in flatten_dict(tree).items():
                if any(path[: len(name)] == name for name in read):
                    leaf = combine(path, merged.get(path, 0), combined_rows(path, leaf))  # type: ignore[arg-type]
                merged[path] = leaf  # type: ignore[index]
        return unflatten_dict(merged)


def _placed(leaf: Array, stack: StackPlacement) -> Array:
    rows = jnp.take(leaf, np.maximum(stack.source, 0), axis=0)
    keep = (stack.source != PADDING).reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(keep, rows, 0) if stack.has_padding else rows
