"""Multi-latent attention: keys and values of all heads come from one narrow latent (arXiv:2405.04434)."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, D hidden, N heads, C latent of keys and values, P features with a position,
# H features without one, V features of a value
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.ops.attention import AttentionMask
from megajax.ops.rope import Rotary, apply_rotary, yarn_mscale
from megajax.parallel.sharding import constrain
from megajax.spec import Builder
from megajax.transformer.cache import Cache, empty, read, write
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


class LatentCache(NamedTuple):
    """What the positions seen so far leave behind: latent [B, T, C] and rotated key [B, T, P]."""

    latent: Cache
    key: Cache


class MultiLatentAttention(nn.Module):
    """x [B, S, D] -> [B, S, D]. Megatron: `MLASelfAttention` in `transformer/multi_latent_attention.py`.

    A query head is [H without position | P rotated]; a key head is its own H features and the P that all heads share.
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
        N, H, P, V = cfg.num_attention_heads, cfg.qk_head_dim, cfg.qk_pos_emb_head_dim, cfg.v_head_dim
        q_BSNK = self._queries(x_BSD)
        q_BSNK = jnp.concatenate([q_BSNK[..., :H], self._rotated(q_BSNK[..., H:], rotary)], axis=-1)

        down_BSE = self._down(sub.linear_kv_down_proj, "linear_kv_down_proj", cfg.kv_lora_rank + P, x_BSD)
        latent_BTC, key_BTP = jnp.split(down_BSE, [cfg.kv_lora_rank], axis=-1)
        key_BTP = self._rotated(key_BTP[:, :, None], rotary)[:, :, 0]
        latent_BTC = self._norm(sub.kv_layernorm, "kv_layernorm", latent_BTC)
        if decode:
            latent_BTC, key_BTP, mask = self._cached(latent_BTC, key_BTP, mask)
        up_BTE = self._up(sub.linear_kv_up_proj, "linear_kv_up_proj", N * (H + V), latent_BTC)
        k_BTNH, v_BTNV = jnp.split(_heads(up_BTE, N), [H], axis=-1)
        shared_BTNP = jnp.broadcast_to(key_BTP[:, :, None], (*k_BTNH.shape[:3], P))
        k_BTNK = jnp.concatenate([k_BTNH, shared_BTNP], axis=-1)

        # Cores take heads of one size: what is missing is zero, which adds nothing to a score or a value.
        width = max(H + P, V)
        q, k, v = (_widened(x, width) for x in (q_BSNK, k_BTNK, v_BTNV))
        core = sub.core_attention(config=self._core_config(), name="core_attention")
        mask = dataclasses.replace(mask, window=cfg.window_size)
        y_BSNK = recomputed(core, "core_attn", cfg)(q, k, v, mask=mask, deterministic=deterministic)
        y_BSNV = y_BSNK[..., :V]
        y_BSE = constrain(y_BSNV.reshape(*y_BSNV.shape[:2], -1), "batch", "seq", "act_heads")
        proj_bias = cfg.add_attention_proj_bias
        y_BSD = sub.linear_proj(
            config=cfg, features=cfg.hidden_size, axis="heads", use_bias=proj_bias, name="linear_proj"
        )(y_BSE)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

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

    def _queries(self, x_BSD: Array) -> Array:
        cfg, sub, N = self.config, self.submodules, self.config.num_attention_heads
        features = N * (cfg.qk_head_dim + cfg.qk_pos_emb_head_dim)
        if cfg.q_lora_rank is None:
            return _heads(self._up(sub.linear_q_proj, "linear_q_proj", features, x_BSD), N)
        latent_BSC = self._down(sub.linear_q_down_proj, "linear_q_down_proj", cfg.q_lora_rank, x_BSD)
        latent_BSC = self._norm(sub.q_layernorm, "q_layernorm", latent_BSC)
        return _heads(self._up(sub.linear_q_up_proj, "linear_q_up_proj", features, latent_BSC), N)

    def _cached(self, latent: Array, key: Array, mask: AttentionMask) -> tuple[Array, Array, AttentionMask]:
        """Latents and rotated keys to attend to, and the mask of these."""
        axes = ("batch", None, None)
        cache = self.variable(
            "cache", "latent", lambda: LatentCache(*(empty(x.shape, x.dtype, *axes) for x in (latent, key)))
        )
        if not self.is_initializing():
            start = (0, mask.start, 0)
            cache.value = LatentCache(write(cache.value.latent, latent, start), write(cache.value.key, key, start))
        alone = mask.without_cache()
        if alone is not None:
            return latent, key, alone
        return read(cache.value.latent), read(cache.value.key), mask


def _heads(x_BSE: Array, heads: int) -> Array:
    return constrain(x_BSE.reshape(*x_BSE.shape[:2], heads, -1), "batch", "seq", "act_heads", None)


def _widened(x: Array, width: int) -> Array:
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x
