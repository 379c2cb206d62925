"""Options of a vision tower."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from megajax.config import ConfigError, TransformerConfig
from megajax.config_checks import require, require_divides, require_positive

FinalNorm = Literal["none", "tokens", "pooled"]
Pooler = Literal["none", "class_token", "dense", "attention"]

SUBTYPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "clip": {"embedder_bias": False, "ln_pre": True, "ln_post": "none", "class_token_len": 1},
        "siglip": {"embedder_bias": True, "ln_pre": False, "ln_post": "tokens", "class_token_len": 0},
        "internvit": {"embedder_bias": True, "ln_pre": False, "ln_post": "none", "class_token_len": 1},
        "internvit300M": {"embedder_bias": True, "ln_pre": False, "ln_post": "none", "class_token_len": 1},
    }
)
"""Megatron's `model_subtype` of its CLIP ViT -> options here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A vision transformer: patches, class tokens, positions, layers that see everything, norms, a pooler.

    The fields of `TransformerConfig` describe its layers. Images are [B, num_channels, img_h, img_w].
    """

    img_h: int = 336
    img_w: int = 336
    patch_dim: int = 14
    """Side of a patch in pixels."""
    crop_to_patches: bool = False
    """Images are not made of whole patches: what is left over below and to the right is cut off."""
    num_channels: int = 3
    image_mean: tuple[float, ...] | None = None
    """Of each channel, subtracted by the model, which then divides by `image_std`; None: images come normalised."""
    image_std: tuple[float, ...] | None = None
    class_token_len: int = 1
    """Learned tokens in front of the patches; 0 for none."""
    embedder_bias: bool = False
    """Bias of the patch embedding."""
    ln_pre: bool = False
    """A norm before the first layer."""
    ln_post: FinalNorm = "none"
    """A norm after the last layer: of all tokens, or only of the one that is pooled."""
    pooler: Pooler = "none"
    """What one vector an image is made of: the first class token; that through a dense layer and tanh; or attention of
    a learned probe to all tokens."""
    layer_scale_init: float | None = None
    """Each sublayer's output is multiplied by a learned vector that starts with this value (arXiv:2103.17239)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "img_h", "img_w", "patch_dim", "num_channels")
        self._validate_patches()
        require(not self.sandwich_norm, "sandwich_norm=True is not possible in this family; drop it")
        require(self.class_token_len >= 0, f"class_token_len={self.class_token_len} must not be negative")
        require(
            self.class_token_len > 0 or self.pooler not in ("class_token", "dense"),
            f"pooler={self.pooler!r} needs class_token_len of at least 1; raise it or use 'attention'",
        )
        require(
            self.ln_post != "pooled" or self.pooler == "class_token",
            f"ln_post='pooled' needs pooler='class_token', not {self.pooler!r}; change one of them",
        )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if (values is None) != (self.image_std is None) or (values and len(values) != self.num_channels):
                raise ConfigError(
                    f"{name}={values} must have a number for each of num_channels={self.num_channels}; image_mean and"
                    " image_std go together"
                )

    def _validate_patches(self) -> None:
        size = self.patch_dim
        if not self.crop_to_patches:
            require_divides("img_h", self.img_h, "patch_dim", size)
            require_divides("img_w", self.img_w, "patch_dim", size)
            return
        stated = f"img_h={self.img_h}, img_w={self.img_w}"
        require(min(self.img_h, self.img_w) >= size, f"{stated} hold no patch_dim={size}; make the images larger")
        require(
            self.img_h % size > 0 or self.img_w % size > 0,
            f"crop_to_patches=True has no effect on {stated}, which are multiples of patch_dim={size}; leave it out",
        )

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.img_h // self.patch_dim) * (self.img_w // self.patch_dim)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image, class tokens included."""
        return self.num_patches + self.class_token_len

    @property
    def patch_features(self) -> int:
        """Numbers in a patch."""
        return self.num_channels * self.patch_dim**2
