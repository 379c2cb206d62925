"""Backends: which implementation fills each slot of a layer. The spec functions ask; the backend answers."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Protocol

import jax
from flax import linen as nn

from megajax.config import ConfigError, TransformerConfig
from megajax.config_parallel import ContextComm
from megajax.ops.attention import AttentionMask
from megajax.spec import Builder, ModuleSpec
from megajax.ssm.state_space import StateSpace
from megajax.transformer.attention import DotProductAttention, softmax_scale
from megajax.transformer.linear import ColumnParallelLinear, RowParallelLinear
from megajax.transformer.norms import L2Norm, LayerNorm, RMSNorm

Array = jax.Array


class BackendSpecProvider(Protocol):
    """Builders for the slots of a layer. Megatron: `core/models/backends.py`."""

    def column_parallel_linear(self) -> Builder:
        """Linear whose output dim is sharded; see `megajax.transformer.linear`."""
        ...

    def row_parallel_linear(self) -> Builder:
        """Linear whose input dim is sharded."""
        ...

    def layer_norm(self, config: TransformerConfig) -> Builder:
        """The norm that `config.normalization` names."""
        ...

    def qk_norm(self, config: TransformerConfig) -> Builder | None:
        """The norm of queries and keys, None for none."""
        ...

    def core_attention(self) -> Builder:
        """Queries, keys and values to outputs; see `DotProductAttention` for the call."""
        ...

    def state_space(self) -> Builder:
        """Convolution and recurrence of a state space layer; see `StateSpace` for the call."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalSpecProvider:
    """Plain JAX on any device: what every other backend is tested against.

    Attributes:
      cp_comm_type: how attention sees a sequence that the mesh divides; without such a mesh it is whole.
      zigzag: the tokens lie in the order of `megajax.parallel.context.zigzag_indices`.
    """

    cp_comm_type: ContextComm = "p2p"
    zigzag: bool = False

    def column_parallel_linear(self) -> Builder:
        """Linear whose output dim is sharded."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> Builder:
        """Linear whose input dim is sharded."""
        return RowParallelLinear

    def layer_norm(self, config: TransformerConfig) -> Builder:
        """LayerNorm or RMSNorm."""
        return RMSNorm if config.normalization == "RMSNorm" else LayerNorm

    def qk_norm(self, config: TransformerConfig) -> Builder | None:
        """L2Norm, the config's norm, or None."""
        if config.qk_l2_norm:
            return L2Norm
        return self.layer_norm(config) if config.qk_layernorm else None

    def core_attention(self) -> Builder:
        """Attention by matrix products and a softmax."""
        if (self.cp_comm_type, self.zigzag) == ("p2p", False):
            return DotProductAttention
        return ModuleSpec(DotProductAttention, params={"cp_comm_type": self.cp_comm_type, "zigzag": self.zigzag})

    def state_space(self) -> Builder:
        """The recurrence in chunks of matrix products."""
        return ModuleSpec(StateSpace, params={"zigzag": True}) if self.zigzag else StateSpace


class CudnnAttention(nn.Module):
    """cuDNN's flash attention. q [B, S, N, K], k and v [B, T, G, K] -> [B, S, N, K]; needs an NVIDIA GPU and bf16/fp16.

    Raises:
      ConfigError: an option that cuDNN attention does not have; nothing falls back silently.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array, *, mask: AttentionMask, deterministic: bool = True) -> Array:
        cfg = self.config
        if cfg.softmax_type != "vanilla":
            raise ConfigError(f"softmax_type={cfg.softmax_type!r} is not in cuDNN attention; use LocalSpecProvider")
        if cfg.attention_dropout and not deterministic:
            raise ConfigError(f"attention_dropout={cfg.attention_dropout} is not in cuDNN attention; set it to 0")
        plain = dataclasses.replace(mask, causal=False, window=None)
        window = None
        if mask.window is not None:
            left, right = (size if size >= 0 else k.shape[1] for size in mask.window)
            window = (left, right)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=None if mask.bias is None else mask.bias.astype(q.dtype),
            mask=plain.dense(q.shape[1], k.shape[1]),
            scale=softmax_scale(cfg),
            is_causal=mask.causal,
            local_window_size=window,
            implementation="cudnn",
        )


@dataclasses.dataclass(frozen=True)
class TESpecProvider:
    """Fused kernels for NVIDIA GPUs: cuDNN attention. Linears and norms are plain JAX, which XLA fuses itself."""

    local: LocalSpecProvider = LocalSpecProvider()

    def column_parallel_linear(self) -> Builder:
        """Linear whose output dim is sharded."""
        return self.local.column_parallel_linear()

    def row_parallel_linear(self) -> Builder:
        """Linear whose input dim is sharded."""
        return self.local.row_parallel_linear()

    def layer_norm(self, config: TransformerConfig) -> Builder:
        """LayerNorm or RMSNorm."""
        return self.local.layer_norm(config)

    def qk_norm(self, config: TransformerConfig) -> Builder | None:
        """L2Norm, the config's norm, or None."""
        return self.local.qk_norm(config)

    def core_attention(self) -> Builder:
        """cuDNN's flash attention."""
        return CudnnAttention

    def state_space(self) -> Builder:
        """The recurrence in chunks of matrix products."""
        return self.local.state_space()
