"""Options of position embeddings: a part of `TransformerConfig`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config_checks import require

PositionEmbedding = Literal["learned_absolute", "rope", "yarn", "mrope", "none"]
RopeScaling = Literal["none", "llama3", "dynamic", "longrope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How a token's place enters: learned, or by turning queries and keys; Megatron's names."""

    # Positions
    position_embedding_type: PositionEmbedding = "learned_absolute"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    seq_len_interpolation_factor: float | None = None
    """Linear position interpolation: positions are divided by this."""
    rope_scaling_type: RopeScaling = "none"
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    """The length the model was first trained at (llama3, dynamic, longrope)."""
    rope_short_factor: tuple[float, ...] | None = None
    rope_long_factor: tuple[float, ...] | None = None
    rope_attention_factor: float | None = None
    """Multiplies cos and sin (longrope and yarn); None takes the method's own rule."""
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = 1.0
    yarn_mscale_all_dim: float | None = 0.0
    yarn_correction_range_round_to_int: bool = True
    mrope_section: tuple[int, ...] | None = None
    """Pairs of features that turn with each kind of position, time, height and width, one after the other; their sum is
    half of the rotated features (`position_embedding_type` mrope)."""
    no_rope_freq: int | tuple[int, ...] | None = None
    """int N: every N-th layer has no rotary embedding; or a 0/1 list, 1 = none."""

    def _validate_positions(self, rotary_dim: int) -> None:
        """rotary_dim: features of each head that are rotated."""
        require(0 < self.rotary_percent <= 1, f"rotary_percent={self.rotary_percent} must be above 0 and at most 1")
        if self.position_embedding_type in ("rope", "yarn", "mrope"):
            require(
                rotary_dim % 2 == 0,
                f"rotary_percent={self.rotary_percent} rotates {rotary_dim} features of each head; the number must be"
                " even",
            )
        require(
            self.position_embedding_type not in ("yarn", "mrope") or not self.rotary_interleaved,
            f"rotary_interleaved=True is not defined for position_embedding_type={self.position_embedding_type!r}; use"
            " 'rope'",
        )
        self._validate_sections(rotary_dim)
        if self.rope_scaling_type == "longrope":
            for name in ("rope_short_factor", "rope_long_factor"):
                factors = getattr(self, name)
                require(
                    factors is not None and len(factors) == rotary_dim // 2,
                    f"{name} needs {rotary_dim // 2} numbers (half the rotated features) with longrope",
                )

    def _validate_sections(self, rotary_dim: int) -> None:
        multimodal, section = self.position_embedding_type == "mrope", self.mrope_section
        require(
            multimodal == (section is not None),
            f"mrope_section={section} and position_embedding_type={self.position_embedding_type!r}: 'mrope' and its"
            " sections go together",
        )
        if section is not None:
            require(
                min(section, default=0) > 0 and 2 * sum(section) == rotary_dim,
                f"mrope_section={section} must be sizes whose sum is half of the {rotary_dim} rotated features",
            )
        for name in ("multi_latent_attention", "mtp_num_layers"):
            require(
                not (multimodal and getattr(self, name)),
                f"{name}={getattr(self, name)} is not possible with position_embedding_type='mrope'; drop one",
            )
