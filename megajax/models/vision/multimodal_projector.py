"""From the features of a vision tower to those of a language model."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S tokens, E features of the tower, D features of the language model
import dataclasses
from typing import Literal

import jax
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.spec import Builder, ModuleSpec
from megajax.transformer.mlp import MLP, MLPSubmodules

Array = jax.Array

ProjectorType = Literal["mlp", "affine"]


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MultimodalProjectorSubmodules:
    """Slots of `MultimodalProjector`: a norm in front (None for none), the MLP, the linear map of the affine kind."""

    layer_norm: Builder | None = None
    mlp: Builder
    linear: Builder


def get_projector_spec(backend: BackendSpecProvider, layer_norm: Builder | None = None) -> ModuleSpec:
    """The projector of parts from `backend`. layer_norm: a norm in front, as Megatron's TE spec has one."""
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    mlp = ModuleSpec(MLP, MLPSubmodules(linear_fc1=column, linear_fc2=row))
    slots = MultimodalProjectorSubmodules(layer_norm=layer_norm, mlp=mlp, linear=column)
    return ModuleSpec(MultimodalProjector, slots)


class MultimodalProjector(nn.Module):
    """x [B, S, E] -> [B, S, hidden_size]: an MLP, or one linear map.

    Megatron: `core/models/vision/multimodal_projector.py`.

    Attributes:
      config: `hidden_size` is that of the language model; `ffn_hidden_size`, activation, biases are the MLP's.
    """

    config: TransformerConfig
    submodules: MultimodalProjectorSubmodules = dataclasses.field(
        default_factory=lambda: get_projector_spec(LocalSpecProvider()).submodules
    )
    projector_type: ProjectorType = "mlp"

    @nn.compact
    def __call__(self, x_BSE: Array) -> Array:
        cfg, sub = self.config, self.submodules
        if sub.layer_norm is not None:
            x_BSE = sub.layer_norm(config=cfg, name="layernorm")(x_BSE).astype(x_BSE.dtype)
        if self.projector_type == "mlp":
            return sub.mlp(config=cfg, name="encoder")(x_BSE)
        if self.projector_type == "affine":
            # Not divided over tensor-parallel devices: Megatron gathers the output again, which all of them need.
            linear = sub.linear(
                config=cfg, features=cfg.hidden_size, axis="whole", use_bias=cfg.add_bias_linear, name="encoder"
            )
            return linear(x_BSE)
        raise ConfigError(f"vision_projection_type={self.projector_type!r} is unknown; use mlp or affine")
