"""Layer specs of T5: an encoder's layer, and a decoder's, which also reads the encoder's output."""

# SPDX-License-Identifier: Apache-2.0
from megajax.backends import BackendSpecProvider
from megajax.config import TransformerConfig
from megajax.models.common.layer_parts import cross_attention_spec, mlp_spec, self_attention_spec
from megajax.spec import ModuleSpec
from megajax.transformer.layer import TransformerLayer, TransformerLayerSubmodules


def get_t5_encoder_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One layer of the encoder. Megatron: `core/models/T5/t5_spec.py`."""
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


def get_t5_decoder_spec(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """One layer of the decoder: an encoder's, with attention to the encoder's output in its middle."""
    spec = get_t5_encoder_spec(config, backend)
    return spec.replace(
        pre_cross_attn_layernorm=backend.layer_norm(config), cross_attention=cross_attention_spec(backend)
    )
