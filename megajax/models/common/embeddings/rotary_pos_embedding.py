"""Rotary position embedding, usable on its own: positions in, angles out."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, R rotated features of a head
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError, RopeScaling
from megajax.ops import rope
from megajax.ops.rope import Rotary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary embedding (arXiv:2104.09864) with the scalings that published models use. Holds no parameters.

    Megatron: `core/models/common/embeddings/rotary_pos_embedding.py`.

    Attributes:
      kv_channels: size of a head.
      rotary_percent: part of each head that is rotated.
      rotary_interleaved: rotate neighbouring features instead of halves.
      seq_len_interpolation_factor: positions are divided by this.
      rotary_base: wavelength base.
      rope_scaling: "none", "llama3" (True means this), "dynamic" (NTK) or "longrope" (arXiv:2402.13753).
      rope_scaling_factor: by how much the context was extended.
      low_freq_factor, high_freq_factor: llama3's band of blended wavelengths.
      original_max_position_embeddings: the length before extension.
      short_factor, long_factor: longrope's divisors of each frequency, below and beyond the original length.
      attention_factor: multiplies cos and sin; None is 1, with longrope `sqrt(1 + ln(factor) / ln(original))`.

    Example:
      >>> angles = RotaryEmbedding(kv_channels=64)(max_seq_len=128)  # [128, 64]
    """

    kv_channels: int
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    seq_len_interpolation_factor: float | None = None
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | bool = "none"
    rope_scaling_factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None

    @property
    def dim(self) -> int:
        """Rotated features of each head."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def scaling(self) -> str:
        """The scaling method by name."""
        return {True: "llama3", False: "none"}.get(self.rope_scaling, self.rope_scaling)  # type: ignore[call-overload]

    @property
    def inv_freq(self) -> np.ndarray:
        """Radians per position of each pair of features, fp32 [R/2]; of the methods that do not depend on length."""
        plain = rope.inverse_frequencies(self.dim, self.rotary_base)
        if self.scaling != "llama3":
            return plain
        return rope.llama3_scaling(
            plain,
            factor=self.rope_scaling_factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_length=self.original_max_position_embeddings,
        )

    def __call__(self, max_seq_len: int, offset: int = 0) -> Array:
        """Angles of positions offset ... offset + max_seq_len - 1: fp32 [max_seq_len, R]."""
        return self.angles(jnp.arange(max_seq_len) + offset)

    def angles(self, positions: Array) -> Array:
        """positions int [...] -> angles fp32 [..., R]."""
        scaled = positions.astype(jnp.float32)
        if self.seq_len_interpolation_factor is not None:
            scaled = scaled / self.seq_len_interpolation_factor
        return rope.angles(scaled, self._inv_freq_at(positions), interleaved=self.rotary_interleaved)

    def rotary(self, positions: Array) -> Rotary:
        """positions int [B or 1, S] -> cos and sin to rotate queries and keys with."""
        angles = self.angles(positions)
        scale = self._concentration()
        return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale, self.rotary_interleaved)

    def _inv_freq_at(self, positions: Array) -> Array | np.ndarray:
        length = jnp.max(positions) + 1
        if self.scaling == "dynamic":
            return rope.dynamic_inverse_frequencies(
                self.dim,
                self.rotary_base,
                factor=self.rope_scaling_factor,
                original_length=self.original_max_position_embeddings,
                length=length,
            )
        if self.scaling == "longrope":
            if self.short_factor is None or self.long_factor is None:
                raise ConfigError("rope_scaling='longrope' needs short_factor and long_factor")
            long = length > self.original_max_position_embeddings
            long_factor, short_factor = (np.asarray(f, np.float32) for f in (self.long_factor, self.short_factor))
            return self.inv_freq / jnp.where(long, long_factor, short_factor)
        return self.inv_freq

    def _concentration(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling != "longrope" or self.rope_scaling_factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.rope_scaling_factor) / math.log(self.original_max_position_embeddings))


@dataclasses.dataclass(frozen=True)
class MultimodalRotaryEmbedding:
    """Rotary embedding of tokens that have a place in time, height and width (M-RoPE, arXiv:2409.12191).

    Holds no parameters; halves are rotated, never neighbours. Megatron: the class of this name in
    `core/models/common/embeddings/rotary_pos_embedding.py`.

    Attributes:
      kv_channels, rotary_percent, rotary_base, seq_len_interpolation_factor: as in `RotaryEmbedding`.
      mrope_section: pairs of features that turn with each of the three positions, in turn.
    """

    kv_channels: int
    mrope_section: tuple[int, ...]
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    seq_len_interpolation_factor: float | None = None

    @property
    def inv_freq(self) -> np.ndarray:
        """Radians per position of each pair of features, fp32 [R/2]."""
        return rope.inverse_frequencies(int(self.kv_channels * self.rotary_percent), self.rotary_base)

    def __call__(self, position_ids: Array) -> Array:
        """position_ids int [3, B, S]; or, the same in all three, as text has it, [B or 1, S] -> angles [B, S, R]."""
        positions = position_ids if position_ids.ndim == 3 else jnp.broadcast_to(position_ids, (3, *position_ids.shape))
        scaled = positions.astype(jnp.float32)
        if self.seq_len_interpolation_factor is not None:
            scaled = scaled / self.seq_len_interpolation_factor
        return rope.multimodal_angles(scaled, self.inv_freq, self.mrope_section)

    def rotary(self, positions: Array) -> Rotary:
        """Positions as for `__call__` -> cos and sin to rotate queries and keys with."""
        angles = self(positions)
        return Rotary(jnp.cos(angles), jnp.sin(angles), False)
