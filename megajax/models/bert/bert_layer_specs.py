"""Layer specs of BERT: that all tokens see each other is the model's mask to say."""

# SPDX-License-Identifier: Apache-2.0
from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import TransformerConfig
from megajax.models.common.layer_parts import mlp_spec, self_attention_spec
from megajax.spec import ModuleSpec
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules


def get_bert_layer_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One layer of BERT. Megatron: `core/models/bert/bert_layer_specs.py`."""
    norm = backend.layer_norm(config)
    return ModuleSpec(
        TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention_spec(config, backend),
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(backend),
        ),
    )


def get_bert_layer_local_spec(config: TransformerConfig) -> ModuleSpec:
    """One layer of BERT in plain JAX."""
    return get_bert_layer_spec(config, LocalSpecProvider())
