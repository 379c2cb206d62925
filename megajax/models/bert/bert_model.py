"""BertModel: embedding, encoder, and the heads it is pretrained with."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, V vocabulary
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import PositionEmbedding, TransformerConfig
from megajax.models.bert.bert_config import BertConfig
from megajax.models.bert.bert_heads import BertLMHead, Dense, Pooler
from megajax.models.bert.bert_layer_specs import get_bert_layer_spec
from megajax.models.common.arguments import with_arguments
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.common.embeddings.positions import rotary_embedding
from megajax.models.common.language_module.language_module import (
    OutputLayer,
    language_model_logits,
    language_model_loss,
    language_model_loss_sum,
)
from megajax.ops.attention import AttentionMask
from megajax.ops.cross_entropy import CrossEntropyOptions, FusedLoss, cross_entropy
from megajax.parallel.replicas import across
from megajax.spec import Builder
from megajax.transformer.block import LayerInputs, StackRows, TransformerBlock

Array = jax.Array


class BertOutput(NamedTuple):
    """lm: logits fp32 [B, S, V], the loss of each token fp32 [B, S], or without a head the states [B, S, D].

    binary: logits fp32 [B, 2], with a pooler alone its output [B, D], or None.
    """

    lm: Array
    binary: Array | None


class BertModel(nn.Module):
    """A bidirectional encoder. Megatron: `core/models/bert/bert_model.py`.

    Attributes:
      config: architecture, a `BertConfig` or a plain `TransformerConfig`. The fields below it that have the name of an
        option replace it, where given.
      transformer_layer_spec: builder of one layer, used for all of them; or a tuple with one for each layer. None is
        `get_bert_layer_spec(config, backend)`.
      backend: supplies the norms.

    Example:
      >>> config = BertConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)
      >>> model = BertModel(config, max_sequence_length=32)
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> logits, same_order = model.apply(variables, tokens, attention_mask=tokens != 0)
    """

    config: TransformerConfig
    transformer_layer_spec: Builder | tuple[Builder, ...] | None = None
    num_tokentypes: int | None = None
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    position_embedding_type: PositionEmbedding | None = None
    rotary_percent: float | None = None
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool | None = None
    add_binary_head: bool | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @property
    def resolved_config(self) -> BertConfig:
        """`config` with this model's own arguments put in."""
        return with_arguments(self.config, BertConfig, self)

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer."""
        spec = self.transformer_layer_spec
        if spec is None:
            spec = get_bert_layer_spec(self.resolved_config, self.backend)
        return spec if isinstance(spec, tuple) else (spec,) * self.config.num_layers

    def setup(self) -> None:
        cfg = self.resolved_config
        norm = self.backend.layer_norm(cfg)
        self.embedding = LanguageModelEmbedding(cfg, cfg.num_tokentypes)
        self.rotary_pos_emb = rotary_embedding(cfg)
        self.encoder = TransformerBlock(cfg, self.layer_specs, norm)
        if cfg.add_lm_head:
            if cfg.transform_lm_head:
                self.lm_head = BertLMHead(cfg, norm)
            tied = cfg.share_embeddings_and_output_weights
            self.output_layer = OutputLayer(cfg, use_kernel=not tied, use_bias=cfg.output_layer_bias)
        if cfg.add_pooler:
            self.pooler = Pooler(cfg)
        if cfg.add_binary_head:
            self.binary_head = Dense(cfg, 2)

    def __call__(
        self,
        tokens: Array,
        *,
        attention_mask: Array | None = None,
        tokentype_ids: Array | None = None,
        position_ids: Array | None = None,
        labels: Array | None = None,
        deterministic: bool = True,
    ) -> BertOutput:
        """Logits, or with labels the loss of each token, unreduced as in Megatron; and the logits of the binary head.

        Args:
          tokens: int [B, S].
          attention_mask: [B, S], True (or 1) = attend; default: all. Tokens that it hides see those that it does not.
          tokentype_ids: int [B, S]; default: all of type 0.
          position_ids: int [B, S]; default: 0, 1, ...
          labels: int [B, S], what stands behind the masks. -1, -100 and other ids outside the vocabulary are not
            ignored: mask.
          deterministic: False draws dropout from the "dropout" rng.
        """
        cfg = self.resolved_config
        hidden_BSD = self.hidden_states(
            tokens,
            attention_mask=attention_mask,
            tokentype_ids=tokentype_ids,
            position_ids=position_ids,
            deterministic=deterministic,
        )
        binary = self._binary(hidden_BSD)
        if not cfg.add_lm_head:
            return BertOutput(hidden_BSD, binary)
        logits = language_model_logits(self._transformed(hidden_BSD), self.output_weight(), cfg, self._bias())
        return BertOutput(logits if labels is None else language_model_loss(logits, labels, cfg), binary)

    def hidden_states(
        self,
        tokens: Array,
        *,
        attention_mask: Array | None = None,
        tokentype_ids: Array | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """The encoder's output [B, S, D]. Arguments as for `__call__`."""
        if position_ids is None:
            position_ids = jnp.arange(tokens.shape[1])[None, :]
        x_BSD = self.embed(tokens, position_ids, tokentype_ids, deterministic=deterministic)
        return self.encoder(x_BSD, self.layer_inputs(position_ids, attention_mask), deterministic=deterministic)

    def layer_inputs(self, position_ids: Array, attention_mask: Array | None = None) -> LayerInputs:
        """What every layer needs beside the residual stream. Arguments as for `__call__`."""
        keep = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        rotary = None if self.rotary_pos_emb is None else self.rotary_pos_emb.rotary(position_ids)
        return LayerInputs(AttentionMask(keep=keep), rotary)

    def embed_texts(self, tokens: Array, *, attention_mask: Array, **inputs: Any) -> Array:
        """The mean state of each text's tokens, fp32 [B, D], its first and its last (CLS and SEP) left out.

        Arguments as for `hidden_states`. Megatron: `return_embeddings`.
        """
        hidden_BSD = self.hidden_states(tokens, attention_mask=attention_mask, **inputs).astype(jnp.float32)
        index, length = jnp.arange(tokens.shape[1]), jnp.sum(attention_mask.astype(jnp.int32), axis=1, keepdims=True)
        inner_BS = ((index >= 1) & (index < length - 1)).astype(jnp.float32)
        return jnp.einsum("BSD,BS->BD", hidden_BSD, inner_BS) / jnp.sum(inner_BS, axis=1, keepdims=True)

    def loss_sum(
        self, tokens: Array, labels: Array, weights: Array, *, is_random: Array | None = None, **inputs: Any
    ) -> FusedLoss:
        """`sum(weights * loss of each token)`, plus the sum of weights times the mean loss of the binary head.

        Args:
          labels: int [B, S]. weights: fp32 [B, S].
          is_random: int [B], the class that the binary head has to find, -1 for none; it needs the head. inputs: as for
            `hidden_states`.
        """
        return self._loss_sum(self.hidden_states(tokens, **inputs), labels, weights, is_random)

    def _loss_sum(self, hidden_BSD: Array, labels: Array, weights: Array, is_random: Array | None) -> FusedLoss:
        cfg = self.resolved_config
        losses = language_model_loss_sum(
            self._transformed(hidden_BSD), self.output_weight(), labels, weights, cfg, self._bias()
        )
        if not cfg.add_binary_head or is_random is None:
            return losses
        logits_B2 = self._binary(hidden_BSD)
        assert logits_B2 is not None
        known_B = (is_random >= 0).astype(jnp.float32)
        loss_B = cross_entropy(logits_B2, is_random, CrossEntropyOptions(2)) * known_B
        total, known = across().samples(jnp.stack([jnp.sum(loss_B), jnp.sum(known_B)]))
        mean = total / jnp.maximum(known, 1.0)
        return losses._replace(weighted_sum=losses.weighted_sum + jnp.sum(weights) * mean)

    # A pipeline calls the model in three pieces, each with its own part of the parameters.

    def embed(self, tokens: Array, position_ids: Array, tokentype_ids: Array | None, *, deterministic: bool) -> Array:
        """The residual stream before the first layer, [B, S, D]."""
        return self.embedding(tokens, position_ids, tokentype_ids=tokentype_ids, deterministic=deterministic)

    def run_layers(
        self, x_BSD: Array, inputs: LayerInputs, rows: Mapping[str, StackRows], *, deterministic: bool
    ) -> Array:
        """x [B, S, D] through the layers that the parameters hold, which `rows` names."""
        return self.encoder(x_BSD, inputs, deterministic=deterministic, rows=rows, final_norm=False)

    def loss_sum_of_stream(
        self, x_BSD: Array, labels: Array, weights: Array, *, is_random: Array | None = None
    ) -> FusedLoss:
        """`loss_sum` from the residual stream after the last layer, [B, S, D]."""
        hidden_BSD = self.encoder(x_BSD, LayerInputs(AttentionMask()), rows={})
        return self._loss_sum(hidden_BSD, labels, weights, is_random)

    def _binary(self, hidden_BSD: Array) -> Array | None:
        cfg = self.resolved_config
        if not cfg.add_pooler:
            return None
        pooled_BD = self.pooler(hidden_BSD)
        return self.binary_head(pooled_BD).astype(jnp.float32) if cfg.add_binary_head else pooled_BD

    def _transformed(self, hidden_BSD: Array) -> Array:
        return self.lm_head(hidden_BSD) if self.resolved_config.transform_lm_head else hidden_BSD

    def _bias(self) -> Array | None:
        return self.output_layer.bias if self.resolved_config.output_layer_bias else None

    def output_weight(self) -> Array:
        """The matrix from states to logits, [D, padded vocabulary]."""
        if self.resolved_config.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.embedding.T
        return self.output_layer()
