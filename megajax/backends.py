"""Backends: which implementation fills each slot of a layer. The spec functions ask; the backend answers."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Protocol

import jax

from megajax.config import TransformerConfig
from megajax.config_kernels import AttentionBackend, Fp8, GroupedGemmBackend
from megajax.config_parallel import ContextComm
from megajax.kernels import Capability
from megajax.parallel.mesh import gpu_capability
from megajax.spec import Builder, ModuleSpec
from megajax.ssm.state_space import StateSpace
from megajax.transformer.attention import DotProductAttention
from megajax.transformer.fused_attention import FusedAttention
from megajax.transformer.linear import ColumnParallelLinear, RowParallelLinear
from megajax.transformer.moe import Experts
from megajax.transformer.norms import L2Norm, LayerNorm, RMSNorm


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

    def experts(self) -> Builder:
        """The MLPs of a layer's experts; see `Experts` for the call. Megatron: `grouped_mlp_modules`."""
        ...

    def state_space(self) -> Builder:
        """Convolution and recurrence of a state space layer; see `StateSpace` for the call."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalSpecProvider:
    """Plain JAX on any device: what every other backend is tested against.

    Attributes:
      cp_comm_type: how attention sees a sequence that the mesh divides; without such a mesh it is whole.
      zigzag: the tokens lie in the order of `megajax.parallel.token_order.zigzag_indices`.
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

    def experts(self) -> Builder:
        """MLPs by a loop of matrix products."""
        return Experts

    def state_space(self) -> Builder:
        """The recurrence in chunks of matrix products."""
        return ModuleSpec(StateSpace, params={"zigzag": True}) if self.zigzag else StateSpace


def _gpu_here() -> Capability | None:
    return gpu_capability(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class TESpecProvider:
    """Fused kernels for NVIDIA GPUs, slot by slot: `megajax.kernels` says which and why.

    Attributes:
      local: what fills the other slots: linears, norms and activations are plain JAX, which XLA fuses itself.
      gpu: compute capability of the GPUs that will run it, those of this machine by default; None: no NVIDIA GPU.
      attention_backend, grouped_gemm_backend: which kernels are wanted; strict: plain JAX will not do.
      fp8: what linears, and experts, compute in; None is the dtype of activations.
      cudnn_missing: the program is compiled where there is no cuDNN.
    """

    local: LocalSpecProvider = LocalSpecProvider()
    gpu: Capability | None = dataclasses.field(default_factory=_gpu_here)
    attention_backend: AttentionBackend = "auto"
    strict: bool = False
    cudnn_missing: bool = False
    grouped_gemm_backend: GroupedGemmBackend = "auto"
    fp8: Fp8 | None = None

    def column_parallel_linear(self) -> Builder:
        """Linear whose output dim is sharded."""
        linear = self.local.column_parallel_linear()
        return linear if self.fp8 is None else ModuleSpec(linear, params={"fp8": self.fp8})

    def row_parallel_linear(self) -> Builder:
        """Linear whose input dim is sharded."""
        linear = self.local.row_parallel_linear()
        return linear if self.fp8 is None else ModuleSpec(linear, params={"fp8": self.fp8})

    def layer_norm(self, config: TransformerConfig) -> Builder:
        """LayerNorm or RMSNorm."""
        return self.local.layer_norm(config)

    def qk_norm(self, config: TransformerConfig) -> Builder | None:
        """L2Norm, the config's norm, or None."""
        return self.local.qk_norm(config)

    def core_attention(self) -> Builder:
        """Attention by the kernel that the table chooses for each call."""
        params = {"gpu": self.gpu, "wanted": self.attention_backend, "strict": self.strict}
        params |= {"cudnn_missing": self.cudnn_missing}
        params |= {"cp_comm_type": self.local.cp_comm_type, "zigzag": self.local.zigzag}
        return ModuleSpec(FusedAttention, params=params)

    def experts(self) -> Builder:
        """MLPs by the kernel that the table chooses."""
        from megajax.transformer.fused_experts import FusedExperts  # loads Pallas, which not every machine needs

        params = {"gpu": self.gpu, "wanted": self.grouped_gemm_backend, "strict": self.strict, "fp8": self.fp8}
        return ModuleSpec(FusedExperts, params=params)

    def state_space(self) -> Builder:
        """The recurrence in chunks of matrix products."""
        return self.local.state_space()
