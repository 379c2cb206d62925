"""Specs of a plain layer and of its two halves, for families whose layers are put together from them."""

# SPDX-License-Identifier: Apache-2.0
from megajax.backends import BackendSpecProvider
from megajax.config import TransformerConfig
from megajax.spec import ModuleSpec
from megajax.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules
from megajax.transformer.mlp import MLP, MLPSubmodules


def plain_layer_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Attention of a sequence to itself, then the feed-forward half, each after a norm."""
    norm = backend.layer_norm(config)
    return ModuleSpec(
        TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention_spec(config, backend),
            post_self_attn_layernorm=norm if config.sandwich_norm else None,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(backend),
            post_mlp_layernorm=norm if config.sandwich_norm else None,
        ),
    )


def self_attention_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Attention of a sequence to itself."""
    qk_norm = backend.qk_norm(config)
    return ModuleSpec(
        SelfAttention,
        SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def cross_attention_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Attention of a sequence to another one."""
    column = backend.column_parallel_linear()
    return ModuleSpec(
        CrossAttention,
        CrossAttentionSubmodules(
            linear_q=column,
            linear_kv=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )


def mlp_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The feed-forward half."""
    return ModuleSpec(
        MLP, MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    )
