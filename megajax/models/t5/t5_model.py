"""T5Model: an encoder that reads a text, and a decoder that writes another one."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S decoder sequence, T encoder sequence, D hidden, V vocabulary
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.models.common.arguments import with_arguments
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.common.embeddings.positions import rotary_embedding
from megajax.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megajax.models.common.language_module.language_module import (
    OutputLayer,
    language_model_logits,
    language_model_loss,
    language_model_loss_sum,
)
from megajax.models.t5.t5_config import T5Config
from megajax.models.t5.t5_layer_specs import get_t5_decoder_spec, get_t5_encoder_spec
from megajax.ops.attention import AttentionMask
from megajax.ops.cross_entropy import FusedLoss
from megajax.ops.rope import Rotary
from megajax.parallel.sharding import constrain
from megajax.spec import Builder
from megajax.transformer.block import LayerInputs, StackRows, TransformerBlock
from megajax.transformer.cache import empty

Array = jax.Array
Spec = Builder | tuple[Builder, ...]


class Stream(NamedTuple):
    """What goes from stage to stage of a pipeline: the text [B, T, D] through the encoder and, as the encoder leaves
    it, to every layer of the decoder; what is written [B, S, D] past the encoder."""

    text: Array
    written: Array


class T5Model(nn.Module):
    """An encoder and a decoder with one embedding. Megatron: `core/models/T5/t5_model.py`.

    Attributes:
      config: architecture, a `T5Config` or a plain `TransformerConfig`. The fields below the specs that have the name
        of an option replace it, where given.
      transformer_encoder_layer_spec, transformer_decoder_layer_spec: builder of one layer, used for all of a stack; or
        a tuple with one for each. None is `get_t5_encoder_spec(config, backend)`, and that of the decoder.
      backend: supplies the final norms.

    Example:
      >>> config = T5Config(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)
      >>> model = T5Model(config)
      >>> variables = model.init(jax.random.key(0), text, written)
      >>> logits = model.apply(variables, text, written, encoder_mask=text != 0)
    """

    config: TransformerConfig
    transformer_encoder_layer_spec: Spec | None = None
    transformer_decoder_layer_spec: Spec | None = None
    vocab_size: int | None = None
    max_sequence_length: int | None = None
    position_embedding_type: str | None = None
    rotary_percent: float | None = None
    seq_len_interpolation_factor: float | None = None
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int | None = None
    share_embeddings_and_output_weights: bool | None = None
    encoder_num_layers: int | None = None
    add_decoder: bool | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @property
    def resolved_config(self) -> T5Config:
        """`config` with this model's own arguments put in."""
        return with_arguments(self.config, T5Config, self)

    @property
    def encoder_layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer of the encoder."""
        cfg = self.resolved_config.encoder_config
        spec = self.transformer_encoder_layer_spec or get_t5_encoder_spec(cfg, self.backend)
        return spec if isinstance(spec, tuple) else (spec,) * cfg.num_layers

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer of the decoder."""
        cfg = self.resolved_config
        spec = self.transformer_decoder_layer_spec or get_t5_decoder_spec(cfg, self.backend)
        return spec if isinstance(spec, tuple) else (spec,) * cfg.num_layers

    def setup(self) -> None:
        cfg = self.resolved_config
        norm = self.backend.layer_norm(cfg)
        self.embedding = LanguageModelEmbedding(cfg)
        self.rotary_pos_emb = rotary_embedding(cfg)
        self.encoder = TransformerBlock(cfg.encoder_config, self.encoder_layer_specs, norm)
        relative = cfg.position_embedding_type == "relative"
        if relative:
            self.encoder_relative_pos_emb = self._relative(cfg, bidirectional=True)
        if not cfg.add_decoder:
            return
        self.decoder = TransformerBlock(cfg, self.layer_specs, norm)
        if relative:
            self.decoder_relative_pos_emb = self._relative(cfg, bidirectional=False)
        tied = cfg.share_embeddings_and_output_weights
        self.output_layer = OutputLayer(cfg, use_kernel=not tied, use_bias=bool(cfg.output_layer_bias))

    @staticmethod
    def _relative(cfg: T5Config, *, bidirectional: bool) -> RelativePositionEmbedding:
        return RelativePositionEmbedding(
            bidirectional=bidirectional,
            num_attention_heads=cfg.num_attention_heads,
            relative_attention_num_buckets=cfg.relative_attention_num_buckets,
            relative_attention_max_distance=cfg.relative_attention_max_distance,
            init_method_std=cfg.init_method_std,
            params_dtype=cfg.params_dtype,
        )

    def __call__(
        self,
        encoder_input: Array,
        decoder_input: Array | None = None,
        *,
        encoder_mask: Array | None = None,
        decoder_mask: Array | None = None,
        encoder_hidden_states: Array | None = None,
        labels: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Logits fp32 [B, S, V]; with labels the loss of each token instead, fp32 [B, S], unreduced as in Megatron.

        Without a decoder, or without `decoder_input`, the encoder's output [B, T, D].

        Args:
          encoder_input: int [B, T], the text to read.
          decoder_input: int [B, S], what is written, one token behind the labels.
          encoder_mask: [B, T], True (or 1) = attend; default: all. Hidden tokens are not seen by any other.
          decoder_mask: [B, S], likewise, on top of causality.
          encoder_hidden_states: the encoder's output where it is known already.
          labels: int [B, S]. -1, -100 and other ids outside the vocabulary are not ignored: mask.
          deterministic: False draws dropout from the "dropout" rng.
        """
        if encoder_hidden_states is None:
            encoder_hidden_states = self.encode(encoder_input, encoder_mask=encoder_mask, deterministic=deterministic)
        cfg = self.resolved_config
        if decoder_input is None or not cfg.add_decoder:
            return encoder_hidden_states
        hidden_BSD = self.decode(
            decoder_input,
            encoder_hidden_states,
            encoder_mask=encoder_mask,
            decoder_mask=decoder_mask,
            deterministic=deterministic,
        )
        logits = language_model_logits(hidden_BSD, self.output_weight(), cfg, self._bias())
        return logits if labels is None else language_model_loss(logits, labels, cfg)

    def encode(self, encoder_input: Array, *, encoder_mask: Array | None = None, deterministic: bool = True) -> Array:
        """The encoder's output [B, T, D]. Arguments as for `__call__`."""
        x_BTD = self._embed(encoder_input, deterministic)
        return self.encoder(x_BTD, self._encoder_inputs(x_BTD, encoder_mask), deterministic=deterministic)

    def _encoder_inputs(self, x_BTD: Array, encoder_mask: Array | None) -> LayerInputs:
        T = x_BTD.shape[1]
        bias = self.encoder_relative_pos_emb(T, T) if self._is_relative else None
        return LayerInputs(AttentionMask(keep=_keys(encoder_mask), bias=bias), self._rotary(T))

    def decode(
        self,
        decoder_input: Array,
        encoder_hidden_states: Array | None,
        *,
        encoder_mask: Array | None = None,
        decoder_mask: Array | None = None,
        cache_position: Array | int | None = None,
        deterministic: bool = True,
    ) -> Array:
        """What the output layer reads, [B, S, D]. Arguments as for `__call__`.

        cache_position: index of decoder_input[:, 0] in a "cache" collection, which supplies what was written before,
        and, without `encoder_hidden_states`, the text.
        """
        x_BSD = self._embed(decoder_input, deterministic, 0 if cache_position is None else cache_position)
        inputs = self._decoder_inputs(x_BSD, encoder_hidden_states, encoder_mask, decoder_mask, cache_position)
        decode = cache_position is not None
        return self._scaled(self.decoder(x_BSD, inputs, decode=decode, deterministic=deterministic))

    def _decoder_inputs(
        self,
        x_BSD: Array,
        context_BTD: Array | None,
        encoder_mask: Array | None,
        decoder_mask: Array | None,
        cache_position: Array | int | None = None,
    ) -> LayerInputs:
        S, first = x_BSD.shape[1], 0 if cache_position is None else cache_position
        keys = S if cache_position is None else self._cached_positions(S)
        bias = self.decoder_relative_pos_emb(S, keys, first) if self._is_relative else None
        mask = AttentionMask(causal=True, keep=_keys(decoder_mask), bias=bias, offset=cache_position)
        if context_BTD is not None:
            # Gathered once from sequence parallelism, for the keys and values of all layers.
            context_BTD = constrain(context_BTD, "batch", "seq", "act_embed")
        return LayerInputs(mask, self._rotary(S, first), context_BTD, AttentionMask(keep=_keys(encoder_mask)))

    def _cached_positions(self, written: int) -> int:
        """Of what is written, those that the cache has room for: the length of an array that is nothing but long."""
        if self.is_initializing():
            self.put_variable("cache", "positions", empty((written,), jnp.int8, None))
            return written
        return self.get_variable("cache", "positions").shape[0]

    def _scaled(self, hidden_BSD: Array) -> Array:
        cfg = self.resolved_config
        return hidden_BSD * cfg.hidden_size**-0.5 if cfg.scale_decoder_outputs else hidden_BSD

    def loss_sum(
        self, encoder_input: Array, decoder_input: Array, labels: Array, weights: Array, *,
        encoder_mask: Array | None = None, decoder_mask: Array | None = None, deterministic: bool = True,
    ) -> FusedLoss:  # fmt: skip
        """`sum(weights * loss of each token)` for training: as `__call__(labels=...)`, in less memory.

        labels int [B, S], weights fp32 [B, S]; other arguments as for `__call__`.
        """
        cfg = self.resolved_config
        if not cfg.add_decoder:
            raise ConfigError("add_decoder=False leaves nothing to train; drop it")
        given: dict[str, Any] = {"encoder_mask": encoder_mask, "deterministic": deterministic}
        context_BTD = self.encode(encoder_input, **given)
        hidden_BSD = self.decode(decoder_input, context_BTD, decoder_mask=decoder_mask, **given)
        return self._loss_sum(hidden_BSD, labels, weights)

    def _loss_sum(self, hidden_BSD: Array, labels: Array, weights: Array) -> FusedLoss:
        cfg = self.resolved_config
        return language_model_loss_sum(hidden_BSD, self.output_weight(), labels, weights, cfg, self._bias())

    # Generation calls the model in these ways; see `megajax.inference.generate`.

    @nn.nowrap
    def prompt_slots(self, prompt: Mapping[str, Array]) -> int:
        """Positions of the decoder's cache that are taken once the text is read: what is written begins there."""
        return prompt["decoder_input"].shape[1]

    def reserve(self, prompt: Mapping[str, Array], length: int) -> Array:
        """For `init`, which makes a cache of `length` positions of what is written, and one of the text."""
        written = jnp.zeros((prompt["decoder_input"].shape[0], length), jnp.int32)
        return self.read({**prompt, "decoder_input": written})

    def read(self, prompt: Mapping[str, Array]) -> Array:
        """Logits fp32 [B, V] after a text, "encoder_input" int [B, T], of which "encoder_mask" [B, T] says what there
        is, and the beginning of what is written, "decoder_input" int [B, S]. The encoder runs here alone.
        """
        context_BTD = self.encode(prompt["encoder_input"], encoder_mask=prompt["encoder_mask"])
        given = prompt["encoder_mask"].astype(bool)
        kept = empty(given.shape, bool, "batch", None) if self.is_initializing() else given
        self.put_variable("cache", "encoder_mask", kept)
        return self._last_logits(
            self.decode(prompt["decoder_input"], context_BTD, encoder_mask=given, cache_position=0)
        )

    def read_on(self, token_B: Array, position: Array) -> Array:
        """Logits fp32 [B, V] after one token more, which is the cache's at `position`."""
        given = self.get_variable("cache", "encoder_mask")
        return self._last_logits(self.decode(token_B[:, None], None, encoder_mask=given, cache_position=position))

    def _last_logits(self, hidden_BSD: Array) -> Array:
        cfg = self.resolved_config
        return language_model_logits(hidden_BSD[:, -1:], self.output_weight(), cfg, self._bias())[:, -1]

    # A pipeline calls the model in four pieces, each with its own part of the parameters. The encoder's final norm is
    # the decoder's to run: what goes from stage to stage is the residual stream before it.

    def embed(self, encoder_input: Array, decoder_input: Array, *, deterministic: bool) -> Stream:
        """Both texts before the first layers."""
        return Stream(self._embed(encoder_input, deterministic), self._embed(decoder_input, deterministic))

    def run_encoder(
        self, x: Stream, rows: Mapping[str, StackRows], *, encoder_mask: Array, deterministic: bool
    ) -> Stream:
        """The text through the layers that the parameters hold, which `rows` names."""
        inputs = self._encoder_inputs(x.text, encoder_mask)
        return x._replace(text=self.encoder(x.text, inputs, deterministic=deterministic, rows=rows, final_norm=False))

    def run_decoder(
        self, x: Stream, rows: Mapping[str, StackRows], *,
        encoder_mask: Array, decoder_mask: Array, deterministic: bool,
    ) -> Stream:  # fmt: skip
        """What is written through the layers that the parameters hold, which `rows` names."""
        context_BTD = self.encoder(x.text, LayerInputs(AttentionMask()), rows={})  # its final norm alone
        inputs = self._decoder_inputs(x.written, context_BTD, encoder_mask, decoder_mask)
        written = self.decoder(x.written, inputs, deterministic=deterministic, rows=rows, final_norm=False)
        return x._replace(written=written)

    def loss_sum_of_stream(self, x: Stream, labels: Array, weights: Array) -> FusedLoss:
        """`loss_sum` after the last layer."""
        hidden_BSD = self.decoder(x.written, LayerInputs(AttentionMask()), rows={})
        return self._loss_sum(self._scaled(hidden_BSD), labels, weights)

    @property
    def _is_relative(self) -> bool:
        return self.resolved_config.position_embedding_type == "relative"

    def _embed(self, tokens: Array, deterministic: bool, first: Array | int = 0) -> Array:
        return self.embedding(tokens, _positions(tokens.shape[1]) + first, deterministic=deterministic)

    def _rotary(self, length: int, first: Array | int = 0) -> Rotary | None:
        return None if self.rotary_pos_emb is None else self.rotary_pos_emb.rotary(_positions(length) + first)

    def _bias(self) -> Array | None:
        return self.output_layer.bias if self.resolved_config.output_layer_bias else None

    def output_weight(self) -> Array:
        """The matrix from hidden states to logits, [D, padded vocabulary]."""
        if self.resolved_config.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.embedding.T
        return self.output_layer()


def _positions(length: int) -> Array:
    return jnp.arange(length)[None, :]


def _keys(mask: Array | None) -> Array | None:
    """A mask of tokens as one of keys, [B, 1, 1, T]."""
    return None if mask is None else mask.astype(bool)[:, None, None, :]
