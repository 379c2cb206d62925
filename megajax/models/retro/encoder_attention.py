"""The encoder's first layer: neighbours that read the chunk they were found for."""

# SPDX-License-Identifier: Apache-2.0
# C chunks, M tokens of a chunk, F = C K neighbours (those of one chunk follow each other), R tokens of each, D hidden
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.cross_rotary import cross_rotary
from megajax.ops.attention import AttentionMask
from megajax.parallel.sharding import constrain, residual_stream_of
from megajax.spec import Builder
from megajax.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megajax.transformer.layer import BiasDropoutAdd

Array = jax.Array


class NeighborsAttended(NamedTuple):
    """What attention gives, and what it is added to, [F, R, D] each."""

    output: Array
    residual: Array


class RetroEncoderCrossAttention(nn.Module):
    """Attention of each neighbour x [F, R, D] to its chunk [C, M, D].

    Megatron: `core/models/retro/encoder_attention.py`, whose neighbours leave it in another order. Here they keep
    theirs, and so does their mask.

    Attributes:
      attention_dropout: the decoder's, which counts here and not in the encoder's attention to itself.
    """

    config: RetroConfig
    submodules: CrossAttentionSubmodules
    attention_dropout: float

    @nn.compact
    def __call__(
        self,
        x_FRD: Array,
        chunks_CMD: Array,
        *,
        mask: AttentionMask,
        decode: bool = False,
        deterministic: bool = True,
    ) -> NeighborsAttended:
        assert not decode, "an encoder reads its chunk as a whole"
        config = self.config.replace(attention_dropout=self.attention_dropout)
        attention = CrossAttention(config, self.submodules, name="attn")
        # The neighbours of a chunk are so many more queries.
        x_CTD = constrain(x_FRD, "batch", "seq", "act_embed").reshape(chunks_CMD.shape[0], -1, x_FRD.shape[-1])
        T, R = x_CTD.shape[1], x_FRD.shape[1]
        with residual_stream_of(T, whole=True):
            rotary = cross_rotary(config, jnp.arange(chunks_CMD.shape[1])[None], T // R, R)
            turns = None if rotary is None else (rotary.neighbors, rotary.text)
            y_CTD = attention(x_CTD, chunks_CMD, mask=mask, rotary=turns, deterministic=deterministic)
        return NeighborsAttended(y_CTD.reshape(x_FRD.shape), residual=x_FRD)


class RetroEncoderBiasDropoutAdd(nn.Module):
    """Adds to the norm's output, not to its input as other layers do (`residual_FRD`): so it is in Megatron."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, attended: NeighborsAttended, residual_FRD: Array, *, deterministic: bool = True) -> Array:
        residual = attended.residual.astype(residual_FRD.dtype)
        return BiasDropoutAdd(self.config, name="bda")(attended.output, residual, deterministic=deterministic)


class RetroEncoderLayerNorm(nn.Module):
    """A norm of each neighbour. Its parameters are those of `norm`, one name further down, as in Megatron."""

    config: TransformerConfig
    norm: Builder

    @nn.compact
    def __call__(self, x_FRD: Array) -> Array:
        return self.norm(config=self.config, name="norm")(x_FRD)
