"""LLaVAModel: a vision tower, a projection, and a language model that reads text with images in it."""

# SPDX-License-Identifier: Apache-2.0
# B batch, T tokens of the text, N tiles, C channels, H height, W width, S slots that the language model sees, P tokens
# of a tile, E features of the tower, D hidden, V vocabulary
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import ConfigError
from megajax.models.common.embeddings.positions import packed_positions
from megajax.models.common.language_module.language_module import (
    language_model_logits,
    language_model_loss,
    language_model_loss_sum,
)
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.mamba.mamba_model import MambaModel
from megajax.models.multimodal.llava_config import IMAGE_TOKEN, LanguageModelType, LLaVAConfig
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
from megajax.models.vision.multimodal_projector import get_projector_spec
from megajax.models.vision.radio import RADIOModel
from megajax.models.vision.radio_config import RADIOConfig
from megajax.ops.cross_entropy import FusedLoss
from megajax.ops.images import pixel_shuffle
from megajax.ops.multimodal import (
    IGNORE_INDEX,
    Merge,
    merge,
    merged_embeddings,
    merged_labels,
    merged_loss_mask,
    reordered,
)
from megajax.parallel.replicas import parts_apart
from megajax.parallel.sharding import constrain, residual_stream_of, whole_sequences
from megajax.parallel.token_order import sequence_order, tokens_here
from megajax.spec import Builder
from megajax.transformer.block import StackRows

__all__ = ["DEFAULT_IMAGE_TOKEN_INDEX", "IGNORE_INDEX", "IMAGE_TOKEN", "LLaVAModel", "LanguageModel"]

Array = jax.Array

DEFAULT_IMAGE_TOKEN_INDEX = -200

LANGUAGE_MODELS: Mapping[LanguageModelType, type[nn.Module]] = {"gpt": GPTModel, "mamba": MambaModel}


class LanguageModel(Protocol):
    """What reads embeddings of text with those of images in it: `GPTModel`, `MambaModel`, and who does as they do."""

    @property
    def embedding(self) -> Any:
        """A module with `word_embeddings`, called with ids."""
        ...

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer."""
        ...

    def embed(self, tokens: Array, position_ids: Array, *, deterministic: bool) -> Array:
        """Ids, int [B, T], to the residual stream before the first layer, [B, T, D]."""
        ...

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
        """The residual stream `decoder_input`, [B, S, D], to what the output layer reads, as `GPTModel` has it."""
        ...

    def output_weight(self) -> Array:
        """The matrix from hidden states to logits, [D, padded vocabulary]."""
        ...


class LLaVAModel(nn.Module):
    """A language model that sees (arXiv:2304.08485). Megatron: `core/models/multimodal/llava_model.py`.

    Attributes:
      language_model_spec: builder, called with `config` (the `language_config`) and `backend`, of any `LanguageModel`;
        None is what `language_model_type` says.
      vision_model_spec: builder, called with `config` and `backend`, of a tower that is called as
        `CLIPVisionTransformer`; None is what `vision_model_type` says.
      backend: supplies layers.

    Example:
      >>> logits = model.apply(variables, images, tokens)  # [B, S, V]
    """

    config: LLaVAConfig
    language_model_spec: Builder | None = None
    vision_model_spec: Builder | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @nn.nowrap
    def build_tower(self) -> Any:
        """The vision tower, without parameters."""
        tower = self.config.vision_config
        by_type: Any = RADIOModel if isinstance(tower, RADIOConfig) else CLIPVisionTransformer
        return (self.vision_model_spec or by_type)(config=tower, backend=self.backend)

    @nn.nowrap
    def build_language_model(self) -> LanguageModel:
        """The language model, without parameters."""
        by_type: Any = LANGUAGE_MODELS[self.config.language_model_type]
        return (self.language_model_spec or by_type)(config=self.config.language_config, backend=self.backend)

    def setup(self) -> None:
        cfg = self.config
        self.vision_model = self.build_tower()
        has_norm = cfg.projection_normalization != "none"
        norm = self.backend.layer_norm(cfg.projection_config) if has_norm else None
        projection = get_projector_spec(self.backend, norm)
        self.vision_projection = projection(config=cfg.projection_config, projector_type=cfg.vision_projection_type)
        self.language_model = self.build_language_model()

    def __call__(
        self,
        images: Array | None,
        tokens: Array,
        *,
        position_ids: Array | None = None,
        attention_mask: Array | None = None,
        segment_ids: Array | None = None,
        labels: Array | None = None,
        loss_mask: Array | None = None,
        num_image_tiles: Array | None = None,
        sequence_length: int | None = None,
        cache_position: Array | int | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Logits fp32 [B, S, V]; with labels (loss of each slot fp32 [B, S], its loss mask fp32 [B, S]).

        The text says with `image_token_index` where images go, in their order. S is the longest sample, images put in,
        and no longer than `max_sequence_length`.

        Args:
          images: [N, C, H, W], the tiles of all images of the batch, in the order of the text; or [B, N, C, H, W],
            those of each sample, filled up with any; or None.
          tokens: int [B, T].
          position_ids: int [B, T], for learned positions, where an image counts as one.
          attention_mask: bool, True = attend, on top of causality: [B, T], or broadcastable to [B, 1, S, S].
          segment_ids: int [B, T]: the document of each token of a packed row.
          labels: int [B, T], the next token of each. Slots that have none get -100 and a loss that means nothing.
          loss_mask: fp32 [B, T], default: all of the text.
          num_image_tiles: int, tiles of each image, in the order of the text: [number of images], or [B, images of a
            sample]; default: one each.
          sequence_length: S. Needed in a program that is traced with `tokens`, if `max_sequence_length` is not meant.
          cache_position: index of slot 0 in a "cache" collection; see `megajax.inference`.
          deterministic: False draws dropout from the "dropout" rng.
        """
        if labels is not None and loss_mask is None:
            loss_mask = jnp.ones(tokens.shape, jnp.float32)
        slots, x_BSD, inputs = self._merged(
            images, tokens, num_image_tiles, sequence_length, position_ids, attention_mask, segment_ids, deterministic
        )
        aux_weight = None if labels is None else jnp.float32(1)
        hidden_BSD = self.language_model.hidden_states(
            None, decoder_input=x_BSD, cache_position=cache_position, aux_weight=aux_weight, **inputs
        )
        order = sequence_order(hidden_BSD.shape[1])
        hidden_BSD = hidden_BSD if order is None else hidden_BSD[:, np.argsort(order)]
        cfg = self.config.language_config
        logits = language_model_logits(hidden_BSD, self.language_model.output_weight(), cfg)
        if labels is None:
            return logits
        assert loss_mask is not None
        return language_model_loss(logits, self._labels(slots, labels), cfg), self._loss_mask(slots, loss_mask)

    def loss_sum(
        self,
        images: Array,
        tokens: Array,
        labels: Array,
        weights: Array,
        *,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        num_image_tiles: Array | None = None,
        deterministic: bool = True,
    ) -> FusedLoss:
        """`sum(weights * loss of each slot)` for training, in less memory than `__call__`.

        weights: fp32 [B, S], of every slot; those that cannot predict count nothing, whatever their weight. Other
        arguments as for `__call__`.
        """
        slots, x_BSD, inputs = self._merged(
            images, tokens, num_image_tiles, _whole(weights.shape[1]), position_ids, None, segment_ids, deterministic
        )
        weights = self._weights(slots, tokens, weights)
        hidden_BSD = self.language_model.hidden_states(None, decoder_input=x_BSD, aux_weight=weights.sum(), **inputs)
        return self._loss_sum(hidden_BSD, slots, labels, weights)

    def _weights(self, slots: Merge, tokens: Array, weights: Array) -> Array:
        return weights * _in_order(self._loss_mask(slots, jnp.ones(tokens.shape, jnp.float32)))

    def _loss_sum(self, hidden_BSD: Array, slots: Merge, labels: Array, weights: Array) -> FusedLoss:
        cfg = self.config.language_config
        return language_model_loss_sum(
            hidden_BSD, self.language_model.output_weight(), _in_order(self._labels(slots, labels)), weights, cfg
        )

    # Generation calls the model in these ways; see `megajax.inference.generate`.

    @nn.nowrap
    def prompt_slots(self, prompt: Mapping[str, Array]) -> int:
        """Positions of the cache that a prompt takes: "tokens" int [B, T], each row with as many images in it, of one
        tile each, as "images" [B, N, C, H, W] has.
        """
        tokens, images = prompt["tokens"].shape[1], prompt["images"].shape[1]
        each = self.config.image_placeholders == "each"
        return tokens if each else tokens + images * (self.config.img_seq_len - 1)

    def reserve(self, prompt: Mapping[str, Array], length: int) -> Array:
        """For `init`, which makes a cache of `length` positions."""
        return self(None, jnp.zeros((prompt["tokens"].shape[0], length), jnp.int32), cache_position=0)

    def read(self, prompt: Mapping[str, Array]) -> Array:
        """Logits fp32 [B, V] after prompts that an empty cache takes in."""
        arguments = (prompt["images"], prompt["tokens"], None, self.prompt_slots(prompt), None, None, None, True)
        _, x_BSD, inputs = self._merged(*arguments)
        return self._last_logits(None, decoder_input=x_BSD, cache_position=0, **inputs)

    def read_on(self, token_B: Array, position: Array) -> Array:
        """Logits fp32 [B, V] after one token of text more, which is the cache's at `position`."""
        return self._last_logits(token_B[:, None], cache_position=position)

    def _last_logits(self, tokens: Array | None, **inputs: Any) -> Array:
        hidden_BSD = self.language_model.hidden_states(tokens, **inputs)[:, -1:]
        weight = self.language_model.output_weight()
        return language_model_logits(hidden_BSD, weight, self.config.language_config)[:, -1]

    # A pipeline calls the model in three pieces, each with its own part of the parameters. The tower belongs to the
    # first, which all stages run alike. Arguments as for `loss_sum`; `text` has all but images and labels.

    def embed(self, images: Array, text: Mapping[str, Array], length: int, *, deterministic: bool) -> Array:
        """The residual stream before the language model's first layer, [B, S, D]."""
        segments, tiles = text.get("segment_ids"), text.get("num_image_tiles")
        return self._merged(images, text["tokens"], tiles, _whole(length), None, None, segments, deterministic)[1]

    def run_layers(
        self, x_BSD: Array, rows: Mapping[str, StackRows], images: Array, text: Mapping[str, Array], weights: Array,
        *, deterministic: bool,
    ) -> Array:  # fmt: skip
        """x [B, S, D] through the layers that the parameters hold, which `rows` names."""
        tokens, segments = text["tokens"], text.get("segment_ids")
        slots = self._slots(images, tokens, text.get("num_image_tiles"), _whole(x_BSD.shape[1]))
        segments = None if segments is None else jnp.take_along_axis(segments, slots.token, axis=1)
        model: Any = self.language_model
        positions = _in_order(model.positions(slots.token, None, segments, None))
        segments = None if segments is None else _in_order(segments)
        aux_weight = self._weights(slots, tokens, weights).sum()
        inputs = model.layer_inputs(positions, segments, aux_weight=aux_weight)
        return model.run_layers(x_BSD, inputs, rows, deterministic=deterministic)

    def loss_sum_of_stream(
        self, x_BSD: Array, images: Array, text: Mapping[str, Array], labels: Array, weights: Array
    ) -> FusedLoss:
        """`loss_sum` from the residual stream after the last layer, [B, S, D]."""
        slots = self._slots(images, text["tokens"], text.get("num_image_tiles"), _whole(x_BSD.shape[1]))
        model: Any = self.language_model
        weights = self._weights(slots, text["tokens"], weights)
        return self._loss_sum(model.normed(x_BSD), slots, labels, weights)

    def _slots(self, images: Array | None, tokens: Array, num_image_tiles: Array | None, length: int) -> Merge:
        """Where everything goes in a sequence of so many slots."""
        is_placeholder = tokens == self.config.image_token_index
        tiles = _tiles_of_tokens(jnp, is_placeholder, images, num_image_tiles)
        each = self.config.image_placeholders == "each"
        spans = jnp.ones_like(tiles) if each else tiles * self.config.img_seq_len
        return merge(is_placeholder, spans, length, rows_by_sample=images is not None and images.ndim == 5)

    def encode_images(self, images: Array, *, deterministic: bool = True) -> Array:
        """Tiles [N, C, H, W] -> embeddings [N, P, D] as the language model sees them, without tags."""
        cfg = self.config
        x_NPE = self.vision_model(images, num_layers=cfg.vision_layers_used, deterministic=deterministic)
        if isinstance(x_NPE, tuple):
            x_NPE = jnp.concatenate(x_NPE, axis=-1)
        if cfg.drop_vision_class_token:
            x_NPE = x_NPE[:, cfg.vision_config.class_token_len :]
        if cfg.pixel_shuffle:
            x_NPE = pixel_shuffle(x_NPE)
        with residual_stream_of(x_NPE.shape[1], whole=True):
            return self.vision_projection(x_NPE)

    def _merged(
        self,
        images: Array | None,
        tokens: Array,
        num_image_tiles: Array | None,
        sequence_length: int | None,
        position_ids: Array | None,
        attention_mask: Array | None,
        segment_ids: Array | None,
        deterministic: bool,
    ) -> tuple[Merge, Array, dict[str, Any]]:
        """(where everything goes, the embeddings [B, S, D], further arguments of the language model)."""
        cfg = self.config
        if images is not None and images.shape[0] == 0:
            images = None
        length = sequence_length or self._length(tokens, images, num_image_tiles)
        tokens = jnp.asarray(tokens)
        is_placeholder = tokens == cfg.image_token_index
        slots = self._slots(images, tokens, num_image_tiles, length)

        if position_ids is None:
            position_ids = jnp.arange(tokens.shape[1])[None] if segment_ids is None else packed_positions(segment_ids)
        # Text and images lie whole on all context-parallel devices; what is made of them does not.
        with whole_sequences():
            with residual_stream_of(tokens.shape[1], whole=True):
                ids = jnp.where(is_placeholder, 0, tokens)
                x_BTD = self.language_model.embed(ids, position_ids, deterministic=deterministic)
            embeddings = self._image_embeddings(images, num_image_tiles, deterministic, x_BTD)
        order = tokens_here(length)
        placed = slots if order is None else reordered(slots, order)
        x_BSD = constrain(merged_embeddings(placed, x_BTD, embeddings), "batch", "residual_seq", "act_embed")

        inputs: dict[str, Any] = {"deterministic": deterministic}
        if segment_ids is not None:
            segments = jnp.take_along_axis(segment_ids, slots.token, axis=1)
            inputs |= {"segment_ids": _in_order(segments), "position_ids": _in_order(packed_positions(segments))}
        elif order is not None:
            inputs["position_ids"] = order[None]
        if attention_mask is not None:
            inputs["attention_mask"] = _placed_mask(attention_mask, slots)
        return slots, x_BSD, inputs

    def _image_embeddings(
        self, images: Array | None, num_image_tiles: Array | None, deterministic: bool, like: Array
    ) -> Array:
        """Embeddings of all tiles, one after the other: [R, D], or [B, R, D] where tiles come by sample."""
        cfg = self.config
        if images is None:
            if self.is_initializing():  # the parameters do not depend on whether the first text has an image
                tower = cfg.vision_config
                self.encode_images(jnp.zeros((1, tower.num_channels, tower.img_h, tower.img_w)))
            return jnp.zeros((1, like.shape[-1]), like.dtype)
        tiles = images.reshape(-1, *images.shape[-3:])
        tiles = constrain(tiles, "batch", None, None, None) if images.ndim == 5 else tiles
        x_NPD = self.encode_images(tiles, deterministic=deterministic)
        if cfg.tile_tags is not None:
            x_NPD = jnp.concatenate([self._tags(images, num_image_tiles).astype(x_NPD.dtype), x_NPD], axis=1)
        return x_NPD.reshape(*(images.shape[:1] if images.ndim == 5 else ()), -1, x_NPD.shape[-1])

    def _tags(self, images: Array, num_image_tiles: Array | None) -> Array:
        """Embeddings of the words that number each tile, [N, words, D]."""
        table = jnp.asarray(self.config.tile_tags)
        groups = 1 if images.ndim == 4 else images.shape[0]
        count = images.shape[0] if images.ndim == 4 else images.shape[1]
        tiles = jnp.ones((groups, count), jnp.int32) if num_image_tiles is None else num_image_tiles
        ends = jnp.cumsum(jnp.asarray(tiles).reshape(groups, -1), axis=1)
        index = jnp.arange(count)
        image = jnp.minimum(jnp.sum(ends[:, None, :] <= index[:, None], axis=-1), ends.shape[1] - 1)
        end = jnp.take_along_axis(ends, image, axis=1)
        first = end - jnp.take_along_axis(jnp.asarray(tiles).reshape(groups, -1), image, axis=1)
        number = jnp.where(index == end - 1, len(table) - 1, jnp.minimum(index - first, len(table) - 1))
        with residual_stream_of(table.shape[1], whole=True):
            return self.language_model.embedding.word_embeddings(table[number.reshape(-1)])

    def _length(self, tokens: Any, images: Array | None, num_image_tiles: Any) -> int:
        """S, where nobody says it."""
        cfg = self.config
        if cfg.image_placeholders == "each" or self.is_initializing():
            return tokens.shape[1]
        if any(isinstance(given, Tracer) for given in (tokens, num_image_tiles)):
            if cfg.max_sequence_length is None:
                raise ConfigError("max_sequence_length=None; the length of traced text with images in it needs it")
            return cfg.max_sequence_length
        # In numpy, so that it is a number even where a program is being traced around it.
        is_placeholder = np.asarray(tokens) == cfg.image_token_index
        spans = np.where(is_placeholder, _tiles_of_tokens(np, is_placeholder, images, num_image_tiles), 1)
        lengths = np.where(is_placeholder, spans * cfg.img_seq_len, 1).sum(axis=1)
        return int(min(lengths.max(), cfg.max_sequence_length or lengths.max()))

    def _labels(self, slots: Merge, labels: Array) -> Array:
        # Where every slot has its own token, labels are the user's business, as in a model of text.
        return labels if self.config.image_placeholders == "each" else merged_labels(slots, labels)

    def _loss_mask(self, slots: Merge, loss_mask: Array) -> Array:
        return loss_mask if self.config.image_placeholders == "each" else merged_loss_mask(slots, loss_mask)


def _whole(slots: int) -> int:
    """Slots of a sequence of which so many are here."""
    return slots * parts_apart("seq")


def _in_order(x_BS: Array) -> Array:
    """What slots have, one after the other: of those that are here, in the order in which they lie on the mesh."""
    order = tokens_here(x_BS.shape[1])
    return x_BS if order is None else x_BS[:, order]


def _placed_mask(attention_mask: Array, slots: Merge) -> Array:
    """The mask of tokens, [B, T], or of slots, broadcastable to [B, 1, S, S], as the language model reads it."""
    if attention_mask.ndim == 2:
        return _in_order(jnp.take_along_axis(attention_mask, slots.token, axis=1))
    order = tokens_here(slots.token.shape[1])
    for dim in (2, 3):
        if order is not None and attention_mask.shape[dim] > 1:
            attention_mask = jnp.take(attention_mask, order, axis=dim)
    return attention_mask


def _tiles_of_tokens(numpy: Any, is_placeholder: Any, images: Array | None, num_image_tiles: Any) -> Any:
    """Tiles of the image that a token stands for, int [B, T]. numpy: `numpy` or `jax.numpy`, which computes."""
    if num_image_tiles is None or images is None:
        return is_placeholder.astype(numpy.int32)
    tiles = numpy.asarray(num_image_tiles)
    if images.ndim == 5:
        number = numpy.cumsum(is_placeholder, axis=1) - 1
        of_token = numpy.take_along_axis(tiles, numpy.clip(number, 0, tiles.shape[1] - 1), axis=1)
        return numpy.where(is_placeholder, of_token, 0)
    number = numpy.cumsum(is_placeholder.reshape(-1)).reshape(is_placeholder.shape) - 1
    return numpy.where(is_placeholder, tiles.reshape(-1)[numpy.clip(number, 0, tiles.size - 1)], 0)
