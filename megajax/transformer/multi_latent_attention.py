"""Multi-latent attention: keys and values of all heads come from one narrow latent (arXiv:2405.04434)."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, D hidden, N heads, C latent of keys and values, P features with a position,
# H features without one, V features of a value, K = H + P, E = C + P
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.attention import AttentionMask
from megajax.ops.rope import Rotary, apply_rotary, yarn_mscale
from megajax.parallel.sharding import constrain
from megajax.spec import Builder
from megajax.transformer.cache import empty, read, write
from megajax.transformer.linear import ColumnParallelLinear
from megajax.transformer.recompute import recomputed

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MLASelfAttentionSubmodules:
    """Slots of `MultiLatentAttention`. q_layernorm, kv_layernorm: norms of the latents, None for none."""

    linear_q_proj: Builder
    linear_q_down_proj: Builder
    linear_q_up_proj: Builder
    linear_kv_down_proj: Builder
    linear_kv_up_proj: Builder
    core_attention: Builder
    linear_proj: Builder
    q_layernorm: Builder | None = None
    kv_layernorm: Builder | None = None


class Latents(NamedTuple):
    """What keys and values are made of: latent [B, T, C] and the rotated part of the keys, of all heads, [B, T, P]."""

    latent: Array
    key: Array


class MultiLatentAttention(nn.Module):
    """x [B, S, D] -> [B, S, D]. Megatron: `MLASelfAttention` in `transformer/multi_latent_attention.py`.

    A query head is [H without position | P rotated]; a key head is its own H features and the P that all heads share.
    Decoding keeps latents, and attends to these themselves where that takes fewer products (2.1.2 of the paper).
    `add_qkv_bias` gives biases to the projections down to the latents alone.
    """

    config: TransformerConfig
    submodules: MLASelfAttentionSubmodules

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        *,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """With `decode`, latent and rotated key go into the "cache" collection at `mask.offset`."""
        cfg, sub = self.config, self.submodules
        q_BSNK, seen = self._queries(x_BSD, rotary), self._latents(x_BSD, rotary)
        if decode:
            seen, mask = self._cached(seen, mask)
        features = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
        up = sub.linear_kv_up_proj(
            config=cfg, features=features, axis="heads", use_bias=False, name="linear_kv_up_proj"
        )
        core = sub.core_attention(config=self._core_config(), name="core_attention")
        mask = dataclasses.replace(mask, window=cfg.window_size)
        attend = partial(recomputed(core, "core_attn", cfg), mask=mask, deterministic=deterministic)
        up_CF = self._absorbable(up, q_BSNK, seen) if mask.offset is not None else None
        if up_CF is None:
            y_BSNV = self._attend_to_heads(attend, q_BSNK, seen, up(seen.latent))
        else:
            y_BSNV = self._attend_to_latents(attend, q_BSNK, seen, up_CF)
        y_BSE = constrain(y_BSNV.reshape(*y_BSNV.shape[:2], -1), "batch", "seq", "act_heads")
        proj_bias = cfg.add_attention_proj_bias
        y_BSD = sub.linear_proj(
            config=cfg, features=cfg.hidden_size, axis="heads", use_bias=proj_bias, name="linear_proj"
        )(y_BSE)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

    def _attend_to_heads(self, attend: Callable[..., Array], q_BSNK: Array, seen: Latents, up_BTF: Array) -> Array:
        """Attention to keys and values of each head; up_BTF: what the latents are projected to."""
        N, H, V = self.config.num_attention_heads, self.config.qk_head_dim, self.config.v_head_dim
        k_BTNH, v_BTNV = jnp.split(_heads(up_BTF, N), [H], axis=-1)
        shared_BTNP = jnp.broadcast_to(seen.key[:, :, None], (*k_BTNH.shape[:3], seen.key.shape[-1]))
        k_BTNK = jnp.concatenate([k_BTNH, shared_BTNP], axis=-1)
        # Cores take heads of one size: what is missing is zero, which adds nothing to a score or a value.
        width = max(k_BTNK.shape[-1], V)
        return attend(*(_widened(x, width) for x in (q_BSNK, k_BTNK, v_BTNV)))[..., :V]

    def _attend_to_latents(self, attend: Callable[..., Array], q_BSNK: Array, seen: Latents, up_CF: Array) -> Array:
        """The same with the projection absorbed: q (W c) = (W^T q) c, and a sum of W c is W of the sum of c.

        All heads then have the latents as one key and one value, and nothing of the size [B, T, N, ...] is made.
        """
        cfg = self.config
        N, H, C = cfg.num_attention_heads, cfg.qk_head_dim, cfg.kv_lora_rank
        up_CNH, up_CNV = jnp.split(up_CF.reshape(C, N, -1), [H], axis=-1)
        q_BSNH, q_BSNP = jnp.split(q_BSNK, [H], axis=-1)
        q_BSNE = jnp.concatenate([jnp.einsum("BSNH,CNH->BSNC", q_BSNH, up_CNH), q_BSNP], axis=-1)
        q_BSNE = constrain(q_BSNE, "batch", "seq", "act_heads", None)
        seen_BTE = jnp.concatenate(seen, axis=-1)[:, :, None]
        y_BSNC = attend(q_BSNE, seen_BTE, seen_BTE)[..., :C]
        return jnp.einsum("BSNC,CNV->BSNV", y_BSNC, up_CNV)

    def _absorbable(self, up: nn.Module, q_BSNK: Array, seen: Latents) -> Array | None:
        """The matrix [C, N (H + V)] of the projection to heads where it is to be absorbed: for few queries. Else None,
        as for a linear of one's own, or in fp8, which may be no product with a matrix."""
        cfg, (S, T) = self.config, (q_BSNK.shape[1], seen.latent.shape[1])
        C, heads = cfg.kv_lora_rank, cfg.qk_head_dim + cfg.v_head_dim
        by_heads, by_latents = T * C * heads + S * T * heads, S * C * heads + S * T * 2 * C  # products, of a head
        if self.is_initializing() or by_heads <= by_latents or type(up) is not ColumnParallelLinear:
            return None
        return up.matrix(q_BSNK.dtype)

    def _core_config(self) -> TransformerConfig:
        cfg = self.config
        temperature = yarn_mscale(cfg.yarn_rotary_scaling_factor, cfg.yarn_mscale_all_dim or 0.0) ** 2
        scale = temperature / math.sqrt(cfg.qk_head_dim + cfg.qk_pos_emb_head_dim)
        return dataclasses.replace(cfg, softmax_scale=scale, num_query_groups=cfg.num_attention_heads)

    def _up(self, build: Builder, name: str, features: int, x: Array) -> Array:
        """To heads, from a latent or from x itself."""
        return build(config=self.config, features=features, axis="heads", use_bias=False, name=name)(x)

    def _down(self, build: Builder, name: str, features: int, x_BSD: Array) -> Array:
        """To a latent."""
        bias = self.config.add_qkv_bias
        return build(config=self.config, features=features, axis="whole", use_bias=bias, name=name)(x_BSD)

    def _norm(self, build: Builder | None, name: str, latent: Array) -> Array:
        if build is None:
            return latent
        cfg = self.config
        if cfg.latent_layernorm_epsilon is not None:
            cfg = dataclasses.replace(cfg, layernorm_epsilon=cfg.latent_layernorm_epsilon)
        return build(config=cfg, axis="head_dim", name=name)(latent)

    def _rotated(self, x_BSNP: Array, rotary: Rotary | None) -> Array:
        """x rotated. Pairs that stood side by side are then half the width apart, which a product does not see."""
        if rotary is None:
            return x_BSNP
        turned, rest = jnp.split(x_BSNP, [rotary.cos.shape[-1]], axis=-1)
        if self.config.qk_pos_emb_interleaved:
            turned = turned.reshape(*turned.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(turned.shape)
        return jnp.concatenate([apply_rotary(turned, rotary), rest], axis=-1)

    def _queries(self, x_BSD: Array, rotary: Rotary | None) -> Array:
        q_BSNH, q_BSNP = jnp.split(self._unrotated_queries(x_BSD), [self.config.qk_head_dim], axis=-1)
        return jnp.concatenate([q_BSNH, self._rotated(q_BSNP, rotary)], axis=-1)

    def _latents(self, x_BSD: Array, rotary: Rotary | None) -> Latents:
        cfg, sub = self.config, self.submodules
        features = cfg.kv_lora_rank + cfg.qk_pos_emb_head_dim
        down_BTE = self._down(sub.linear_kv_down_proj, "linear_kv_down_proj", features, x_BSD)
        latent_BTC, key_BTP = jnp.split(down_BTE, [cfg.kv_lora_rank], axis=-1)
        key_BTP = self._rotated(key_BTP[:, :, None], rotary)[:, :, 0]
        return Latents(self._norm(sub.kv_layernorm, "kv_layernorm", latent_BTC), key_BTP)

    def _unrotated_queries(self, x_BSD: Array) -> Array:
        cfg, sub, N = self.config, self.submodules, self.config.num_attention_heads
        features = N * (cfg.qk_head_dim + cfg.qk_pos_emb_head_dim)
        if cfg.q_lora_rank is None:
            return _heads(self._up(sub.linear_q_proj, "linear_q_proj", features, x_BSD), N)
        latent_BSC = self._down(sub.linear_q_down_proj, "linear_q_down_proj", cfg.q_lora_rank, x_BSD)
        latent_BSC = self._norm(sub.q_layernorm, "q_layernorm", latent_BSC)
        return _heads(self._up(sub.linear_q_up_proj, "linear_q_up_proj", features, latent_BSC), N)

    def _cached(self, new: Latents, mask: AttentionMask) -> tuple[Latents, AttentionMask]:
        """What to attend to, and the mask of that. In the cache, latent and key lie side by side."""
        new_BTE = jnp.concatenate(new, axis=-1)
        cache = self.variable("cache", "latent", lambda: empty(new_BTE.shape, new_BTE.dtype, "batch", None, None))
        if not self.is_initializing():
            cache.value = write(cache.value, new_BTE, (0, mask.start, 0))
        alone = mask.without_cache()
        if alone is not None:
            return new, alone
        return Latents(*jnp.split(read(cache.value), [new.latent.shape[-1]], axis=-1)), mask


def _heads(x_BSE: Array, heads: int) -> Array:
    return constrain(x_BSE.reshape(*x_BSE.shape[:2], heads, -1), "batch", "seq", "act_heads", None)


def _widened(x: Array, width: int) -> Array:
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x
