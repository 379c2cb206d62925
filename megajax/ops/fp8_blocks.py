"""Arrays rounded to fp8 in blocks: the numbers of a block share a scale, a power of two.

Of MXFP8 (the microscaling format of the Open Compute Project) a block is 32 neighbours along the terms of a sum. Of
Transformer Engine's Float8BlockScaling, DeepSeek-V3's recipe (arXiv:2412.19437, section 3.3), it is 128 of them, or
128 x 128 of a weight; its rule for scales (`common/recipe/recipe_common.cuh`, by default power_2_scale and
amax_epsilon=0) is that of MXFP8: the smallest power of two with which nothing exceeds the type's largest number, 1 for
zeros. DeepSeek-V3 had powers of two for some tensors only; Transformer Engine leaves the others to an environment
variable.
"""

# SPDX-License-Identifier: Apache-2.0
# M rows, K terms of a sum; E experts, R rows of all of them, D and F widths
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

TILE = 128
"""Numbers of a block, in each of its dims, of Float8BlockScaling."""
MX_BLOCK = 32
"""Numbers of a block of MXFP8."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array [..., M, K], nearly: values fp8 [..., M, K], K filled up with zeros to whole blocks, each times the
    scale of its block, fp32 [..., ceil(M / rows), K / terms], where `block` is (rows, terms)."""

    values: Array
    scales: Array
    block: tuple[int, int]

    def numbers(self) -> Array:
        """[..., M, K] in fp32."""
        scales = self.scales
        for axis, size in zip((-2, -1), self.block, strict=True):
            scales = jnp.repeat(scales, size, axis=axis)
        return self.values.astype(jnp.float32) * scales[..., : self.values.shape[-2], :]

    def mx_scales(self) -> Array:
        """The scales as those of MXFP8, of which a larger block is several: float8_e8m0fnu [..., M, K / MX_BLOCK]."""
        rows, terms = self.block
        scales = jnp.repeat(self.scales, rows, axis=-2)[..., : self.values.shape[-2], :]
        return jnp.repeat(scales, terms // MX_BLOCK, axis=-1).astype(jnp.float8_e8m0fnu)


def in_blocks(x_MK: Array, dtype: Any, block: tuple[int, int]) -> Blocks:
    """x [M, K] or [E, M, K], rounded."""
    if x_MK.ndim == 3:
        return jax.vmap(lambda x: in_blocks(x, dtype, block))(x_MK)
    (M, K), (rows, terms) = x_MK.shape, block
    x = jnp.pad(x_MK.astype(jnp.float32), ((0, -M % rows), (0, -K % terms)))
    x = x.reshape(-(-M // rows), rows, -(-K // terms), terms)
    most = float(jnp.finfo(dtype).max)
    fraction, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=(1, 3)) / most)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)  # a power of two itself
    exponent = jnp.clip(jnp.where(fraction == 0, 0, exponent), -126, 127)
    scales = jnp.ldexp(jnp.ones(exponent.shape, jnp.float32), exponent)  # exp2 is not exact everywhere
    values = jnp.clip(x / scales[:, None, :, None], -most, most).astype(dtype)
    return Blocks(values.reshape(-1, values.shape[2] * terms)[:M], scales, block)
