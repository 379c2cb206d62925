"""The training state: everything a step reads and writes, its logical axes, and where it lives on a mesh."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from megajax.config import Config
from megajax.models.family import Family
from megajax.parallel import sharding
from megajax.parallel.sharding import AxisRules
from megajax.training.loss_scale import LossScaleState, init_loss_scale

Array = jax.Array
Axes = tuple[str | None, ...]


class TrainState(struct.PyTreeNode):
    """All of it is saved in a checkpoint; a resumed run continues with the same bits.

    step: int32, steps taken. samples: uint32, samples that the schedules have seen (skipped steps do not count).
    skipped, skipped_in_a_row: int32, updates left out. grad_norm_mean: fp32, running mean of the gradient norm, 0
    before the first step. rng: uint32 key data that dropout keys are folded from.
    """

    step: Array
    samples: Array
    skipped: Array
    skipped_in_a_row: Array
    grad_norm_mean: Array
    rng: Array
    params: Any
    opt_state: Any
    loss_scale: LossScaleState | None


def abstract_params(model: nn.Module, family: Family, config: Config) -> Any:
    """Shapes and logical axes of the parameters, boxed as linen gives them; allocates nothing."""
    inputs = family.example_inputs(config.model, 1, config.data.seq_length)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def create_state(
    model: nn.Module,
    family: Family,
    config: Config,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    place: Callable[[Any], Any] = lambda params: params,
) -> TrainState:
    """The state before the first step. The same seed gives the same weights on every mesh.

    `place` moves the rows of the parameters to where pipeline stages want them.
    """
    params_key, dropout_key = jax.random.split(jax.random.key(seed))
    inputs = family.example_inputs(config.model, 1, config.data.seq_length)
    params = place(nn.unbox(model.init(params_key, *inputs))["params"])
    return TrainState(
        step=jnp.int32(0),
        samples=jnp.uint32(0),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
        grad_norm_mean=jnp.float32(0),
        rng=jax.random.key_data(dropout_key),
        params=params,
        opt_state=optimizer.init(params),
        loss_scale=init_loss_scale(config.optimizer) if config.model.fp16 else None,
    )


def state_axes(abstract_state: TrainState, param_axes: Any) -> TrainState:
    """The logical axes of every leaf of the state: a parameter's for whatever the optimizer keeps of its shape, no
    names for the rest."""
    paths, _ = jax.tree_util.tree_flatten_with_path(param_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    known: dict[tuple[str, ...], Axes] = {_names(path): axes for path, axes in paths}

    def axes_of(path: Any, leaf: Any) -> Axes:
        names = _names(path)
        for start in range(len(names)):  # optimizers nest whole parameter trees: a suffix of the path is a parameter
            axes = known.get(names[start:])
            if axes is not None and len(axes) == len(leaf.shape):
                return axes
        return (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(axes_of, abstract_state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def is_axes(node: Any) -> bool:
    """Whether a node of a tree is the logical axes of a leaf."""
    # Optimizer states are tuples too; axes are those that hold names.
    return type(node) is tuple and all(isinstance(name, str | None) for name in node)


def state_shardings(
    axes: TrainState, rules: AxisRules, mesh: Mesh | AbstractMesh, *, params_as_optimizer: bool = False
) -> TrainState:
    """Where each leaf of the state lives. The optimizer has a table of its own: that is ZeRO-1.

    params_as_optimizer: parameters lie like the optimizer's state, as a model computes with copies of them.
    """

    def place(tree: Any, table: Mapping[str, tuple[str, ...]]) -> Any:
        return jax.tree.map(
            lambda a: NamedSharding(mesh, sharding.spec_of(a, table)),
            tree,
            is_leaf=is_axes,
        )

    whole, opt_state = place(axes, rules.table), place(axes.opt_state, rules.optimizer_table)
    params = place(axes.params, rules.optimizer_table if params_as_optimizer else rules.table)
    return whole.replace(params=params, opt_state=opt_state)
