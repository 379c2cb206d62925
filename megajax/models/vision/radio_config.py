"""Options of RADIO."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

from megajax.config_checks import require, require_fraction, require_positive
from megajax.models.vision.vision_config import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RADIOConfig(VisionConfig):
    """A `VisionConfig` whose positions are those of a larger grid, resampled to the images at hand."""

    patch_dim: int = 16
    img_h: int = 224
    img_w: int = 224
    class_token_len: int = 8
    """Class tokens and registers, in front of the patches."""
    max_img_h: int = 2048
    max_img_w: int = 2048
    """Size of the largest image: its whole patches are the table of positions."""
    has_cpe: bool = True
    """Cropped position embedding: in training, a random window of the table; else the table at the image's size."""
    interpolate_align_corners: bool = True
    """Whether the corners of table and image coincide when it is resampled: Megatron 0.16 True, Hugging Face False."""
    pos_dropout: float = 0.0
    """Part of the images, in training, that get no positions at all."""
    use_mask_token: bool = False
    """A learned token for patches that are hidden."""
    summary_idxs: tuple[int, ...] = (0,)
    """Class tokens that make up the summary of an image."""
    num_classes: int | None = None
    """Classes of a linear head on the summary; None for no head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_img_h", "max_img_w", "num_classes")
        require(
            min(self.position_grid) > 0,
            f"max_img_h={self.max_img_h} and max_img_w={self.max_img_w} must hold a patch_dim={self.patch_dim}",
        )
        require_fraction(self, "pos_dropout")
        require(
            self.num_classes is None or (bool(self.summary_idxs) and max(self.summary_idxs) < self.class_token_len),
            f"summary_idxs={self.summary_idxs} must name class tokens, of which there are class_token_len="
            f"{self.class_token_len}, for num_classes={self.num_classes} to be read from",
        )

    @property
    def draws_noise(self) -> bool:
        """Whether training depends on random numbers beside the first weights."""
        return super().draws_noise or self.has_cpe or self.pos_dropout > 0

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of positions."""
        return self.max_img_h // self.patch_dim, self.max_img_w // self.patch_dim
