"""Layer specs of RETRO's encoder of neighbours."""

# SPDX-License-Identifier: Apache-2.0
from megajax.backends import BackendSpecProvider
from megajax.models.common.layer_parts import cross_attention_spec, plain_layer_spec
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.encoder_attention import (
    RetroEncoderBiasDropoutAdd,
    RetroEncoderCrossAttention,
    RetroEncoderLayerNorm,
)
from megajax.spec import Builder, ModuleSpec


def get_retro_encoder_spec(config: RetroConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """The encoder's first layer, which reads the chunk. Megatron: `core/models/retro/encoder_spec.py`."""
    norm = backend.layer_norm(config)
    attention = cross_attention_spec(backend).submodules
    return plain_layer_spec(config, backend).replace(
        pre_cross_attn_layernorm=norm,
        cross_attention=ModuleSpec(
            RetroEncoderCrossAttention, attention, {"attention_dropout": config.attention_dropout}
        ),
        cross_attn_bda=RetroEncoderBiasDropoutAdd,
        pre_mlp_layernorm=ModuleSpec(RetroEncoderLayerNorm, params={"norm": norm}),
    )


def get_retro_encoder_block_spec(config: RetroConfig, backend: BackendSpecProvider) -> tuple[Builder, ...]:
    """The spec of each layer of the encoder: the first, then plain ones."""
    plain = plain_layer_spec(config, backend)
    return (get_retro_encoder_spec(config, backend), *(plain,) * (config.retro_encoder_num_layers - 1))
