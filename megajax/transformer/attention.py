"""Self- and cross-attention: projections around a core that may be swapped."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, D hidden, N query heads, G key/value heads, K head size
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import TransformerConfig
from megajax.config_parallel import ContextComm
from megajax.ops.attention import AttentionMask
from megajax.ops.flash_attention import FlashKernel
from megajax.ops.rope import Rotary, apply_rotary
from megajax.parallel.context import context_parallel_attention
from megajax.parallel.sharding import constrain, merge_tokens
from megajax.spec import Builder
from megajax.transformer.cache import Cache, empty, read, write
from megajax.transformer.linear import init_std, normal_init
from megajax.transformer.recompute import recomputed

Array = jax.Array


class CoreKernel(NamedTuple):
    """What computes attention, None for plain JAX; and how many features of a value are no padding."""

    kernel: FlashKernel | None = None
    value_size: int | None = None


class DotProductAttention(nn.Module):
    """The core in plain JAX. q [B, S, N, K], k and v [B, T, G, K] -> [B, S, N, K].

    Holds the learned attention sink, a parameter softmax_offset [N], when `softmax_type` is "learnable". Where the mesh
    divides the sequence, the devices meet as `cp_comm_type` says; `zigzag`: see `context_parallel_attention`.
    Megatron: `core/transformer/dot_product_attention.py`.
    """

    config: TransformerConfig
    cp_comm_type: ContextComm = "p2p"
    zigzag: bool = False

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array, *, mask: AttentionMask, deterministic: bool = True) -> Array:
        cfg = self.config
        fp32 = cfg.attention_softmax_in_fp32 or cfg.apply_query_key_layer_scaling
        drop = cfg.attention_dropout if not deterministic else 0.0
        sink_N = attention_sink(self, cfg)
        mask = dataclasses.replace(mask, softcap=cfg.attn_logit_softcapping)
        kernel, value_size = self.kernel(q, k, mask, deterministic=deterministic)
        if kernel is not None and self.is_initializing():
            return jnp.zeros_like(q)  # only parameters are wanted, of many layers at once, which kernels do not know
        return context_parallel_attention(
            q,
            k,
            v,
            mask=mask,
            comm=self.cp_comm_type,
            zigzag=self.zigzag,
            scale=softmax_scale(cfg),
            sink_N=sink_N,
            softmax_dtype=jnp.dtype(jnp.float32 if fp32 else q.dtype),
            dropout_rate=drop,
            dropout_key=self.make_rng("dropout") if drop else None,
            kernel=kernel,
            value_size=value_size,
        )

    def kernel(self, q: Array, k: Array, mask: AttentionMask, *, deterministic: bool) -> CoreKernel:
        """What computes this call."""
        del q, k, mask, deterministic
        return CoreKernel()


def softmax_scale(config: TransformerConfig) -> float:
    """What scores are multiplied by: `softmax_scale`, or one over the root of the head size."""
    return config.softmax_scale if config.softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels or 1)


def attention_sink(module: nn.Module, config: TransformerConfig) -> Array | None:
    """The extra logit of every head [N] that `softmax_type` asks for; a parameter of `module` if it is learned."""
    heads = (config.num_attention_heads,)
    if config.softmax_type == "learnable":
        return module.param("softmax_offset", normal_init(init_std(config), ("heads",)), heads, jnp.float32)
    return jnp.zeros(heads, jnp.float32) if config.softmax_type == "off-by-one" else None


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SelfAttentionSubmodules:
    """Slots of `SelfAttention`. q_layernorm, k_layernorm: None for none."""

    linear_qkv: Builder
    core_attention: Builder
    linear_proj: Builder
    q_layernorm: Builder | None = None
    k_layernorm: Builder | None = None


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far: [B, T, G, K] each, T the longest sequence there can be."""

    key: Cache
    value: Cache


class SelfAttention(nn.Module):
    """Multi-head attention of x to itself: MHA, GQA or MQA by `num_query_groups`.

    One kernel for each of q, k and v: stacked, they would have to be split across shards again.
    Megatron: `core/transformer/attention.py` (whose `linear_qkv` holds the three interleaved by group).
    """

    config: TransformerConfig
    submodules: SelfAttentionSubmodules

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
        """x [B, S, D] -> [B, S, D]. With `decode`, keys and values go into the "cache" collection at `mask.offset`."""
        cfg, sub = self.config, self.submodules
        # Flattened once: what the projections share, the backward pass then keeps once.
        x_TD, BS = merge_tokens(x_BSD), x_BSD.shape[:2]
        q_BSNK = self._heads("linear_q", "heads", cfg.num_attention_heads, x_TD, BS)
        k_BSGK = self._heads("linear_k", "kv_heads", cfg.num_query_groups, x_TD, BS)
        v_BSGK = self._heads("linear_v", "kv_heads", cfg.num_query_groups, x_TD, BS)
        if sub.q_layernorm is not None:
            q_BSNK = sub.q_layernorm(config=cfg, axis="head_dim", name="q_layernorm")(q_BSNK)
        if sub.k_layernorm is not None:
            k_BSGK = sub.k_layernorm(config=cfg, axis="head_dim", name="k_layernorm")(k_BSGK)
        if rotary is not None and cfg.no_rope_freq is None:
            q_BSNK, k_BSGK = apply_rotary(q_BSNK, rotary), apply_rotary(k_BSGK, rotary)
        if decode:
            k_BSGK, v_BSGK, mask = self._cached(k_BSGK, v_BSGK, mask)
        core = sub.core_attention(config=cfg, name="core_attention")
        mask = dataclasses.replace(mask, window=cfg.window_size)
        y_BSNK = recomputed(core, "core_attn", cfg)(q_BSNK, k_BSGK, v_BSGK, mask=mask, deterministic=deterministic)
        if cfg.attention_output_gate:
            gate_BSNK = self._heads("linear_gate", "heads", cfg.num_attention_heads, x_TD, BS)
            y_BSNK = (y_BSNK * jax.nn.sigmoid(gate_BSNK.astype(jnp.float32))).astype(x_BSD.dtype)
        y_BSE = constrain(y_BSNK.reshape(*y_BSNK.shape[:2], -1), "batch", "seq", "act_heads")
        proj_bias = cfg.add_attention_proj_bias
        y_BSD = sub.linear_proj(
            config=cfg, features=cfg.hidden_size, axis="heads", use_bias=proj_bias, name="linear_proj"
        )(y_BSE)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

    def _heads(self, name: str, axis: str, heads: int | None, x_TD: Array, shape: tuple[int, ...]) -> Array:
        """x [T, D] (or [B, S, D]) projected to heads [*shape, heads, K]."""
        cfg = self.config
        assert heads is not None
        assert cfg.kv_channels is not None
        use_bias = cfg.add_bias_linear or cfg.add_qkv_bias
        project = self.submodules.linear_qkv(
            config=cfg, features=heads * cfg.kv_channels, axis=axis, use_bias=use_bias, name=name
        )

        return constrain(project(x_TD).reshape(*shape, heads, cfg.kv_channels), "batch", "seq", f"act_{axis}", None)

    def _cached(self, k_BSGK: Array, v_BSGK: Array, mask: AttentionMask) -> tuple[Array, Array, AttentionMask]:
        """Keys and values to attend to, and the mask of these."""
        axes = ("batch", None, "act_kv_heads", None)
        cache = self.variable(
            "cache", "kv", lambda: KVCache(*(empty(x.shape, x.dtype, *axes) for x in (k_BSGK, v_BSGK)))
        )
        if not self.is_initializing():
            start = (0, mask.start, 0, 0)
            cache.value = KVCache(write(cache.value.key, k_BSGK, start), write(cache.value.value, v_BSGK, start))
        alone = mask.without_cache()
        if alone is not None:
            return k_BSGK, v_BSGK, alone
        return read(cache.value.key), read(cache.value.value), mask


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class CrossAttentionSubmodules:
    """Slots of `CrossAttention`."""

    linear_q: Builder
    linear_kv: Builder
    core_attention: Builder
    linear_proj: Builder


class CrossAttention(nn.Module):
    """Attention of x [B, S, D] to a context [B, T, E]: as many key/value as query heads.

    rotary: of the places of x and of those of the context, which then count along one line. Megatron has none.
    Megatron: `CrossAttention` in `core/transformer/attention.py`.
    """

    config: TransformerConfig
    submodules: CrossAttentionSubmodules

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        context_BTE: Array | None,
        *,
        mask: AttentionMask,
        rotary: tuple[Rotary, Rotary] | None = None,
        decode: bool = False,
        deterministic: bool = True,
    ) -> Array:
        """With `decode`, the context's keys and values stay in the "cache" collection; later calls have no context."""
        cfg, sub = self.config, self.submodules
        N, K = cfg.num_attention_heads, cfg.kv_channels
        assert K is not None
        bias = cfg.add_bias_linear  # and not add_qkv_bias, which is for self-attention

        def heads(build: Builder, name: str, inputs: Array) -> Array:
            y = build(config=cfg, features=N * K, axis="heads", use_bias=bias, name=name)(inputs)
            return constrain(y.reshape(*inputs.shape[:2], N, K), "batch", "seq", "act_heads", None)

        q_BSNK = heads(sub.linear_q, "linear_q", x_BSD)
        q_BSNK = q_BSNK if rotary is None else apply_rotary(q_BSNK, rotary[0])
        if context_BTE is None:
            k_BTNK, v_BTNK = (read(kept) for kept in self.get_variable("cache", "kv"))
        else:
            k_BTNK = heads(sub.linear_kv, "linear_k", context_BTE)
            v_BTNK = heads(sub.linear_kv, "linear_v", context_BTE)
            k_BTNK = k_BTNK if rotary is None else apply_rotary(k_BTNK, rotary[1])
            if decode:
                self._keep(k_BTNK, v_BTNK)
        core = sub.core_attention(config=cfg, name="core_attention")
        y_BSNK = recomputed(core, "core_attn", cfg)(q_BSNK, k_BTNK, v_BTNK, mask=mask, deterministic=deterministic)
        y_BSE = constrain(y_BSNK.reshape(*y_BSNK.shape[:2], -1), "batch", "seq", "act_heads")
        y_BSD = sub.linear_proj(
            config=cfg, features=cfg.hidden_size, axis="heads", use_bias=cfg.add_attention_proj_bias, name="linear_proj"
        )(y_BSE)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

    def _keep(self, k_BTNK: Array, v_BTNK: Array) -> None:
        axes = ("batch", None, "act_heads", None)
        cache = self.variable(
            "cache", "kv", lambda: KVCache(*(empty(x.shape, x.dtype, *axes) for x in (k_BTNK, v_BTNK)))
        )
        if not self.is_initializing():
            start = (0, 0, 0, 0)
            cache.value = KVCache(write(cache.value.key, k_BTNK, start), write(cache.value.value, v_BTNK, start))
