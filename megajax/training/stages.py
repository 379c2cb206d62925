"""A training state divided over pipeline stages: where its layers lie, and how it comes from and goes to storage.

Checkpoints hold the layers in their order. In a pipeline with several chunks a stage, or with stages of unequal size,
the rows of a stack lie in another order, with padding between them: they are moved when a state is saved or restored.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
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
from megajax.parallel.pipeline_layout import parse_layout, split_layers
from megajax.parallel.pipeline_pieces import Params
from megajax.parallel.sharding import is_box
from megajax.transformer.block import StackRows
from megajax.transformer.stages import PADDING, Placement, StackPlacement, place_layers

Array = jax.Array
Tree = Any


def layers_per_stage(config: Config) -> tuple[int, ...]:
    """How many layers each virtual stage runs."""
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


@dataclasses.dataclass(frozen=True)
class Stages:
    """Where the layers of a model lie; without a pipeline, one stage with all of them in order."""

    placement: Placement

    @classmethod
    def of(cls, model: nn.Module, family: Family, config: Config) -> Stages:
        """The stages that a config asks for.

        Raises:
          ConfigError: the layers cannot be divided like that.
        """
        parallel = config.parallel
        if parallel.pipeline_model_parallel_size == 1:
            return cls({})
        if family.layer_segments is None:
            raise ConfigError(
                f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}: --model {family.name} has no"
                " pipeline; set it to 1"
            )
        return cls(
            place_layers(
                family.layer_segments(model),
                layers_per_stage(config),
                stages=parallel.pipeline_model_parallel_size,
                chunks=parallel.num_virtual_stages_per_pipeline_rank,
            )
        )

    @property
    def in_order(self) -> bool:
        """Whether layers lie as they are stored."""
        return all(stack.is_order_of_layers for stack in self.placement.values())

    def rows(self) -> dict[str, StackRows]:
        """What a stage is told of its rows; leaves [p v n]."""
        return {
            name: StackRows(
                jnp.asarray(stack.layer, jnp.int32),
                jnp.asarray(stack.source != PADDING) if stack.has_padding else None,
            )
            for name, stack in self.placement.items()
        }

    def placed_shapes(self, boxed: Tree) -> Tree:
        """Shapes as stored (boxed with their axes) to shapes as they lie."""

        def place(path: Any, box: Any) -> Any:
            stack = self._stack(path)
            if stack is None:
                return box
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
        keys = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return next((self.placement[key] for key in keys if key in self.placement), None)


def _placed(leaf: Array, stack: StackPlacement) -> Array:
    rows = jnp.take(leaf, np.maximum(stack.source, 0), axis=0)
    keep = (stack.source != PADDING).reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(keep, rows, 0) if stack.has_padding else rows


def split_params(tree: Tree, param_axes: Tree) -> Params:
    """A tree like the parameters into what lies on stages and what all stages share."""
    axes: dict[Any, Any] = flatten_dict(param_axes)
    named: dict[Any, Any] = flatten_dict(tree)
    staged = {path: leaf for path, leaf in named.items() if axes[path][:1] == ("layers",)}
    shared = {path: leaf for path, leaf in named.items() if path not in staged}
    return Params(unflatten_dict(staged), unflatten_dict(shared))


def merge_params(params: Params) -> Tree:
    """Inverse of `split_params`."""
    return unflatten_dict(flatten_dict(params.staged) | flatten_dict(params.shared))
