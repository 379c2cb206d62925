"""The feed-forward half of a layer."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T = B S tokens, D hidden, F ffn hidden
import dataclasses

import jax
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.activations import ACTIVATIONS, activate, gated
from megajax.parallel.sharding import constrain, merge_tokens
from megajax.spec import Builder

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MLPSubmodules:
    """Slots of `MLP`."""

    linear_fc1: Builder
    linear_fc2: Builder


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`, or `fc2(act(gate(x)) * fc1(x))` when `gated_linear_unit`. x [B, S, D] -> [B, S, D].

    Megatron: `core/transformer/mlp.py`, whose gated `linear_fc1` stacks [gate; up].
    """

    config: TransformerConfig
    submodules: MLPSubmodules

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        cfg, sub = self.config, self.submodules
        activation = ACTIVATIONS[cfg.activation_func]

        def fc1(name: str) -> Array:
            y = sub.linear_fc1(
                config=cfg, features=cfg.ffn_hidden_size, axis="mlp", use_bias=cfg.add_mlp_bias, name=name
            )(x_TD)
            return constrain(y.reshape(*x_BSD.shape[:2], -1), "batch", "seq", "act_mlp")

        x_TD = merge_tokens(x_BSD)  # once, for gate and fc1 together
        if cfg.gated_linear_unit:
            clamp, offset = cfg.activation_func_clamp_value, cfg.glu_linear_offset
            h_BSF = gated(fc1("linear_gate"), fc1("linear_fc1"), activation=activation, clamp=clamp, offset=offset)
        else:
            h_BSF = activate(fc1("linear_fc1"), activation=activation)
        y_BSD = sub.linear_fc2(
            config=cfg, features=cfg.hidden_size, axis="mlp", use_bias=cfg.add_mlp_bias, name="linear_fc2"
        )(h_BSF)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")
