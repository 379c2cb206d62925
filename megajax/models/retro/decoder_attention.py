"""Chunked cross-attention: how the decoder reads the neighbours of the chunk before."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, C chunks, M tokens of a chunk, F = C K neighbours, R tokens of each, D hidden
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.models.retro.chunks import chunks, in_sequence, places_of_readers, readers
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.cross_rotary import cross_rotary, rotary_at
from megajax.ops.attention import AttentionMask
from megajax.parallel.sharding import constrain, residual_stream_of
from megajax.spec import Builder
from megajax.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megajax.transformer.block import LayerInputs, TransformerBlock
from megajax.transformer.layer import WithContext

Array = jax.Array


class RetroDecoderCrossAttention(nn.Module):
    """Attention of x [B, S, D] to the neighbours [F, R, D] of each chunk.

    Megatron: `core/models/retro/decoder_attention.py`. A token reads what was found for the last chunk that is
    complete: see `readers`. The first layer that does so also holds the encoder of the neighbours, and returns what it
    made of them, for the layers behind it to read.

    Attributes:
      encoder_block_spec: the encoder's layers; None: the neighbours are encoded already.
    """

    config: RetroConfig
    submodules: CrossAttentionSubmodules
    encoder_block_spec: tuple[Builder, ...] | None = None

    @nn.compact
    def __call__(
        self, x_BSD: Array, neighbors_FRD: Array, *, mask: AttentionMask, deterministic: bool = True
    ) -> Array | WithContext:
        """mask: which tokens of the neighbours there are; `keep` bool [F, 1, 1, R]."""
        B, S, D = x_BSD.shape
        length = self.config.retro_chunk_length
        x_BSD = constrain(x_BSD, "batch", "seq", "act_embed")
        if self.encoder_block_spec is not None:
            neighbors_FRD = self._encoded(neighbors_FRD, chunks(x_BSD, length), mask, deterministic)
        x_CMD = readers(x_BSD, length)
        neighbors_CTD = neighbors_FRD.reshape(x_CMD.shape[0], -1, D)
        if mask.keep is not None:
            mask = dataclasses.replace(mask, keep=mask.keep.reshape(x_CMD.shape[0], 1, 1, -1))
        attention = CrossAttention(self.config, self.submodules, name="attn")
        R = neighbors_FRD.shape[1]
        rotary = cross_rotary(self.config, places_of_readers(B, S, length), neighbors_CTD.shape[1] // R, R)
        with residual_stream_of(length, whole=True):
            y_CMD = attention(x_CMD, neighbors_CTD, mask=mask, rotary=rotary, deterministic=deterministic)
        y_BSD = constrain(in_sequence(y_CMD, B, S), "batch", "residual_seq", "act_embed")
        return y_BSD if self.encoder_block_spec is None else WithContext(y_BSD, neighbors_FRD)

    def _encoded(self, neighbors_FRD: Array, chunks_CMD: Array, mask: AttentionMask, deterministic: bool) -> Array:
        assert self.encoder_block_spec is not None
        encoder = TransformerBlock(
            self.config.encoder_config, self.encoder_block_spec, stacked_axis="inner_layers", name="encoder"
        )
        R = neighbors_FRD.shape[1]
        rotary = rotary_at(self.config, jnp.arange(R)[None]) if self.config.retro_encoder_rotary else None
        with residual_stream_of(R):
            neighbors_FRD = constrain(neighbors_FRD, "batch", "residual_seq", "act_embed")
            inputs = LayerInputs(mask, rotary, context=chunks_CMD)
            neighbors_FRD = encoder(neighbors_FRD, inputs, deterministic=deterministic)
        return constrain(neighbors_FRD, "batch", "seq", "act_embed")
