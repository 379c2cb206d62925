"""Rotary position embedding (arXiv:2104.09864): inverse frequencies, their scalings, and the rotation."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, N heads, K head size, R rotated features of a head
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Rotary(NamedTuple):
    """cos and sin of each position's angles, both [B or 1, S, R] in fp32, ready to be applied to queries and keys."""

    cos: Array
    sin: Array
    interleaved: bool


def inverse_frequencies(dim: int, base: float) -> np.ndarray:
    """`base^(-2i/dim)` for i < dim/2, fp32 [dim/2]."""
    return (1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def llama3_scaling(
    inv_freq: np.ndarray, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are slowed down by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    smooth = (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    slow = np.where(wavelength > original_length / low_freq_factor, inv_freq / factor, blended)
    return np.where(wavelength < original_length / high_freq_factor, inv_freq, slow).astype(np.float32)


def yarn_inverse_frequencies(
    dim: int,
    base: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    round_to_int: bool = True,
) -> np.ndarray:
    """YaRN (arXiv:2309.00071): interpolate slow features by `factor`, keep fast ones, ramp linearly between."""

    def feature_with(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature_with(beta_fast), feature_with(beta_slow)
    if round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    plain = inverse_frequencies(dim, base)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: `0.1 mscale ln(factor) + 1` for factor > 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_concentration(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What cos and sin are multiplied by; with either mscale missing, the paper's own value."""
    if mscale is None or mscale_all_dim is None:
        return yarn_mscale(factor, 1.0)
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)


def dynamic_inverse_frequencies(dim: int, base: float, *, factor: float, original_length: int, length: Array) -> Array:
    """Dynamic NTK: the base grows with the sequence once `length` (a scalar) passes `original_length`."""
    length = jnp.maximum(length, original_length).astype(jnp.float32)
    grown = base * (factor * length / original_length - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / grown ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def angles(positions: Array, inv_freq: Array | np.ndarray, *, interleaved: bool = False) -> Array:
    """positions [...], inv_freq [R/2] -> the angle of each rotated feature [..., R], fp32.

    The two features that turn together stand R/2 apart, or side by side when `interleaved`.
    """
    half = positions.astype(jnp.float32)[..., None] * inv_freq
    return jnp.repeat(half, 2, axis=-1) if interleaved else jnp.concatenate([half, half], axis=-1)


def multimodal_angles(positions_3BS: Array, inv_freq: Array | np.ndarray, section: tuple[int, ...]) -> Array:
    """Three kinds of position of each token (time, height, width) -> angles fp32 [B, S, R] (M-RoPE, arXiv:2409.12191).

    section: how many pairs of features turn with each kind, in turn; sum R/2.
    """
    angles_3BSR = angles(positions_3BS, inv_freq)
    kind_R = np.repeat(np.arange(2 * len(section)) % 3, section * 2)
    return jnp.sum(jnp.where((kind_R == np.arange(3)[:, None])[:, None, None], angles_3BSR, 0.0), axis=0)


def apply_rotary(x_BSNK: Array, rotary: Rotary) -> Array:
    """Rotates the first R features of each head; the rest pass through."""
    dim = rotary.cos.shape[-1]
    turned, rest = x_BSNK[..., :dim], x_BSNK[..., dim:]
    cos, sin = (t[:, :, None, :].astype(x_BSNK.dtype) for t in (rotary.cos, rotary.sin))
    turned = turned * cos + _rotate_half(turned, rotary.interleaved) * sin
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _rotate_half(x: Array, interleaved: bool) -> Array:
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)
