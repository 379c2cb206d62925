"""The mixer of Mamba-2: projections, convolution and state space, gate and norm (arXiv:2405.21060)."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, D hidden, H heads, P head size, E = H P inner size, G groups, N state size, M = G N, K tokens
# that the convolution sees
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.config import ConfigError
from megajax.ops.attention import AttentionMask
from megajax.ops.ssd import gated, gated_group_rms_norm
from megajax.ops.state_space import Convolution, Dynamics, Projected, Sizes, Window, mix
from megajax.parallel.sharding import constrain, merge_tokens
from megajax.spec import Builder
from megajax.ssm.mamba_config import MambaConfig
from megajax.ssm.state_space import StateSpace
from megajax.transformer.cache import empty, is_cache, read, write

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MambaMixerSubmodules:
    """Slots of `MambaMixer`."""

    in_proj: Builder
    core: Builder = StateSpace
    out_proj: Builder


class MambaCache(NamedTuple):
    """What the tokens so far leave behind: the last K - 1 inputs of the convolutions, and the state [B, H, P, N]."""

    window: Window
    state: Array


class MambaMixer(nn.Module):
    """Gate z, x, B, C and step sizes from one input; a state space over x, gated and normalised; back to D.

    One kernel for each part of the projection and of the convolution: stacked, as Megatron's `in_proj` [z, x, B, C, dt]
    and `conv1d` [x, B, C] are, they would have to be split across shards again.
    Megatron: `core/ssm/mamba_mixer.py`.
    """

    config: MambaConfig
    submodules: MambaMixerSubmodules

    @nn.compact
    def __call__(self, x_BSD: Array, *, mask: AttentionMask, decode: bool = False, deterministic: bool = True) -> Array:
        """x [B, S, D] -> [B, S, D].

        Of `mask`, segment ids reset the state, and keys that are hidden from all queries are skipped. With `decode`,
        the "cache" collection holds what earlier calls left; a call at offset 0 begins anew.
        """
        del deterministic  # there is no dropout in here
        cfg, sub = self.config, self.submodules
        E, M = cfg.mamba_inner_size, cfg.mamba_num_groups * cfg.mamba_state_dim
        x_TD, BS = merge_tokens(x_BSD), x_BSD.shape[:2]

        def project(name: str, features: int, axis: str) -> Array:
            linear = sub.in_proj(config=cfg, features=features, axis=axis, use_bias=cfg.mamba_proj_bias, name=name)
            return constrain(linear(x_TD).reshape(*BS, features), "batch", "seq", f"act_{axis}")

        z_BSE = project("in_proj_z", E, "ssm_heads")
        parts = Projected(
            project("in_proj_x", E, "ssm_heads"),
            project("in_proj_B", M, "ssm_groups"),
            project("in_proj_C", M, "ssm_groups"),
            self._step_sizes(project("in_proj_dt", cfg.mamba_num_heads or 0, "ssm_heads")),
        )
        if mask.keep is not None:
            kept_BS1 = _kept(mask.keep, mask.start, BS[1])
            parts = Projected(*(jnp.where(kept_BS1, part, 0) for part in parts))
        dynamics = self._dynamics(E, M)
        sizes = Sizes(cfg.mamba_num_groups, cfg.mamba_head_dim, cfg.mamba_chunk_size)
        if decode:
            y_BSHP = self._decode(parts, dynamics, sizes, mask)
        else:
            y_BSHP = sub.core(sizes=sizes, name="core")(parts, dynamics, mask.q_segment_ids)
        y_BSE = constrain(y_BSHP.reshape(*BS, E), "batch", "seq", "act_ssm_heads")
        y_BSE = constrain(self._gate_and_norm(y_BSE, z_BSE), "batch", "seq", "act_ssm_heads")
        y_BSD = sub.out_proj(
            config=cfg, features=cfg.hidden_size, axis="ssm_heads", use_bias=cfg.mamba_proj_bias, name="out_proj"
        )(y_BSE)
        return constrain(y_BSD, "batch", "residual_seq", "act_embed")

    def _step_sizes(self, dt_BSH: Array) -> Array:
        cfg = self.config
        bias: Any = self.param(
            "dt_bias", _head_init(_inverse_softplus_init(cfg)), (dt_BSH.shape[-1],), jnp.dtype(cfg.params_dtype)
        )
        dt_BSH = jax.nn.softplus(dt_BSH.astype(jnp.float32) + bias.astype(jnp.float32))
        return jnp.clip(dt_BSH, cfg.mamba_dt_clamp_min or None, cfg.mamba_dt_clamp_max)

    def _dynamics(self, E: int, M: int) -> Dynamics:
        cfg = self.config
        H = cfg.mamba_num_heads or 0

        def convolution(part: str, features: int, axis: str) -> Convolution:
            module = DepthwiseConvolution(cfg, features, axis, name=f"conv1d_{part}")
            return module()

        def a_log(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            low, high = cfg.mamba_a_init_range
            return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

        A_log: Any = self.param("A_log", _head_init(a_log), (H,), jnp.float32)
        skip = E if cfg.mamba_d_has_hdim else H
        D: Any = self.param("D", _head_init(nn.initializers.ones), (skip,), jnp.float32)
        return Dynamics(
            convolution("x", E, "ssm_heads"),
            convolution("B", M, "ssm_groups"),
            convolution("C", M, "ssm_groups"),
            -jnp.exp(A_log.astype(jnp.float32)),
            D.astype(jnp.float32).reshape(H, -1),
        )

    def _decode(self, parts: Projected, dynamics: Dynamics, sizes: Sizes, mask: AttentionMask) -> Array:
        cfg, (B, _, H) = self.config, parts.dt.shape

        def nothing() -> MambaCache:
            back, dtype = cfg.mamba_d_conv - 1, parts.x.dtype
            axes = ("act_ssm_heads", "act_ssm_groups", "act_ssm_groups")
            window = Window(
                *(
                    empty((B, back, x.shape[-1]), dtype, "batch", None, axis)
                    for x, axis in zip(parts, axes, strict=False)
                )
            )
            state = (B, H, cfg.mamba_head_dim, cfg.mamba_state_dim)
            return MambaCache(window, empty(state, jnp.float32, "batch", "act_ssm_heads", None, None))

        cache = self.variable("cache", "mamba", nothing)
        kept = jax.tree.map(read, cache.value, is_leaf=is_cache)
        before: MambaCache = jax.tree.map(lambda a: jnp.where(mask.start == 0, 0, a).astype(a.dtype), kept)
        mixed = mix(parts, dynamics, sizes, window=before.window, state=before.state)
        if not self.is_initializing():
            now = MambaCache(mixed.window, mixed.state)
            cache.value = jax.tree.map(
                lambda old, new: write(old, new, (0,) * new.ndim), cache.value, now, is_leaf=is_cache
            )
        return mixed.y

    def _gate_and_norm(self, y_BSE: Array, z_BSE: Array) -> Array:
        cfg = self.config
        if not cfg.mamba_rmsnorm:
            return gated(y_BSE, z_BSE).astype(y_BSE.dtype)
        return GatedRMSNorm(cfg, name="norm")(y_BSE, z_BSE)


class GatedRMSNorm(nn.Module):
    """`rms_norm(y silu(z))` within each group of heads. y, z [..., E]; parameter scale [E]."""

    config: MambaConfig

    @nn.compact
    def __call__(self, y: Array, z: Array) -> Array:
        cfg = self.config
        dtype = jnp.dtype(cfg.params_dtype)
        scale: Any = self.param("scale", _head_init(nn.initializers.ones), (y.shape[-1],), dtype)
        groups, epsilon = cfg.mamba_num_groups, cfg.mamba_norm_epsilon
        return gated_group_rms_norm(y, z, scale, groups=groups, epsilon=epsilon)


class DepthwiseConvolution(nn.Module):
    """Parameters of a causal convolution: kernel [K, 1, F], and bias [F] if `mamba_conv_bias`."""

    config: MambaConfig
    features: int
    axis: str

    @nn.compact
    def __call__(self) -> Convolution:
        cfg = self.config
        K, dtype = cfg.mamba_d_conv, jnp.dtype(cfg.params_dtype)
        bound = 1 / math.sqrt(K)
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(_uniform(cfg.mamba_conv_init or bound), ("whole", "whole", self.axis)),
            (K, 1, self.features),
            dtype,
        )
        if not cfg.mamba_conv_bias:
            return Convolution(kernel, None)
        init = nn.with_logical_partitioning(_uniform(bound), (self.axis,))
        bias: Any = self.param("bias", init, (self.features,), dtype)
        return Convolution(kernel, bias)


def _kept(keep: Array, offset: Array | int, S: int) -> Array:
    """Which of S tokens are none of padding: bool [B, S, 1]."""
    if keep.shape[1:3] != (1, 1):
        raise ConfigError(
            f"attention_mask of shape {keep.shape} hides tokens from some queries only, which a Mamba layer cannot do;"
            " give [B, S]"
        )
    kept = keep[:, 0, 0]
    return (kept if kept.shape[1] == S else jax.lax.dynamic_slice_in_dim(kept, offset, S, axis=1))[..., None]


def _head_init(init: Any) -> Any:
    return nn.with_logical_partitioning(init, ("ssm_heads",))


def _uniform(bound: float) -> Any:
    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _inverse_softplus_init(cfg: MambaConfig) -> Any:
    """Biases whose softplus is log-uniform between `mamba_dt_min` and `mamba_dt_max`."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        low, high = math.log(cfg.mamba_dt_min), math.log(cfg.mamba_dt_max)
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        dt = jnp.maximum(dt, cfg.mamba_dt_init_floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init
