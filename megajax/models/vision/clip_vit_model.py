"""CLIPVisionTransformer: the image tower of CLIP, SigLIP, InternViT and plain ViT."""

# SPDX-License-Identifier: Apache-2.0
# B batch, C channels, H height, W width, P patches, S tokens, D hidden
from typing import Any

import jax
import jax.numpy as jnp

from megajax.config import ConfigError
from megajax.models.common.vision_module.vision_module import TABLE_AXES, PatchEmbedding, VisionModule
from megajax.models.vision.image_tokens import get_num_image_embeddings
from megajax.parallel.sharding import gathered
from megajax.transformer.linear import init_std, normal_init

__all__ = ["CLIPViTModel", "CLIPVisionTransformer", "get_num_image_embeddings"]

Array = jax.Array


class CLIPVisionTransformer(VisionModule):
    """A vision transformer with learned positions (arXiv:2010.11929, arXiv:2103.00020, arXiv:2303.15343).

    Megatron: `CLIPViTModel` in `core/models/vision/clip_vit_model.py`; its `model_subtype` is the options of
    `vision_config.SUBTYPES`.

    Example:
      >>> config = VisionConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ln_pre=True)
      >>> model = CLIPVisionTransformer(config)
      >>> tokens = model.apply(model.init(jax.random.key(0), images), images)  # [B, 577, 64]
    """

    def setup(self) -> None:
        cfg = self.config
        self.conv1 = PatchEmbedding(cfg)
        shape, dtype = (cfg.num_image_tokens, cfg.hidden_size), jnp.dtype(cfg.params_dtype)
        self.position_embeddings = self.param(
            "position_embeddings", normal_init(init_std(cfg), TABLE_AXES), shape, dtype
        )
        self.setup_tower()

    def __call__(
        self,
        images: Array,
        *,
        pooled: bool = False,
        num_layers: int | tuple[int, ...] | None = None,
        deterministic: bool = True,
    ) -> Any:
        """images float [B, C, H, W] -> tokens [B, S, D] in the compute dtype, class tokens first.

        Args:
          pooled: one vector an image instead, [B, D]; see `VisionConfig.pooler`.
          num_layers: stop after so many layers, before the final norm; for several numbers, a tuple of what each makes.
          deterministic: False draws dropout from the "dropout" rng.

        Raises:
          ConfigError: images of another size than img_h, img_w.
        """
        cfg = self.config
        if images.shape[2:] != (cfg.img_h, cfg.img_w):
            raise ConfigError(
                f"images are {images.shape[2]} x {images.shape[3]}, but the positions are those of img_h={cfg.img_h},"
                f" img_w={cfg.img_w}; resize them"
            )
        x_BSD = self.with_class_tokens(self.conv1(self.patches(images)))
        x_BSD = x_BSD + gathered(self.position_embeddings, *TABLE_AXES).astype(x_BSD.dtype)  # pyright: ignore
        x_BSD = self.encode(x_BSD, num_layers=num_layers, deterministic=deterministic)
        return self.pool(x_BSD) if pooled else x_BSD


CLIPViTModel = CLIPVisionTransformer
"""Megatron's name."""
