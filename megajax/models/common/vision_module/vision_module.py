"""What every vision tower is made of: patch embedding, class tokens, layers, final norm, pooler."""

# SPDX-License-Identifier: Apache-2.0
# B batch, C channels, H height, W width, P patches, S tokens, D hidden, I numbers in a patch
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.backends import BackendSpecProvider, LocalSpecProvider
from megajax.config import ConfigError
from megajax.models.vision.vision_config import VisionConfig
from megajax.models.vision.vit_layer_specs import get_vit_layer_spec
from megajax.ops.attention import AttentionMask
from megajax.ops.images import patchify
from megajax.ops.linear import linear
from megajax.parallel.sharding import constrain, gathered, merge_tokens, residual_stream_of
from megajax.spec import Builder
from megajax.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megajax.transformer.block import LayerInputs, TransformerBlock
from megajax.transformer.linear import init_std, normal_init, zeros_init
from megajax.transformer.mlp import MLP, MLPSubmodules

Array = jax.Array

TABLE_AXES = ("whole", "embed")
"""Logical axes of tables that every tensor-parallel device holds whole: they are small, and added where tokens are."""


class PatchEmbedding(nn.Module):
    """Patches to tokens: [B, P, I] -> [B, P, D]. Kernel [I, D], features in the order of `patchify`.

    The convolution whose stride is its width, as Hugging Face and Megatron's CLIP have it, is this product.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, patches_BPI: Array) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.params_dtype)
        shape = (cfg.patch_features, cfg.hidden_size)
        kernel = self.param("kernel", normal_init(init_std(cfg), TABLE_AXES), shape, dtype)
        bias = self.param("bias", zeros_init(("norm",)), shape[1:], dtype) if cfg.embedder_bias else None
        x = patches_BPI.astype(jnp.dtype(cfg.compute_dtype))
        y = linear(merge_tokens(x), gathered(kernel.astype(x.dtype), *TABLE_AXES), bias)
        return y.reshape(*x.shape[:-1], cfg.hidden_size)


class AttentionPooler(nn.Module):
    """A learned probe that attends to all tokens, then an MLP (SigLIP, arXiv:2303.15343). [B, S, D] -> [B, D]."""

    config: VisionConfig
    backend: BackendSpecProvider

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        cfg, backend = self.config, self.backend
        column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
        probe = self.param("probe", normal_init(1.0, TABLE_AXES), (1, cfg.hidden_size), jnp.dtype(cfg.params_dtype))
        probe_B1D = jnp.broadcast_to(gathered(probe, *TABLE_AXES), (x_BSD.shape[0], 1, cfg.hidden_size))
        slots = CrossAttentionSubmodules(
            linear_q=column, linear_kv=column, core_attention=backend.core_attention(), linear_proj=row
        )
        attention = CrossAttention(cfg, slots, name="attention")
        y_B1D = attention(probe_B1D.astype(x_BSD.dtype), x_BSD, mask=AttentionMask())
        z_B1D = backend.layer_norm(cfg)(config=cfg, name="layernorm")(y_B1D).astype(x_BSD.dtype)
        mlp = MLP(cfg, MLPSubmodules(linear_fc1=column, linear_fc2=row), name="mlp")
        return (y_B1D + mlp(z_B1D))[:, 0]


class DensePooler(nn.Module):
    """`tanh(dense(x))` of the class token, x [B, D] -> [B, D] (ViT, BERT)."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x_BD: Array) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.params_dtype)
        axes = ("embed", "norm")
        kernel = self.param("kernel", normal_init(init_std(cfg), axes), (cfg.hidden_size,) * 2, dtype)
        bias = self.param("bias", zeros_init(("norm",)), (cfg.hidden_size,), dtype)
        return jnp.tanh(linear(x_BD, gathered(kernel.astype(x_BD.dtype), *axes), bias))


class ClassifierHead(nn.Module):
    """What stands for an image, [B, E], to fp32 logits [B, num_classes]. Kernel [E, num_classes]."""

    config: VisionConfig
    num_classes: int

    @nn.compact
    def __call__(self, x_BE: Array) -> Array:
        cfg, dtype, axes = self.config, jnp.dtype(self.config.params_dtype), ("embed", "norm")
        shape = (x_BE.shape[-1], self.num_classes)
        kernel = self.param("kernel", normal_init(init_std(cfg), axes), shape, dtype)
        bias = self.param("bias", zeros_init(("norm",)), shape[1:], dtype)
        return linear(x_BE.astype(jnp.float32), gathered(kernel, *axes).astype(jnp.float32), bias)


class VisionModule(nn.Module):
    """Base of vision towers: a subclass makes the tokens before the first layer, this class does the rest.

    Attributes:
      transformer_layer_spec: builder of a layer; None is `get_vit_layer_spec(config, backend)`.
      backend: supplies layers and norms.
    """

    config: VisionConfig
    transformer_layer_spec: Builder | None = None
    backend: BackendSpecProvider = LocalSpecProvider()

    @property
    def layer_specs(self) -> tuple[Builder, ...]:
        """One builder for each layer."""
        spec = self.transformer_layer_spec or get_vit_layer_spec(self.config, self.backend)
        return (spec,) * self.config.num_layers

    def setup_tower(self) -> None:
        """For `setup` of a subclass."""
        cfg, norm = self.config, self.backend.layer_norm(self.config)
        if cfg.class_token_len:
            shape, dtype = (cfg.class_token_len, cfg.hidden_size), jnp.dtype(cfg.params_dtype)
            self.class_token = self.param("class_token", normal_init(1.0, TABLE_AXES), shape, dtype)
        if cfg.ln_pre:
            self.ln_pre = norm(config=cfg)
        self.decoder = TransformerBlock(cfg, self.layer_specs)
        if cfg.ln_post != "none":
            self.ln_post = norm(config=cfg)
        if cfg.pooler == "attention":
            self.head = AttentionPooler(cfg, self.backend)
        elif cfg.pooler == "dense":
            self.dense_pooler = DensePooler(cfg)

    def patches(self, images_BCHW: Array) -> Array:
        """Images, normalised if the config says so, as patches [B, P, I]."""
        cfg = self.config
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != cfg.num_channels:
            raise ConfigError(
                f"images have the shape {images_BCHW.shape}; they must be [batch, num_channels={cfg.num_channels},"
                " height, width]"
            )
        if cfg.crop_to_patches:
            H, W = (size // cfg.patch_dim * cfg.patch_dim for size in images_BCHW.shape[2:])
            images_BCHW = images_BCHW[:, :, :H, :W]
        if any(size % cfg.patch_dim for size in images_BCHW.shape[2:]):
            raise ConfigError(
                f"images of {images_BCHW.shape[2]} x {images_BCHW.shape[3]} are no whole patches of patch_dim="
                f"{cfg.patch_dim}; resize them"
            )
        x = images_BCHW.astype(jnp.float32)
        if cfg.image_mean is not None:
            mean, std = (jnp.asarray(values, jnp.float32)[:, None, None] for values in (cfg.image_mean, cfg.image_std))
            x = (x - mean) / std
        return patchify(x, cfg.patch_dim)

    def with_class_tokens(self, x_BPD: Array) -> Array:
        """Class tokens in front of the others."""
        if not self.config.class_token_len:
            return x_BPD
        tokens = gathered(self.class_token, *TABLE_AXES).astype(x_BPD.dtype)  # pyright: ignore[reportArgumentType]
        tokens = jnp.broadcast_to(tokens, (x_BPD.shape[0], *tokens.shape))
        return jnp.concatenate([tokens, x_BPD], axis=1)

    def encode(self, x_BSD: Array, *, num_layers: int | tuple[int, ...] | None, deterministic: bool) -> Any:
        """Tokens [B, S, D] through norms and the first `num_layers` layers (None: all); then no final norm.

        For several numbers of layers, what each of them makes of the tokens, as a tuple.
        """
        cfg = self.config
        with residual_stream_of(x_BSD.shape[1]):
            if cfg.ln_pre:
                x_BSD = self.ln_pre(x_BSD)
            x_BSD = x_BSD.astype(jnp.dtype("float32" if cfg.fp32_residual_connection else cfg.compute_dtype))
            x_BSD = constrain(x_BSD, "batch", "residual_seq", "act_embed")
            inputs = LayerInputs(AttentionMask())
            if isinstance(num_layers, tuple) and not self.is_initializing():
                return self._after_each(x_BSD, inputs, num_layers, deterministic=deterministic)
            count = max(num_layers) if isinstance(num_layers, tuple) else num_layers
            x_BSD = self.decoder(x_BSD, inputs, deterministic=deterministic, num_layers=count)
            if cfg.ln_post == "tokens" and (num_layers is None or self.is_initializing()):
                x_BSD = self.ln_post(x_BSD).astype(x_BSD.dtype)
            x_BSD = constrain(x_BSD, "batch", "seq", "act_embed")
        if self.is_initializing():
            self.pool(x_BSD)
        return (x_BSD,) * len(num_layers) if isinstance(num_layers, tuple) else x_BSD

    def _after_each(
        self, x_BSD: Array, inputs: LayerInputs, counts: tuple[int, ...], *, deterministic: bool
    ) -> tuple[Array, ...]:
        """The tokens [B, S, D] after each of these numbers of layers, in this order; every layer runs once."""
        after, done = {}, 0
        for count in sorted(set(counts)):
            x_BSD = self.decoder(x_BSD, inputs, deterministic=deterministic, num_layers=count, first_layer=done)
            after[count], done = constrain(x_BSD, "batch", "seq", "act_embed"), count
        return tuple(after[count] for count in counts)

    def pool(self, x_BSD: Array) -> Array:
        """One vector an image, [B, D], from what the tower returns."""
        cfg = self.config
        if cfg.pooler == "attention":
            with residual_stream_of(x_BSD.shape[1], whole=True):
                return self.head(x_BSD)
        x_BD = x_BSD[:, 0]
        if cfg.pooler == "dense":
            return self.dense_pooler(x_BD)
        return self.ln_post(x_BD).astype(x_BD.dtype) if cfg.ln_post == "pooled" else x_BD
