"""CLIPModel: an image tower and a text tower that are trained to agree on which image goes with which text."""

# SPDX-License-Identifier: Apache-2.0
# B images, T texts, S tokens, D hidden, E features in which both are compared
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import TransformerConfig
from megajax.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.clip_vit_model import CLIPVisionTransformer
from megajax.models.vision.vit_layer_specs import get_text_layer_spec
from megajax.ops.attention import AttentionMask
from megajax.ops.contrastive import sigmoid_losses, softmax_losses
from megajax.ops.cross_entropy import FusedLoss
from megajax.ops.linear import linear
from megajax.parallel.replicas import across
from megajax.parallel.sharding import constrain, gathered, residual_stream_of
from megajax.spec import Builder
from megajax.transformer.block import LayerInputs, TransformerBlock
from megajax.transformer.linear import init_std, normal_init, zeros_init

Array = jax.Array


class Projection(nn.Module):
    """x [B, D] -> [B, features]. Kernel [D, features]."""

    config: TransformerConfig
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x_BD: Array) -> Array:
        cfg, dtype, axes = self.config, jnp.dtype(self.config.params_dtype), ("embed", "norm")
        kernel = self.param("kernel", normal_init(init_std(cfg), axes), (x_BD.shape[-1], self.features), dtype)
        bias = self.param("bias", zeros_init(("norm",)), (self.features,), dtype) if self.use_bias else None
        return linear(x_BD, gathered(kernel.astype(x_BD.dtype), *axes), bias)


def text_layer_specs(config: CLIPConfig, backend: BackendSpecProvider) -> tuple[Builder, ...]:
    """One builder for each layer of the text tower."""
    text = config.text_config
    return (get_text_layer_spec(text, backend),) * text.num_layers


class CLIPVisionModelWithProjection(nn.Module):
    """An image tower and its projection to the space in which `CLIPModel` compares images with texts.

    Example:
      >>> features = model.apply(variables, images, pooled=True)  # [B, projection_dim], not of length 1
    """

    config: CLIPConfig
    backend: BackendSpecProvider = LocalSpecProvider()

    def setup(self) -> None:
        self.vision_model = CLIPVisionTransformer(self.config, backend=self.backend)
        self.visual_projection = Projection(self.config, self.config.embedding_dim, use_bias=False)

    def __call__(self, images: Array, *, pooled: bool = False, deterministic: bool = True) -> Array:
        """images float [B, C, H, W] -> tokens [B, S, D], as the tower's; or one projected vector an image, [B, E]."""
        x_BSD = self.vision_model(images, deterministic=deterministic)
        if pooled or self.is_initializing():
            return self.visual_projection(self.vision_model.pool(x_BSD))
        return x_BSD


class CLIPTextTransformer(nn.Module):
    """The text tower: tokens int [T, S] -> states [T, S, D] after the final norm."""

    config: CLIPConfig
    backend: BackendSpecProvider = LocalSpecProvider()

    def setup(self) -> None:
        cfg = self.config.text_config
        self.embedding = LanguageModelEmbedding(cfg)
        self.decoder = TransformerBlock(cfg, text_layer_specs(self.config, self.backend), self.backend.layer_norm(cfg))

    def __call__(
        self, tokens: Array, *, attention_mask: Array | None = None, pooled: bool = False, deterministic: bool = True
    ) -> Array:
        """attention_mask: bool [T, S], True = attend. pooled: the state that stands for the text, [T, D]."""
        keep = None if attention_mask is None else attention_mask[:, None, None, :].astype(bool)
        mask = AttentionMask(causal=self.config.text_causal, keep=keep)
        with residual_stream_of(tokens.shape[1]):
            x_TSD = self.embedding(tokens, jnp.arange(tokens.shape[1])[None], deterministic=deterministic)
            x_TSD = self.decoder(x_TSD, LayerInputs(mask), deterministic=deterministic)
            x_TSD = constrain(x_TSD, "batch", "seq", "act_embed")
        return jnp.take_along_axis(x_TSD, self._pooled_token(tokens)[:, None, None], axis=1)[:, 0] if pooled else x_TSD

    def _pooled_token(self, tokens: Array) -> Array:
        cfg = self.config
        if cfg.text_pooling == "last":
            return jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
        return jnp.argmax(tokens if cfg.text_pooling == "highest" else tokens == cfg.eos_token_id, axis=1)


class CLIPTextModelWithProjection(nn.Module):
    """A text tower and its projection to the space in which `CLIPModel` compares texts with images.

    Example:
      >>> features = model.apply(variables, tokens, pooled=True)  # [T, projection_dim], not of length 1
    """

    config: CLIPConfig
    backend: BackendSpecProvider = LocalSpecProvider()

    def setup(self) -> None:
        cfg = self.config
        self.text_model = CLIPTextTransformer(cfg, self.backend)
        self.text_projection = Projection(cfg.text_config, cfg.embedding_dim, use_bias=False)

    def __call__(
        self, tokens: Array, *, attention_mask: Array | None = None, pooled: bool = False, deterministic: bool = True
    ) -> Array:
        """tokens int [T, S] -> states [T, S, D], as the tower's; or one projected vector a text, [T, E]."""
        if not pooled and not self.is_initializing():
            return self.text_model(tokens, attention_mask=attention_mask, deterministic=deterministic)
        x_TD = self.text_model(tokens, attention_mask=attention_mask, pooled=True, deterministic=deterministic)
        return self.text_projection(x_TD)


class CLIPOutput(NamedTuple):
    """logits_per_image [B, T], logits_per_text [T, B]; image_embeds [B, E], text_embeds [T, E], of length 1; fp32."""

    logits_per_image: Array
    logits_per_text: Array
    image_embeds: Array
    text_embeds: Array


class CLIPModel(nn.Module):
    """CLIP (arXiv:2103.00020), or SigLIP (arXiv:2303.15343) by the options of its config.

    Example:
      >>> output = model.apply(variables, images, tokens)
      >>> best_text = output.logits_per_image.argmax(axis=1)  # [B]
    """

    config: CLIPConfig
    backend: BackendSpecProvider = LocalSpecProvider()

    def setup(self) -> None:
        cfg = self.config
        self.vision_model = CLIPVisionTransformer(cfg, backend=self.backend)
        self.text_model = CLIPTextTransformer(cfg, self.backend)
        projected = cfg.projection_dim is not None
        if projected:
            self.visual_projection = Projection(cfg, cfg.embedding_dim, use_bias=False)
        self.text_projection = Projection(cfg.text_config, cfg.embedding_dim, use_bias=not projected)
        self.logit_scale = self._scalar("logit_scale", cfg.logit_scale_init)
        if cfg.contrastive_loss == "sigmoid":
            self.logit_bias = self._scalar("logit_bias", cfg.logit_bias_init)

    def _scalar(self, name: str, value: float) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(value), ())
        return self.param(name, init, (), jnp.float32)  # type: ignore[return-value]

    def __call__(
        self, images: Array, tokens: Array, *, attention_mask: Array | None = None, deterministic: bool = True
    ) -> CLIPOutput:
        """images [B, C, H, W], tokens int [T, S]; every image is compared with every text.

        attention_mask: bool [T, S], True = attend; default: all tokens.
        """
        image_embeds = self.encode_image(images, deterministic=deterministic)
        text_embeds = self.encode_text(tokens, attention_mask=attention_mask, deterministic=deterministic)
        logits = self.logits(image_embeds, text_embeds)
        return CLIPOutput(logits, logits.T, image_embeds, text_embeds)

    def encode_image(self, images: Array, *, deterministic: bool = True) -> Array:
        """images [B, C, H, W] -> features of length 1, fp32 [B, E]."""
        x_BD = self.vision_model(images, pooled=True, deterministic=deterministic)
        return _normalised(self.visual_projection(x_BD) if self.config.projection_dim is not None else x_BD)

    def encode_text(self, tokens: Array, *, attention_mask: Array | None = None, deterministic: bool = True) -> Array:
        """tokens int [T, S] -> features of length 1, fp32 [T, E]."""
        x_TD = self.text_model(tokens, attention_mask=attention_mask, pooled=True, deterministic=deterministic)
        return _normalised(self.text_projection(x_TD))

    def logits(self, image_embeds: Array, text_embeds: Array) -> Array:
        """How well images [B, E] and texts [T, E] agree, [B, T]."""
        logits = image_embeds @ text_embeds.T * jnp.exp(self.logit_scale)
        return logits + self.logit_bias if self.config.contrastive_loss == "sigmoid" else logits

    def loss_sum(
        self, images: Array, tokens: Array, weights: Array, *, attention_mask: Array | None = None,
        deterministic: bool = True,
    ) -> FusedLoss:  # fmt: skip
        """The contrastive loss: pair i are image i and text i, all others of the batch are what it must not be.

        weights: fp32 [B, 1], what the loss of each pair is multiplied by; a pair of weight 0 is still compared with.

        Where replicas compute parts of it apart, each has the losses of its own pairs. It collects the features of all
        others, whose gradients go back the same way: the sum of the parts is the loss of all pairs together.
        """
        image_embeds = self.encode_image(images, deterministic=deterministic)
        text_embeds = self.encode_text(tokens, attention_mask=attention_mask, deterministic=deterministic)
        everyone = across()
        of_images = self.logits(image_embeds, everyone.every_sample(text_embeds))
        of_texts = of_images.T
        if everyone.batch:
            of_texts = self.logits(everyone.every_sample(image_embeds), text_embeds).T
        losses = sigmoid_losses if self.config.contrastive_loss == "sigmoid" else softmax_losses
        per_pair = losses(of_images, of_texts, everyone.first_sample(images.shape[0]))[:, None]
        return FusedLoss(jnp.sum(per_pair * weights), jax.lax.stop_gradient(per_pair))


def _normalised(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return constrain(x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True)), "batch", None)
