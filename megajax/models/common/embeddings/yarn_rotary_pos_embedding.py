"""YaRN: rotary embedding for a context longer than the one a model was trained with."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError
from megajax.ops import rope
from megajax.ops.rope import Rotary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class YarnRotaryEmbedding:
    """YaRN (arXiv:2309.00071). Holds no parameters. Halves are rotated, never neighbours.

    Megatron: `core/models/common/embeddings/yarn_rotary_pos_embedding.py`.

    Attributes:
      kv_channels: size of a head.
      rotary_percent: part of each head that is rotated.
      rotary_interleaved: must be False.
      rotary_base: wavelength base.
      scaling_factor: by how much the context was extended.
      original_max_position_embeddings: the length before extension.
      beta_fast, beta_slow: rotations over the original length above which a feature is kept, below which it is
        interpolated.
      mscale, mscale_all_dim: numerator and denominator of the concentration factor; either None gives the paper's.
      correction_range_round_to_int: round the ramp's ends to whole features.
      attention_factor: the concentration factor itself, if a checkpoint states it.
    """

    kv_channels: int
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rotary_base: float = 10000.0
    scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 0.0
    correction_range_round_to_int: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rotary_interleaved:
            raise ConfigError("rotary_interleaved=True is not defined for YaRN; use RotaryEmbedding or drop it")

    @property
    def inv_freq(self) -> np.ndarray:
        """Radians per position of each pair of features, fp32 [R/2]."""
        return rope.yarn_inverse_frequencies(
            int(self.kv_channels * self.rotary_percent),
            self.rotary_base,
            factor=self.scaling_factor,
            original_length=self.original_max_position_embeddings,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            round_to_int=self.correction_range_round_to_int,
        )

    @property
    def concentration(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return rope.yarn_concentration(self.scaling_factor, self.mscale, self.mscale_all_dim)

    def __call__(self, max_seq_len: int, offset: int = 0) -> tuple[Array, float]:
        """(angles of positions offset ... offset + max_seq_len - 1, fp32 [max_seq_len, R]; concentration factor)."""
        return self.angles(jnp.arange(max_seq_len) + offset), self.concentration

    def angles(self, positions: Array) -> Array:
        """positions int [...] -> angles fp32 [..., R]."""
        return rope.angles(positions, self.inv_freq)

    def rotary(self, positions: Array) -> Rotary:
        """positions int [B or 1, S] -> cos and sin to rotate queries and keys with."""
        angles = self.angles(positions)
        return Rotary(jnp.cos(angles) * self.concentration, jnp.sin(angles) * self.concentration, False)
