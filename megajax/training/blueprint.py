"""A run before anything of it exists: the model, its optimizer, and where each array will lie. Allocates nothing."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from megajax.backends import BackendSpecProvider
from megajax.config import Config
from megajax.models.family import Family
from megajax.parallel import sharding
from megajax.parallel.replication import refuse_accidental_copies
from megajax.parallel.sharding import AxisRules
from megajax.training.backend import choose_backend
from megajax.training.computed_with import ComputedWith
from megajax.training.optimizer import make_optimizer
from megajax.training.stages import Stages
from megajax.training.state import TrainState, abstract_params, create_state, state_axes, state_shardings


class Blueprint(NamedTuple):
    """What a config and a mesh determine.

    param_axes, axes, places: trees of logical axes and shardings, like the parameters and the state as they lie on the
    stages. create: the state before the first step; traceable.
    """

    mesh: Mesh | AbstractMesh
    rules: AxisRules
    backend: BackendSpecProvider
    model: nn.Module
    stages: Stages
    optimizer: optax.GradientTransformationExtraArgs
    param_axes: Any
    axes: TrainState
    places: TrainState
    abstract_state: TrainState
    create: Callable[[], TrainState]
    computed_with: ComputedWith

    @property
    def params_in_use(self) -> Any:
        """The shapes of the parameters, placed where the model reads them: of a program that trains nothing."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec)),
            self.abstract_state.params,
            self.computed_with.in_use,
        )


def draw_up(config: Config, family: Family, mesh: Mesh | AbstractMesh) -> Blueprint:
    """The blueprint of a config whose vocabulary size is known, on a mesh that need not have devices.

    Raises:
      ConfigError: the model cannot be divided like that, or would leave large copies on every device by accident.
    """
    rules = sharding.axis_rules(config.parallel, config.model, mesh.size)
    backend = choose_backend(config, mesh)
    model = family.build_model(config.model, backend)
    boxed = abstract_params(model, family, config)
    sharding.require_axes(boxed)
    stages = Stages.of(model, family, config)
    boxed = stages.placed_shapes(boxed)
    sharding.partition_specs(boxed, rules.table, mesh)
    if config.parallel.zero:
        sharding.partition_specs(boxed, rules.optimizer_table, mesh)
    refuse_accidental_copies(boxed, rules, config.parallel, mesh)
    param_axes = sharding.logical_axes(boxed)
    optimizer = make_optimizer(
        config.optimizer,
        param_axes,
        bias_update_rate=config.model.moe_router_bias_update_rate,
        frozen=config.model.frozen_parameters,
    )

    def create() -> TrainState:
        return create_state(model, family, config, optimizer, seed=config.train.seed, place=stages.place)

    shapes = jax.eval_shape(create)
    axes = state_axes(shapes, param_axes)
    computed_with = ComputedWith.of(model, family, config, rules, param_axes)
    places = state_shardings(axes, rules, mesh, params_as_optimizer=computed_with.gathers)
    return Blueprint(
        mesh=mesh,
        rules=rules,
        backend=backend,
        model=model,
        stages=stages,
        optimizer=optimizer,
        param_axes=param_axes,
        axes=axes,
        places=places,
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        ),
        create=create,
        computed_with=computed_with,
    )
