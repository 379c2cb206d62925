"""Chunked cross-attention: how the decoder reads the neighbours of the chunk before."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, L chunks of a sequence, C = B L chunks, M tokens of a chunk, F = C K neighbours, R tokens of
# each, T = K R tokens of all neighbours of a chunk, D hidden
import dataclasses
from functools import partial

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
from megajax.transformer.cache import empty, read, write
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
        self,
        x_BSD: Array,
        neighbors_FRD: Array | None,
        *,
        mask: AttentionMask,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array | WithContext:
        """mask: which tokens of the neighbours there are; `keep` bool [F, 1, 1, R].

        With `decode`, x is what follows `mask.offset` tokens: a prompt, of offset 0, or one token. Chunks are counted
        from the start of the text, and the neighbours are those of the chunks that x completes; None where it completes
        none. The "cache" collection has what later tokens read: keys and values of the neighbours of the last complete
        chunk, and, for the encoder, the tokens of the chunk behind it.
        """
        x_BSD = constrain(x_BSD, "batch", "seq", "act_embed")
        if decode:
            return self._decode(x_BSD, neighbors_FRD, mask, deterministic)
        assert neighbors_FRD is not None
        B, S, D = x_BSD.shape
        length = self.config.retro_chunk_length
        if self.encoder_block_spec is not None:
            neighbors_FRD = self._encoded(neighbors_FRD, chunks(x_BSD, length), mask, deterministic)
        x_CMD = readers(x_BSD, length)
        neighbors_CTD = neighbors_FRD.reshape(x_CMD.shape[0], -1, D)
        if mask.keep is not None:
            mask = dataclasses.replace(mask, keep=mask.keep.reshape(x_CMD.shape[0], 1, 1, -1))
        attention = self._attention()
        R = neighbors_FRD.shape[1]
        rotary = cross_rotary(self.config, places_of_readers(B, S, length), neighbors_CTD.shape[1] // R, R)
        with residual_stream_of(length, whole=True):
            y_CMD = attention(x_CMD, neighbors_CTD, mask=mask, rotary=rotary, deterministic=deterministic)
        y_BSD = constrain(in_sequence(y_CMD, B, S), "batch", "residual_seq", "act_embed")
        return y_BSD if self.encoder_block_spec is None else WithContext(y_BSD, neighbors_FRD)

    def _attention(self) -> CrossAttention:
        return CrossAttention(self.config, self.submodules, name="attn")

    def _decode(
        self, x_BSD: Array, neighbors_FRD: Array | None, mask: AttentionMask, deterministic: bool
    ) -> Array | WithContext:
        start, encodes = mask.start, self.encoder_block_spec is not None
        if encodes:
            chunks_CMD = self._completed(x_BSD, start)
            if neighbors_FRD is not None:
                neighbors_FRD = self._encoded(neighbors_FRD, chunks_CMD, AttentionMask(), deterministic)
        if isinstance(start, int):
            y_BSD = self._read_prompt(x_BSD, neighbors_FRD, deterministic)
        else:
            y_BSD = self._read_on(x_BSD, neighbors_FRD, start, deterministic)
        return WithContext(y_BSD, neighbors_FRD) if encodes and neighbors_FRD is not None else y_BSD

    def _completed(self, x_BSD: Array, start: Array | int) -> Array:
        """The chunks that x completes [C, M, D], if it does; what is behind them waits in the cache."""
        B, S, D = x_BSD.shape
        M = self.config.retro_chunk_length
        waiting = self.variable("cache", "chunk", lambda: empty((B, M, D), x_BSD.dtype, "batch", None, None))
        if not isinstance(start, int):
            waiting.value = write(waiting.value, x_BSD, (0, start % M, 0))
            return read(waiting.value)
        whole = S - S % M
        if not self.is_initializing() and whole < S:
            waiting.value = write(waiting.value, x_BSD[:, whole:], (0, 0, 0))
        return x_BSD[:, :whole].reshape(-1, M, D)

    def _read_prompt(self, x_BSD: Array, neighbors_FRD: Array | None, deterministic: bool) -> Array:
        """What a prompt reads of the neighbours [B L K, R, D] of its L complete chunks."""
        B, S, D = x_BSD.shape
        M = self.config.retro_chunk_length
        if neighbors_FRD is None:
            return jnp.zeros_like(x_BSD)
        L, R = S // M, neighbors_FRD.shape[1]
        x_BLMD = jnp.pad(x_BSD[:, M - 1 :], ((0, 0), (0, (L + 1) * M - 1 - S), (0, 0))).reshape(B, L, M, D)
        neighbors_BLTD = neighbors_FRD.reshape(B, L, -1, D)
        rotary = cross_rotary(self.config, jnp.arange(M - 1, 2 * M - 1)[None], neighbors_BLTD.shape[2] // R, R)
        attend = partial(self._attention(), mask=AttentionMask(), rotary=rotary, deterministic=deterministic)
        with residual_stream_of(M, whole=True):
            y_BLMD = attend(x_BLMD[:, -1], neighbors_BLTD[:, -1], decode=True)[:, None]  # what later tokens read, too
            if L > 1:
                before = (part[:, :-1].reshape(-1, *part.shape[2:]) for part in (x_BLMD, neighbors_BLTD))
                y_BLMD = jnp.concatenate([attend(*before).reshape(B, L - 1, M, D), y_BLMD], axis=1)
        y_BSD = jnp.pad(y_BLMD.reshape(B, -1, D), ((0, 0), (M - 1, 0), (0, 0)))[:, :S]
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

    def _read_on(self, x_BSD: Array, neighbors_FRD: Array | None, start: Array, deterministic: bool) -> Array:
        """What one token reads: of the neighbours [B K, R, D] of the chunk that it completes, or of those before."""
        B, S, D = x_BSD.shape
        assert S == 1, "a text goes on by one token"
        M, R = self.config.retro_chunk_length, self.config.retro_retrieved_length
        place = (M - 1 + (start + 1) % M).reshape(1, 1)
        rotary = cross_rotary(self.config, place, self.config.retro_num_neighbors, R)
        context_BTD = None if neighbors_FRD is None else neighbors_FRD.reshape(B, -1, D)
        with residual_stream_of(1, whole=True):
            y_BSD = self._attention()(
                x_BSD, context_BTD, mask=AttentionMask(), rotary=rotary, decode=True, deterministic=deterministic
            )
        return jnp.where(start < M - 1, 0, y_BSD)

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
