"""Options of Mamba-2 layers and of models that mix them with attention, MLPs and experts."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any, Self

from megajax.config import PositionEmbedding, TransformerConfig
from megajax.config_checks import require, require_divides, require_positive
from megajax.ssm.hybrid_layer_allocation import ATTENTION, MAMBA, MLP, MOE, SHARED, allocate_layers

_NO_ATTENTION: dict[str, Any] = {
    "num_attention_heads": 1,
    "num_query_groups": None,
    "kv_channels": None,
    "softmax_scale": None,
    "scale_attn_by_inverse_layer_idx": False,
    "attn_logit_softcapping": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "add_qkv_bias": False,
    "add_attention_proj_bias": None,
    "multi_latent_attention": False,
}
_NO_MLP: dict[str, Any] = {
    "ffn_hidden_size": None,
    "activation_func": "gelu",
    "gated_linear_unit": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_mlp_bias": None,
}
"""Options that say nothing of a layer of another kind, each with one value: equal layers have equal configs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(TransformerConfig):
    """Architecture of a stack of Mamba-2 layers (arXiv:2405.21060), or of a hybrid (arXiv:2406.07887, 2504.03624).

    Every layer is one residual sublayer: a Mamba-2 mixer, attention, an MLP or experts. So `num_layers` counts
    sublayers, and N layers of a GPT are 2 N layers `*-*-...` here. `num_attention_heads` and what belongs to it matter
    to attention layers only. Names are those of Megatron's `TransformerConfig`, its `MambaModel` and `MambaMixer`.

    Raises:
      ConfigError: a value is out of range, or two fields contradict each other.
    """

    position_embedding_type: PositionEmbedding = "none"

    # Which layer is what
    hybrid_override_pattern: str | None = None
    """One symbol a layer: M Mamba-2, * attention, - MLP, E experts, S Mamba-2 after a shared transformer block. None:
    by the two ratios, all M if they are 0."""
    hybrid_attention_ratio: float = 0.0
    hybrid_mlp_ratio: float = 0.0

    # The mixer
    mamba_state_dim: int = 128
    mamba_head_dim: int = 64
    mamba_num_groups: int = 8
    """Groups of heads; those of a group share B and C, and are normalised together."""
    mamba_num_heads: int | None = None
    """None: as many as make the inner size mamba_expand hidden_size."""
    mamba_expand: int = 2
    mamba_d_conv: int = 4
    """Tokens that the causal convolution sees."""
    mamba_chunk_size: int = 128
    """Tokens that are computed at once; the result does not depend on it."""
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    """Biases of the projections into and out of the mixer."""
    mamba_d_has_hdim: bool = False
    """The skip connection D has a weight for each feature instead of for each head."""
    mamba_rmsnorm: bool = True
    """The gated output is normalised."""
    mamba_norm_epsilon: float = 1e-5
    mamba_dt_clamp_min: float = 0.0
    mamba_dt_clamp_max: float | None = None
    """Least and greatest step size."""

    # Shared blocks
    num_shared_blocks: int = 1
    """Blocks that the layers S take in turn (arXiv:2411.15242); attention and MLP have their sizes from them."""
    shared_adapter_rank: int | None = None
    """Width of the adapters that each layer S has of its own."""
    shared_attention_adapter: bool = False
    """Queries, keys and values have adapters too, not the MLP alone."""

    # Initialisation of the mixer
    mamba_a_init_range: tuple[float, float] = (1.0, 16.0)
    mamba_dt_min: float = 1e-3
    mamba_dt_max: float = 0.1
    mamba_dt_init_floor: float = 1e-4
    mamba_conv_init: float | None = None
    """The convolution's weights are drawn from -this to this; None: from -1 to 1 over the root of its width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")
        require_positive(self, "mamba_expand", "mamba_d_conv", "mamba_chunk_size", "mamba_conv_init")
        require_positive(self, "num_shared_blocks", "shared_adapter_rank")
        require_positive(self, "mamba_norm_epsilon", "mamba_dt_min", "mamba_dt_init_floor", "mamba_dt_clamp_max")
        if self.mamba_num_heads is None:
            inner = self.mamba_expand * self.hidden_size
            require_divides("mamba_expand times hidden_size", inner, "mamba_head_dim", self.mamba_head_dim)
            self._derive("mamba_num_heads", inner // self.mamba_head_dim)
        require_divides("mamba_num_heads", self.mamba_num_heads or 0, "mamba_num_groups", self.mamba_num_groups)
        low, high = self.mamba_a_init_range
        require(0 < low <= high, f"mamba_a_init_range={self.mamba_a_init_range} must be two numbers above 0, in order")
        require(
            self.mamba_dt_min <= self.mamba_dt_max,
            f"mamba_dt_min={self.mamba_dt_min} exceeds mamba_dt_max={self.mamba_dt_max}; swap them",
        )
        self._validate_layers()

    def _validate_layers(self) -> None:
        allocate_layers(
            self.num_layers, self.hybrid_attention_ratio, self.hybrid_mlp_ratio, self.hybrid_override_pattern
        )
        for name in ("heterogeneous_layers", "mtp_num_layers", "sandwich_norm"):
            require(not getattr(self, name), f"{name} is not possible in a hybrid model; leave it out")
        require(
            self.moe_layer_freq == 1,
            f"moe_layer_freq={self.moe_layer_freq} has no effect here: hybrid_override_pattern says which layers have"
            " experts; leave it out",
        )
        require(
            SHARED not in self.layer_pattern or self.shared_adapter_rank is not None,
            f"hybrid_override_pattern={self.layer_pattern!r} has layers S, which need shared_adapter_rank; set it",
        )
        if self.hybrid_override_pattern is not None:
            self.require_experts_and_their_layers()

    def require_experts_and_their_layers(self) -> None:
        """Raises ConfigError if there are experts but no layers that have them, or layers but no experts."""
        require(
            (MOE in self.layer_pattern) == (self.num_moe_experts is not None),
            f"num_moe_experts={self.num_moe_experts} and hybrid_override_pattern={self.layer_pattern!r}: layers E and"
            " experts need each other; give both or neither",
        )

    @property
    def layer_pattern(self) -> str:
        """The kind of each layer, one symbol each."""
        return allocate_layers(
            self.num_layers, self.hybrid_attention_ratio, self.hybrid_mlp_ratio, self.hybrid_override_pattern
        )

    @property
    def mamba_inner_size(self) -> int:
        """Features of the mixer's heads together."""
        return (self.mamba_num_heads or 0) * self.mamba_head_dim

    @property
    def residual_branches(self) -> int:
        """A layer adds to the residual stream once."""
        return self.num_layers

    @property
    def ssm_groups(self) -> int | None:
        """Groups of heads that share B and C."""
        return self.mamba_num_groups

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts."""
        return self.layer_pattern[index] == MOE

    def for_layer(self, index: int) -> Self:
        """The config of a stack of layers like layer `index` (from 0)."""
        kind = self.layer_pattern[index]
        changes: dict[str, Any] = {
            "hybrid_override_pattern": kind * self.num_layers,
            "hybrid_attention_ratio": 0.0,
            "hybrid_mlp_ratio": 0.0,
        }
        if kind != MOE:
            changes |= {"num_moe_experts": None, "moe_ffn_hidden_size": None}
        if kind not in (ATTENTION, SHARED):
            changes |= _NO_ATTENTION
            learned = self.position_embedding_type == "learned_absolute"
            changes["position_embedding_type"] = "learned_absolute" if learned else "none"
        if kind in (MAMBA, ATTENTION):
            changes |= _NO_MLP
        assert kind in (MAMBA, ATTENTION, MLP, MOE, SHARED)
        return super(MambaConfig, dataclasses.replace(self, **changes)).for_layer(index)
