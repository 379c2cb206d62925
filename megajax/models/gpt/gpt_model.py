"""GPTModel: embedding, decoder, output layer."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, T longest cached sequence, D hidden, V vocabulary
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import PositionEmbedding, TransformerConfig
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.common.embeddings.positions import packed_positions, rotary_embedding
from megajax.models.common.language_module.language_module import (
    OutputLayer,
    language_model_logits,
    language_model_loss,
    language_model_loss_sum,
)
from megajax.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megajax.ops.attach import attach
from megajax.ops.attention import AttentionMask
from megajax.ops.cross_entropy import FusedLoss
from megajax.parallel.one_stage import on_last_stage
from megajax.parallel.pipeline_pieces import stages_branch
from megajax.spec import Builder
from megajax.transformer.block import LayerInputs, StackRows, TransformerBlock
from megajax.transformer.multi_token_prediction import MultiTokenPredictionLayer, roll_left, rolled_weights

Array = jax.Array


class GPTModel(nn.Module):
    """A decoder-only language model. Megatron: `core/models/gpt/gpt_model.py`.

    Attributes:
      config: architecture. The fields below, where given, replace the config's fields of the same name.
      transformer_layer_spec: builder of one layer, used for all of them; or a tuple with one for each layer. None is
        `get_gpt_decoder_block_spec(config, backend)`.
      backend: supplies the final norm.

    Example:
      >>> config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
      >>> model = GPTModel(config, vocab_size=100, max_sequence_length=32)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> logits = model.apply(params, tokens)
    """

    config: TransformerConfig
    transformer_layer_spec: Builder | tuple[Builder, ...] | None = None
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    position_embedding_type: PositionEmbedding | None = None
    rotary_percent: float | None = None
    rotary_base: float | None = None
    rope_scaling: bool | None = None
    rope_scaling_factor: float | None = None
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @property
    def resolved_config(self) -> TransformerConfig:
        """`config` with this model's own arguments put in."""
        options = {field.name for field in dataclasses.fields(self.config)}
        names = [field.name for field in dataclasses.fields(self) if field.name in options]
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.rope_scaling is not None:
            given["rope_scaling_type"] = "llama3" if self.rope_scaling else "none"
        return self.config.replace(**given)

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer."""
        spec = self.transformer_layer_spec
        if spec is None:
            return get_gpt_decoder_block_spec(self.config, self.backend)
        return spec if isinstance(spec, tuple) else (spec,) * self.config.num_layers

    def setup(self) -> None:
        cfg = self.resolved_config
        self.embedding = LanguageModelEmbedding(cfg)
        self.rotary_pos_emb = rotary_embedding(cfg)
        self.decoder = TransformerBlock(cfg, self.layer_specs, self.backend.layer_norm(cfg))
        if not cfg.share_embeddings_and_output_weights:
            self.output_layer = OutputLayer(cfg)
        if cfg.mtp_num_layers:
            norm, linear = self.backend.layer_norm(cfg), self.backend.column_parallel_linear()
            self.mtp = [
                MultiTokenPredictionLayer(cfg, self.layer_specs[-1], norm, linear, depth)
                for depth in range(cfg.mtp_num_layers)
            ]

    def __call__(
        self,
        tokens: Array,
        *,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        attention_mask: Array | None = None,
        labels: Array | None = None,
        loss_mask: Array | None = None,
        cache_position: Array | int | None = None,
        materialize_only_last_token_logits: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """Logits fp32 [B, S, V]; with labels the loss of each token instead, fp32 [B, S], unreduced as in Megatron.

        The gradient of that loss has in it, as in Megatron, that of the losses which the value leaves out: those that
        balance experts, and those of multi-token prediction, as for a loss that is a mean.

        Args:
          tokens: int [B, S].
          position_ids: int [B, S]; default: 0, 1, ... in each row, or in each document when there are segment_ids. With
            multimodal positions ("mrope") int [3, B, S]: time, height, width; what is [B, S] counts for all three.
          segment_ids: int [B, S]: the document of each token of a packed row. Tokens see only their own document.
          attention_mask: bool, True = attend: [B, S] for the keys, or broadcastable to [B, 1, S, S]; on top of
            causality.
          labels: int [B, S], the next token of each. -100 and other ids outside the vocabulary are not ignored: mask.
          loss_mask: fp32 [B, S], which tokens count in the losses of multi-token prediction; default: all.
          cache_position: index of tokens[:, 0] in a "cache" collection, which then supplies the earlier keys and
            values; see `megajax.inference`.
          materialize_only_last_token_logits: logits [B, 1, V], all that a prompt's continuation needs.
          deterministic: False draws dropout from the "dropout" rng.
        """
        hidden_BSD = self.hidden_states(
            tokens,
            position_ids=position_ids,
            segment_ids=segment_ids,
            attention_mask=attention_mask,
            cache_position=cache_position,
            aux_weight=None if labels is None else jnp.float32(1),
            deterministic=deterministic,
        )
        cfg = self.resolved_config
        if materialize_only_last_token_logits:
            hidden_BSD = hidden_BSD[:, -1:]
        logits = language_model_logits(hidden_BSD, self.output_weight(), cfg)
        if labels is None and not (self.is_initializing() and cfg.mtp_num_layers):
            return logits
        labels = tokens if labels is None else labels
        losses = language_model_loss(logits, labels, cfg)
        if not cfg.mtp_num_layers:
            return losses
        position_ids = self.positions(tokens, position_ids, segment_ids, None)
        weights = jnp.ones(tokens.shape, jnp.float32) if loss_mask is None else loss_mask
        further = self.further_loss(
            hidden_BSD, tokens, labels, weights / weights.sum(), position_ids, segment_ids, attention_mask,
            deterministic=deterministic,
        )  # fmt: skip
        return attach(losses, further, jnp.float32(1))

    def loss_sum(self, tokens: Array, labels: Array, weights: Array, **inputs: Any) -> FusedLoss:
        """`sum(weights * loss of each token)` for training: equal to reducing `__call__(labels=...)`, in less memory.

        tokens, labels int [B, S], weights fp32 [B, S]; inputs as for `hidden_states`.
        """
        hidden_BSD = self.hidden_states(tokens, aux_weight=weights.sum(), **inputs)
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = self.positions(tokens, None, inputs.get("segment_ids"), None)
        return self._loss_sum(hidden_BSD, tokens, labels, weights, **inputs)

    def _loss_sum(self, hidden_BSD: Array, tokens: Array, labels: Array, weights: Array, **inputs: Any) -> FusedLoss:
        cfg = self.resolved_config
        losses = language_model_loss_sum(hidden_BSD, self.output_weight(), labels, weights, cfg)
        if not cfg.mtp_num_layers:
            return losses
        further = self.further_loss(hidden_BSD, tokens, labels, weights, **inputs)
        return losses._replace(weighted_sum=losses.weighted_sum + further)

    def further_loss(
        self,
        hidden_BSD: Array,
        tokens: Array,
        labels: Array,
        weights: Array,
        position_ids: Array,
        segment_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The weighted losses of multi-token prediction: each depth predicts one token further than the one before.

        hidden_BSD: what the output layer reads; other arguments as for `loss_sum`.
        """
        cfg, total = self.resolved_config, jnp.float32(0)
        given = self.layer_inputs(position_ids, segment_ids, attention_mask, None, weights.sum())
        inputs = {name: value for name, value in given._asdict().items() if value is not None}
        for layer in self.mtp:
            tokens, position_ids, labels = (roll_left(x, segment_ids) for x in (tokens, position_ids, labels))
            weights = rolled_weights(weights, segment_ids)
            embedded_BSD = self.embedding(tokens, position_ids, deterministic=deterministic)
            hidden_BSD = self._one_deeper(layer, hidden_BSD, embedded_BSD, inputs, deterministic=deterministic)
            losses = language_model_loss_sum(hidden_BSD, self.output_weight(), labels, weights, cfg)
            total += losses.weighted_sum
        return total * (cfg.mtp_loss_scaling_factor / len(self.mtp))

    def _one_deeper(
        self,
        layer: MultiTokenPredictionLayer,
        hidden_BSD: Array,
        embedded_BSD: Array,
        inputs: dict[str, Any],
        *,
        deterministic: bool,
    ) -> Array:
        """One layer of multi-token prediction; in a pipeline, of which all stages come here, it runs on one of them."""
        if self.is_initializing() or not stages_branch():
            return layer(hidden_BSD, embedded_BSD, inputs, deterministic=deterministic)
        alone, variables = layer.unbind()

        def run(variables: Any, hidden_BSD: Array, embedded_BSD: Array) -> Array:
            return alone.apply(variables, hidden_BSD, embedded_BSD, inputs, deterministic=deterministic)  # type: ignore[return-value]

        return on_last_stage(run, variables, hidden_BSD, embedded_BSD)

    def hidden_states(
        self,
        tokens: Array | None,
        *,
        decoder_input: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        attention_mask: Array | None = None,
        cache_position: Array | int | None = None,
        aux_weight: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """What the output layer reads, [B, S, D].

        decoder_input: embeddings [B, S, D] in place of those of `tokens`. aux_weight: scalar that the losses of routers
        are multiplied by; None leaves them out. Other arguments as for `__call__`.
        """
        sequence = decoder_input if tokens is None else tokens
        assert sequence is not None
        position_ids = self.positions(sequence, position_ids, segment_ids, cache_position)
        x_BSD = decoder_input
        if x_BSD is None:
            x_BSD = self.embedding(sequence, position_ids, deterministic=deterministic)
        inputs = self.layer_inputs(position_ids, segment_ids, attention_mask, cache_position, aux_weight)
        inputs = inputs._replace(context=self.layer_context(x_BSD))
        return self.decoder(x_BSD, inputs, decode=cache_position is not None, deterministic=deterministic)

    def layer_context(self, x_BSD: Array) -> Any:
        """What layers need of the embeddings [B, S, D] beside the residual stream. Nothing here."""
        del x_BSD

    @staticmethod
    def positions(
        tokens: Array, position_ids: Array | None, segment_ids: Array | None, cache_position: Array | int | None
    ) -> Array:
        """position_ids, or the default that `__call__` describes."""
        if position_ids is not None:
            return position_ids
        if segment_ids is not None:
            return packed_positions(segment_ids)
        return jnp.arange(tokens.shape[1])[None, :] + (0 if cache_position is None else cache_position)

    def layer_inputs(
        self,
        position_ids: Array,
        segment_ids: Array | None = None,
        attention_mask: Array | None = None,
        cache_position: Array | int | None = None,
        aux_weight: Array | None = None,
    ) -> LayerInputs:
        """What every layer needs beside the residual stream. Arguments as for `hidden_states`."""
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        mask = AttentionMask(
            causal=True,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            keep=None if attention_mask is None else attention_mask.astype(bool),
            offset=cache_position,
        )
        rotary = None if self.rotary_pos_emb is None else self.rotary_pos_emb.rotary(position_ids)
        return LayerInputs(mask, rotary, aux_weight=aux_weight)

    # Generation calls the model in these ways; see `megajax.inference.generate`.

    @nn.nowrap
    def prompt_slots(self, prompt: Mapping[str, Array]) -> int:
        """Positions of the cache that a prompt, "tokens" int [B, P], takes."""
        return prompt["tokens"].shape[1]

    def reserve(self, prompt: Mapping[str, Array], length: int) -> Array:
        """For `init`, which makes a cache of `length` positions."""
        return self(jnp.zeros((prompt["tokens"].shape[0], length), jnp.int32), cache_position=0)

    def read(self, prompt: Mapping[str, Array]) -> Array:
        """Logits fp32 [B, V] after prompts that an empty cache takes in."""
        return self(prompt["tokens"], cache_position=0, materialize_only_last_token_logits=True)[:, -1]

    def read_on(self, token_B: Array, position: Array) -> Array:
        """Logits fp32 [B, V] after one token more, which is the cache's at `position`."""
        return self(token_B[:, None], cache_position=position, materialize_only_last_token_logits=True)[:, -1]

    # A pipeline calls the model in three pieces, each with its own part of the parameters.

    def embed(self, tokens: Array, position_ids: Array, *, deterministic: bool) -> Array:
        """The residual stream before the first layer, [B, S, D]."""
        return self.embedding(tokens, position_ids, deterministic=deterministic)

    def run_layers(
        self, x_BSD: Array, inputs: LayerInputs, rows: Mapping[str, StackRows], *, deterministic: bool
    ) -> Array:
        """x [B, S, D] through the layers that the parameters hold, which `rows` names."""
        return self.decoder(x_BSD, inputs, deterministic=deterministic, rows=rows, final_norm=False)

    def loss_sum_of_stream(
        self, x_BSD: Array, tokens: Array, labels: Array, weights: Array, **inputs: Any
    ) -> FusedLoss:
        """`loss_sum` from the residual stream after the last layer, [B, S, D]."""
        return self._loss_sum(self.normed(x_BSD), tokens, labels, weights, **inputs)

    def normed(self, x_BSD: Array) -> Array:
        """What the output layer reads, [B, S, D], from the residual stream after the last layer."""
        return self.decoder(x_BSD, LayerInputs(AttentionMask()), rows={})

    def output_weight(self) -> Array:
        """The matrix from hidden states to logits, [D, padded vocabulary]."""
        if self.resolved_config.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.embedding.T
        return self.output_layer()
