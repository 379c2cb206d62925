"""RETROModel: a decoder that reads, chunk by chunk, what was found for the text before."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, L chunks of a sequence, K neighbours of a chunk, F = B L K neighbours, R tokens of each, D hidden
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.models.common.arguments import with_arguments
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.common.embeddings.positions import rotary_embedding
from megajax.models.common.language_module.language_module import (
    OutputLayer,
    language_model_logits,
    language_model_loss,
    language_model_loss_sum,
)
from megajax.models.retro.chunks import num_chunks
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.decoder_spec import get_retro_decoder_block_spec
from megajax.ops.attention import AttentionMask
from megajax.ops.cross_entropy import FusedLoss
from megajax.parallel.sharding import residual_stream_of
from megajax.spec import Builder
from megajax.transformer.block import LayerInputs, TransformerBlock

Array = jax.Array


class RETROModel(nn.Module):
    """A retrieval-enhanced decoder (arXiv:2112.04426). Megatron: `RetroModel` in `core/models/retro/model.py`.

    Attributes:
      config: architecture, a `RetroConfig` or a plain `TransformerConfig`. The fields below the specs that have the
        name of an option replace it, where given.
      transformer_layer_spec: a builder for each layer of the decoder; None is
        `get_retro_decoder_block_spec(config, backend)`.
      backend: supplies the final norm.

    Example:
      >>> config = RetroConfig(num_layers=6, hidden_size=64, num_attention_heads=4, retro_chunk_length=16)
      >>> model = RETROModel(config, vocab_size=100, max_sequence_length=64)
      >>> tokens, neighbors = jnp.zeros((1, 64), int), jnp.zeros((1, 4, 2, 32), int)
      >>> variables = model.init(jax.random.key(0), tokens, neighbors)
      >>> logits = model.apply(variables, tokens, neighbors)
    """

    config: TransformerConfig
    transformer_layer_spec: tuple[Builder, ...] | None = None
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    position_embedding_type: str | None = None
    rotary_percent: float | None = None
    rotary_base: float | None = None
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @property
    def resolved_config(self) -> RetroConfig:
        """`config` with this model's own arguments put in."""
        return with_arguments(self.config, RetroConfig, self)

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer of the decoder."""
        return self.transformer_layer_spec or get_retro_decoder_block_spec(self.resolved_config, self.backend)

    def setup(self) -> None:
        cfg = self.resolved_config
        self.embedding = LanguageModelEmbedding(cfg)
        self.rotary_pos_emb = rotary_embedding(cfg)
        norm = self.backend.layer_norm(cfg) if cfg.post_layer_norm else None
        self.decoder = TransformerBlock(cfg, self.layer_specs, norm)
        if not cfg.share_embeddings_and_output_weights:
            self.output_layer = OutputLayer(cfg)

    def __call__(
        self,
        tokens: Array,
        context_tokens: Array,
        *,
        position_ids: Array | None = None,
        context_position_ids: Array | None = None,
        attention_mask: Array | None = None,
        context_mask: Array | None = None,
        labels: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Logits fp32 [B, S, V]; with labels the loss of each token instead, fp32 [B, S], unreduced as in Megatron.

        A token sees the tokens before it, and the neighbours of the chunks that end with it or before it. Chunks are
        counted from the end of the sequence: where `retro_chunk_length` does not divide it, the first one is short.

        Args:
          tokens: int [B, S].
          context_tokens: int [B, L, K, R], the K neighbours of each chunk; or, as in Megatron, [B L K, R].
          position_ids: int [B, S]; default: 0, 1, ... in each row.
          context_position_ids: int, of the shape of context_tokens; default: 0, 1, ... in each neighbour.
          attention_mask: bool, True = attend: [B, S] for the keys, or broadcastable to [B, 1, S, S]; on top of
            causality, in the attention of the sequence to itself. The neighbours of a chunk still read all of it.
          context_mask: of the shape of context_tokens, True (or 1) = attend. Nothing sees hidden tokens. Megatron hides
            them in the encoder alone, from its second layer on those of other neighbours; its trainer gives no mask.
          labels: int [B, S], the next token of each. -100 and other ids outside the vocabulary are not ignored: mask.
          deterministic: False draws dropout from the "dropout" rng.

        Raises:
          ConfigError: the neighbours are not those of B L chunks.
        """
        hidden_BSD = self.hidden_states(
            tokens,
            context_tokens,
            position_ids=position_ids,
            context_position_ids=context_position_ids,
            attention_mask=attention_mask,
            context_mask=context_mask,
            deterministic=deterministic,
        )
        cfg = self.resolved_config
        logits = language_model_logits(hidden_BSD, self.output_weight(), cfg)
        return logits if labels is None else language_model_loss(logits, labels, cfg)

    def loss_sum(self, tokens: Array, context_tokens: Array, labels: Array, weights: Array, **inputs: Any) -> FusedLoss:
        """`sum(weights * loss of each token)` for training: as `__call__(labels=...)`, in less memory.

        labels int [B, S], weights fp32 [B, S]; other arguments as for `__call__`.
        """
        hidden_BSD = self.hidden_states(tokens, context_tokens, **inputs)
        return language_model_loss_sum(hidden_BSD, self.output_weight(), labels, weights, self.resolved_config)

    def hidden_states(
        self,
        tokens: Array,
        context_tokens: Array,
        *,
        position_ids: Array | None = None,
        context_position_ids: Array | None = None,
        attention_mask: Array | None = None,
        context_mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """What the output layer reads, [B, S, D]. Arguments as for `__call__`."""
        if position_ids is None:
            position_ids = jnp.arange(tokens.shape[1])[None, :]
        context_FR, context_position_ids, keep = self._context(
            tokens, context_tokens, context_position_ids, context_mask
        )
        x_BSD = self.embedding(tokens, position_ids, deterministic=deterministic)
        with residual_stream_of(context_FR.shape[1]):
            context_FRD = self.embedding(context_FR, context_position_ids, deterministic=deterministic)
        if attention_mask is not None:
            attention_mask = attention_mask.astype(bool)
            attention_mask = attention_mask[:, None, None, :] if attention_mask.ndim == 2 else attention_mask
        inputs = LayerInputs(
            AttentionMask(causal=True, keep=attention_mask),
            None if self.rotary_pos_emb is None else self.rotary_pos_emb.rotary(position_ids),
            context=context_FRD,
            context_mask=AttentionMask(keep=keep),
        )
        return self.decoder(x_BSD, inputs, deterministic=deterministic)

    # Generation calls the model in these ways; see `megajax.models.retro.retro_generate`.

    @nn.nowrap
    def prompt_slots(self, prompt: Mapping[str, Array]) -> int:
        """Positions of the cache that a prompt, "tokens" int [B, P], takes."""
        return prompt["tokens"].shape[1]

    def reserve(self, prompt: Mapping[str, Array], length: int) -> Array:
        """For `init`, which makes a cache of `length` positions, and at least of a chunk."""
        cfg, B = self.resolved_config, prompt["tokens"].shape[0]
        length = max(length, cfg.retro_chunk_length)
        neighbors = (B, length // cfg.retro_chunk_length, cfg.retro_num_neighbors, cfg.retro_retrieved_length)
        return self._next_logits(jnp.zeros((B, length), jnp.int32), jnp.zeros(neighbors, jnp.int32), 0)

    def read(self, prompt: Mapping[str, Array]) -> Array:
        """Logits fp32 [B, V] after prompts that an empty cache takes in: "tokens" int [B, P], and "context_tokens" int
        [B, L, K, R], the neighbours of their P // `retro_chunk_length` complete chunks.

        Chunks are counted from the start: what is written behind a text does not move them.
        """
        return self._next_logits(prompt["tokens"], prompt["context_tokens"], 0)

    def read_on(self, token_B: Array, position: Array, context_BKR: Array | None = None) -> Array:
        """Logits fp32 [B, V] after one token more, which is the cache's at `position`.

        context_BKR: the neighbours of the chunk, where the token is the last one of it.
        """
        context = None if context_BKR is None else context_BKR[:, None]
        return self._next_logits(token_B[:, None], context, position)

    def _next_logits(self, tokens: Array, context_BLKR: Array | None, position: Array | int) -> Array:
        """Logits after the last of these tokens [B, S], which are the cache's from `position` on."""
        position_ids = position + jnp.arange(tokens.shape[1])[None]
        x_BSD, context_FRD = self.embedding(tokens, position_ids), None
        if context_BLKR is not None and context_BLKR.shape[1]:
            R = context_BLKR.shape[-1]
            with residual_stream_of(R):
                context_FRD = self.embedding(context_BLKR.reshape(-1, R), jnp.arange(R)[None])
        inputs = LayerInputs(
            AttentionMask(causal=True, offset=position),
            None if self.rotary_pos_emb is None else self.rotary_pos_emb.rotary(position_ids),
            context=context_FRD,
            context_mask=AttentionMask(offset=position),
        )
        hidden_BSD = self.decoder(x_BSD, inputs, decode=True)
        return language_model_logits(hidden_BSD[:, -1:], self.output_weight(), self.resolved_config)[:, -1]

    def _context(
        self, tokens: Array, context_tokens: Array, position_ids: Array | None, mask: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Neighbours [F, R], their positions [F or 1, R], and which of their tokens there are, bool [F, 1, 1, R]."""
        B, S = tokens.shape
        length, R = self.resolved_config.retro_chunk_length, context_tokens.shape[-1]
        L = num_chunks(S, length)
        by_chunk = context_tokens.ndim == 4 and context_tokens.shape[:2] == (B, L)
        if not by_chunk and (context_tokens.ndim != 2 or context_tokens.shape[0] % (B * L)):
            raise ConfigError(
                f"context_tokens has shape {context_tokens.shape}; {B} sequences of {S} tokens have {L} chunks of"
                f" retro_chunk_length={length} each, so give ({B}, {L}, neighbours, tokens of each)"
            )
        position_ids = jnp.arange(R)[None, :] if position_ids is None else position_ids.reshape(-1, R)
        keep = None if mask is None else mask.astype(bool).reshape(-1, 1, 1, R)
        return context_tokens.reshape(-1, R), position_ids, keep

    def output_weight(self) -> Array:
        """The matrix from hidden states to logits, [D, padded vocabulary]."""
        if self.resolved_config.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.embedding.T
        return self.output_layer()
