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
from megajax.transformer.moe import MoELayer, MoESubmodules, Router
from megajax.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention

Array = jax.Array


def get_gpt_layer_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One GPT layer, with experts if the config has them. Megatron: `core/models/gpt/gpt_layer_specs.py`."""
    norm = backend.layer_norm(config)
    after = norm if config.sandwich_norm else None
    return ModuleSpec(
        TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=get_self_attention_spec(config, backend),
            post_self_attn_layernorm=after,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec(backend) if config.num_moe_experts is None else get_moe_module_spec(backend),
            post_mlp_layernorm=after,
        ),
    )


def get_self_attention_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Attention of a sequence to itself: multi-head, or multi-latent."""
    column, qk_norm = backend.column_parallel_linear(), backend.qk_norm(config)
    if config.multi_latent_attention:
        latent = MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            kv_layernorm=qk_norm,
        )
        return ModuleSpec(MultiLatentAttention, latent)
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(SelfAttention, attention)


def get_mlp_module_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The dense feed-forward half of a layer."""
    return ModuleSpec(
        MLP,
        MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()),
    )


def get_moe_module_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Experts in the place of the dense feed-forward half. Megatron: `core/models/gpt/moe_module_specs.py`."""
    return ModuleSpec(
        MoELayer,
        MoESubmodules(
            router=Router,
            experts=backend.experts(),
            shared_experts=get_mlp_module_spec(backend),
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
        ),
    )


def get_gpt_layer_local_spec(config: TransformerConfig) -> ModuleSpec:
    """One GPT layer in plain JAX."""
    return get_gpt_layer_spec(config, LocalSpecProvider())


def get_gpt_decoder_block_spec(config: TransformerConfig, backend: BackendSpecProvider) -> tuple[Builder, ...]:
    """The spec of each layer: with experts or without, by `moe_layer_freq`, and heterogeneous ones."""
    if config.heterogeneous_layers is None:
        return tuple(get_gpt_layer_spec(config.for_layer(i), backend) for i in range(config.num_layers))
    spec = get_gpt_layer_spec(config, backend)
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
