"""RADIOModel: a vision tower for images of any size."""

# SPDX-License-Identifier: Apache-2.0
# B batch, C channels, H height, W width, h, w patches of an image, S tokens, D hidden, R, L grid of positions
from typing import Any

import jax
import jax.numpy as jnp

from megajax.config import ConfigError
from megajax.models.common.vision_module.vision_module import (
    TABLE_AXES,
    ClassifierHead,
    PatchEmbedding,
    VisionModule,
)
from megajax.models.vision.radio_config import RADIOConfig
from megajax.ops.images import random_windows, resize
from megajax.parallel.noise import bernoulli, uniform
from megajax.parallel.sharding import constrain, gathered
from megajax.transformer.linear import normal_init, zeros_init

Array = jax.Array

__all__ = ["RADIOModel", "RADIOViTModel"]


class RADIOModel(VisionModule):
    """A vision transformer with cropped position embedding (arXiv:2312.06709, arXiv:2412.07679).

    Megatron: `RADIOViTModel` in `core/models/vision/radio.py`.

    Example:
      >>> model = RADIOModel(RADIOConfig(num_layers=2, hidden_size=64, num_attention_heads=4))
      >>> tokens = model.apply(variables, images)  # [B, 8 + patches, 64]
    """

    config: RADIOConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        cfg, dtype = self.config, jnp.dtype(self.config.params_dtype)
        self.embedder = PatchEmbedding(cfg)
        rows, columns = cfg.position_grid
        init = normal_init(cfg.hidden_size**-0.5, TABLE_AXES)
        self.position_embeddings = self.param("position_embeddings", init, (rows * columns, cfg.hidden_size), dtype)
        if cfg.use_mask_token:
            self.mask_token = self.param("mask_token", zeros_init(TABLE_AXES), (1, cfg.hidden_size), dtype)
        self.setup_tower()
        if cfg.num_classes is not None:
            self.classifier = ClassifierHead(cfg, cfg.num_classes)

    def __call__(
        self,
        images: Array,
        *,
        hidden: Array | None = None,
        pooled: bool = False,
        num_layers: int | tuple[int, ...] | None = None,
        deterministic: bool = True,
    ) -> Any:
        """images float [B, C, H, W], of whole patches -> tokens [B, S, D] in the compute dtype, class tokens first.

        Args:
          hidden: bool [B, h w], patches that are replaced by the mask token.
          pooled: the summary instead, [B, n D]: the class tokens that `summary_idxs` names, side by side.
          num_layers: stop after so many layers; for several numbers, a tuple of what each makes.
          deterministic: False draws dropout, and the windows of the position embedding, from the "dropout" rng.
        """
        cfg = self.config
        h, w = (size // cfg.patch_dim for size in images.shape[2:])
        x_BPD = self.embedder(self.patches(images))
        if hidden is not None:
            if not cfg.use_mask_token:
                raise ConfigError("use_mask_token=False; hidden patches need it, set it to True")
            x_BPD = jnp.where(hidden[..., None], self.mask_token.astype(x_BPD.dtype), x_BPD)  # pyright: ignore
        x_BPD = x_BPD + self.positions(images.shape[0], h, w, deterministic=deterministic).astype(x_BPD.dtype)
        x_BSD = self.encode(self.with_class_tokens(x_BPD), num_layers=num_layers, deterministic=deterministic)
        if self.is_initializing() and cfg.num_classes is not None:
            self.classifier(self.summary(x_BSD))
        return self.summary(x_BSD) if pooled else x_BSD

    def positions(self, batch: int, rows: int, columns: int, *, deterministic: bool = True) -> Array:
        """Positions of images of rows x columns patches: fp32 [1, rows columns, D], in training [batch, ...]."""
        cfg = self.config
        table_RLD = gathered(self.position_embeddings, *TABLE_AXES).reshape(*cfg.position_grid, -1)  # pyright: ignore
        if cfg.has_cpe and not deterministic and not self.is_initializing() and (rows, columns) != cfg.position_grid:
            drawn = uniform(self.make_rng("dropout"), (batch, 4), "batch", None, low=0.0, high=1.0)
            grid = random_windows(drawn, table_RLD, rows, columns)
            grid = constrain(grid, "batch", None, None, "act_embed")
        else:
            grid = _at_size(table_RLD, rows, columns, cfg)[None]
        grid = grid.reshape(grid.shape[0], rows * columns, -1)
        if cfg.pos_dropout and not deterministic:
            kept = bernoulli(self.make_rng("dropout"), 1.0 - cfg.pos_dropout, (batch, 1, 1), "batch", None, None)
            grid = jnp.where(kept, grid, 0.0)  # not scaled up: positions are there whole or not at all
        return grid

    def summary(self, x_BSD: Array) -> Array:
        """The summary [B, n D] in what the tower returns."""
        return x_BSD[:, jnp.asarray(self.config.summary_idxs)].reshape(x_BSD.shape[0], -1)

    def features(self, x_BSD: Array) -> Array:
        """The patches' tokens [B, h w, D] in what the tower returns."""
        return x_BSD[:, self.config.class_token_len :]

    def classify(self, images: Array, *, deterministic: bool = True) -> Array:
        """images [B, C, H, W] -> fp32 logits [B, num_classes]."""
        return self.classifier(self(images, pooled=True, deterministic=deterministic))


def _at_size(table_RLD: Array, rows: int, columns: int, config: RADIOConfig) -> Array:
    """The table for images of rows x columns patches, outside of training."""
    if table_RLD.shape[:2] == (rows, columns):
        return table_RLD
    align = config.interpolate_align_corners
    if config.has_cpe:  # a square of the longer side, of which an image that is no square takes the upper left part
        longest = max(rows, columns)
        table_RLD = resize(table_RLD, longest, longest, align_corners=align)
    return resize(table_RLD[:rows, :columns], rows, columns, align_corners=align)


RADIOViTModel = RADIOModel
"""Megatron's name."""
