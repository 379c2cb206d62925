"""Layer specs of RETRO's decoder."""

# SPDX-License-Identifier: Apache-2.0
from megajax.backends import BackendSpecProvider
from megajax.models.common.layer_parts import cross_attention_spec, plain_layer_spec
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.decoder_attention import RetroDecoderCrossAttention
from megajax.models.retro.encoder_spec import get_retro_encoder_block_spec
from megajax.spec import Builder, ModuleSpec


def get_retro_decoder_spec(
    config: RetroConfig, backend: BackendSpecProvider, *, encoder_block_spec: tuple[Builder, ...] | None = None
) -> ModuleSpec:
    """A layer that reads neighbours. Megatron: `core/models/retro/decoder_spec.py`.

    encoder_block_spec: the layers of the encoder, for the first of these layers.
    """
    return plain_layer_spec(config, backend).replace(
        pre_cross_attn_layernorm=backend.layer_norm(config),
        cross_attention=ModuleSpec(
            RetroDecoderCrossAttention,
            cross_attention_spec(backend).submodules,
            {"encoder_block_spec": encoder_block_spec},
        ),
    )


def get_retro_decoder_block_spec(config: RetroConfig, backend: BackendSpecProvider) -> tuple[Builder, ...]:
    """The spec of each layer of the decoder: plain, or one that reads neighbours."""
    numbers = config.retro_layer_numbers
    encoder = get_retro_encoder_block_spec(config, backend)

    def layer(number: int) -> ModuleSpec:
        if number not in numbers:
            return plain_layer_spec(config, backend)
        return get_retro_decoder_spec(config, backend, encoder_block_spec=encoder if number == numbers[0] else None)

    return tuple(layer(number) for number in range(1, config.num_layers + 1))
