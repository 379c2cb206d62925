"""Layer specs of GPT: one function, in which the backend is the only thing that differs."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import HeterogeneousLayer, TransformerConfig
from megajax.spec import Builder, ModuleSpec
from megajax.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules
from megajax.transformer.mlp import MLP, MLPSubmodules

Array = jax.Array


def get_gpt_layer_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One dense GPT layer. Megatron: `core/models/gpt/gpt_layer_specs.py`."""
    norm, qk_norm = backend.layer_norm(config), backend.qk_norm(config)
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(SelfAttention, attention),
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec(backend),
        ),
    )


def get_mlp_module_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The dense feed-forward half of a layer."""
    return ModuleSpec(
        MLP,
        MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()),
    )


def get_gpt_layer_local_spec(config: TransformerConfig) -> ModuleSpec:
    """One dense GPT layer in plain JAX."""
    return get_gpt_layer_spec(config, LocalSpecProvider())


def get_gpt_decoder_block_spec(config: TransformerConfig, backend: BackendSpecProvider) -> tuple[Builder, ...]:
    """The spec of each layer, heterogeneous ones included."""
    spec = get_gpt_layer_spec(config, backend)
    if config.heterogeneous_layers is None:
        return (spec,) * config.num_layers
    return tuple(_heterogeneous(spec, layer, backend) for layer in config.heterogeneous_layers)


class LinearReplacement(nn.Module):
    """One linear map [B, S, D] -> [B, S, D] in place of attention or MLP (Nemotron-NAS `replace_with_linear`)."""

    config: TransformerConfig
    linear: Builder

    @nn.compact
    def __call__(self, x_BSD: Array, **inputs: object) -> Array:
        del inputs  # the mask and the like, which a linear map does not need
        cfg = self.config
        build = self.linear(
            config=cfg, features=cfg.hidden_size, axis="mlp", use_bias=cfg.add_bias_linear, name="linear"
        )
        return build(x_BSD)


def _heterogeneous(spec: ModuleSpec, layer: HeterogeneousLayer, backend: BackendSpecProvider) -> ModuleSpec:
    linear = ModuleSpec(LinearReplacement, params={"linear": backend.column_parallel_linear()})
    changes: dict[str, Any] = {}
    for slot, norm, kind in (
        ("self_attention", "input_layernorm", layer.attention),
        ("mlp", "pre_mlp_layernorm", layer.mlp),
    ):
        if kind == "no_op":
            changes |= {slot: None, norm: None}
        elif kind == "linear":
            changes[slot] = linear
    return spec.replace(**changes)
