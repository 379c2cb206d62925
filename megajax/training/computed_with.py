"""The parameters that a step computes with: copies in the dtype of the model, whole where ZeRO-1 divides the state.

Mixed precision trains fp32 parameters, which only the optimizer needs as they are. So under ZeRO-1 and 2 each replica
keeps its part of them, as it keeps its part of the optimizer's state, and a step begins by gathering copies, most of
them in the compute dtype (`megajax.parallel.compute_copy`): what Megatron's distributed optimizer does after a step.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import linen as nn

from megajax.config import Config
from megajax.models.family import Family
from megajax.parallel import sharding
from megajax.parallel.compute_copy import cast, cast_once
from megajax.parallel.sharding import AxisRules
from megajax.training.state import abstract_params

SCOPE = "computed_with"
"""In the name of every operation that makes the copies."""


class ComputedWith(NamedTuple):
    """chosen: bools, those of which a copy in `dtype` is made. at_rest, in_use: partition specs of the parameters.
    gathers: whether these differ."""

    chosen: Any
    dtype: Any
    at_rest: Any
    in_use: Any
    gathers: bool

    @classmethod
    def of(cls, model: nn.Module, family: Family, config: Config, rules: AxisRules, param_axes: Any) -> ComputedWith:
        """What a step of this config computes with."""
        params, dtype = nn.unbox(abstract_params(model, family, config)), config.model.compute_dtype
        inputs = family.example_inputs(config.model, 1, config.data.seq_length)
        chosen = jax.tree.map(lambda leaf: False, params)
        if config.model.mixed_precision:
            chosen = cast_once(lambda params: model.apply({"params": params}, *inputs), params, dtype)
            # What a loss reads it may read in parts, where a model that gives logits does not.
            chosen = jax.tree.map(lambda yes, axes: yes and "layers" in axes, chosen, param_axes)
        gathers = config.parallel.zero in (1, 2) and any(jax.tree.leaves(chosen))
        at_rest = sharding.specs_of_axes(param_axes, rules.optimizer_table if gathers else rules.table)
        return cls(chosen, dtype, at_rest, sharding.specs_of_axes(param_axes, rules.table), gathers)

    def __call__(self, params: Any) -> Any:
        """The parameters of the state as the model gets them."""
        with jax.named_scope(SCOPE):
            params = cast(params, self.chosen, self.dtype)
            if not self.gathers:
                return params
            # Cast where they lie: XLA would else send fp32.
            params = jax.lax.with_sharding_constraint(params, self.at_rest)
            return jax.lax.with_sharding_constraint(params, self.in_use)
