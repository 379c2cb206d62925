"""Options of a mixture of experts and of multi-latent attention: parts of `TransformerConfig`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megajax.config_checks import require, require_divides, require_positive

LoadBalancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts; Megatron's names (`transformer_config.py`). Without `num_moe_experts` the model is dense."""

    # Experts
    num_moe_experts: int | None = None
    moe_layer_freq: int | tuple[int, ...] = 1
    """int N: layers 0, N, 2N, ... have experts; or a list of zeros and ones, 1 = experts."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; None is ffn_hidden_size."""
    moe_router_topk: int = 2
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the choice, instead of over the chosen ones after it."""
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    """A token's experts come from this many of the `moe_router_num_groups` groups."""
    moe_router_group_score_topk: int | None = None
    """A group is as good as the sum of this many of its best experts; None: moe_router_topk // moe_router_group_topk.
    DeepSeek-V2 takes 1, DeepSeek-V3 2."""
    moe_router_norm_topk_prob: bool = True
    """Sigmoid weights of the chosen experts are made to sum to 1, where there are several."""
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    """Balance by a bias on the choice that follows how often each expert is chosen (arXiv:2408.15664)."""
    moe_router_bias_update_rate: float = 1e-3
    moe_router_load_balancing_type: LoadBalancing | tuple[LoadBalancing, ...] = "aux_loss"
    """One, or several with as many `moe_aux_loss_coeff`. "sinkhorn" changes the choice, except with a cache."""
    moe_aux_loss_coeff: float | tuple[float, ...] = 0.0
    moe_z_loss_coeff: float | None = None
    moe_input_jitter_eps: float | None = None
    """In training the router's input is multiplied by a number from 1 - eps to 1 + eps."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "ragged"] = "allgather"
    moe_expert_capacity_factor: float | None = None
    moe_pad_expert_input_to_capacity: bool = False
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    moe_apply_probs_on_input: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    """Width of an MLP that every token goes through beside its experts."""
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None
    """Experts work in a space of this width, projected to and from by two maps that all share."""

    @property
    def balancing(self) -> tuple[tuple[LoadBalancing, float], ...]:
        """The losses that balance the experts, each with its coefficient."""
        kinds, coefficients = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        coefficients = coefficients if isinstance(coefficients, tuple) else (coefficients,) * len(kinds)
        return tuple(zip(kinds, coefficients, strict=True))

    @property
    def group_score_topk(self) -> int | None:
        """How many of its experts a group is rated by; None where there are no groups."""
        if self.moe_router_group_topk is None:
            return None
        return self.moe_router_group_score_topk or self.moe_router_topk // self.moe_router_group_topk

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts."""
        if self.num_moe_experts is None:
            return False
        freq = self.moe_layer_freq
        return index % freq == 0 if isinstance(freq, int) else freq[index] == 1

    def _validate_moe(self, num_layers: int) -> None:
        experts, top_k = self.num_moe_experts, self.moe_router_topk
        require_positive(self, "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_latent_size")
        if experts is None:
            require(
                self.moe_ffn_hidden_size is None,
                f"moe_ffn_hidden_size={self.moe_ffn_hidden_size} needs num_moe_experts; set it",
            )
            return
        require(top_k <= experts, f"moe_router_topk={top_k} exceeds num_moe_experts={experts}; lower it")
        kinds = self.moe_router_load_balancing_type
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        coefficients = self.moe_aux_loss_coeff
        require(
            not isinstance(coefficients, tuple) or len(coefficients) == len(kinds),
            f"moe_aux_loss_coeff={coefficients} needs one number for each of moe_router_load_balancing_type={kinds}",
        )
        require(
            self.moe_router_score_function == "sigmoid"
            or self.moe_router_pre_softmax
            or top_k > 1
            or "sinkhorn" in kinds,
            f"moe_router_topk={top_k} with a softmax over the chosen expert is always 1; set moe_router_pre_softmax",
        )
        require(
            not self.moe_router_enable_expert_bias or self.moe_router_score_function == "sigmoid",
            "moe_router_enable_expert_bias=True needs moe_router_score_function='sigmoid'; set it",
        )
        require(
            self.moe_router_norm_topk_prob or self.moe_router_score_function == "sigmoid",
            "moe_router_norm_topk_prob=False needs moe_router_score_function='sigmoid'; a softmax over all experts is"
            " moe_router_pre_softmax",
        )
        require(
            not self.moe_apply_probs_on_input or top_k == 1,
            f"moe_apply_probs_on_input=True needs moe_router_topk=1, not {top_k}; change one of them",
        )
        require(
            not self.moe_pad_expert_input_to_capacity or self.moe_expert_capacity_factor is not None,
            "moe_pad_expert_input_to_capacity=True needs moe_expert_capacity_factor; set it",
        )
        self._validate_groups(experts, top_k)
        freq: Any = self.moe_layer_freq
        if isinstance(freq, int):
            require(freq > 0, f"moe_layer_freq={freq} must be at least 1")
        else:
            require(
                len(freq) == num_layers and set(freq) <= {0, 1},
                f"moe_layer_freq has {len(freq)} entries; give num_layers={num_layers} zeros and ones",
            )

    def _validate_groups(self, experts: int, top_k: int) -> None:
        groups, chosen, best = (
            self.moe_router_num_groups,
            self.moe_router_group_topk,
            self.moe_router_group_score_topk,
        )
        require(
            (groups is None) == (chosen is None),
            f"moe_router_num_groups={groups} and moe_router_group_topk={chosen} belong together; set both or none",
        )
        if groups is not None and chosen is not None:
            require_divides("num_moe_experts", experts, "moe_router_num_groups", groups)
            size = experts // groups
            require(
                0 < chosen <= groups and (chosen <= top_k or best is not None) and top_k <= chosen * size,
                f"moe_router_group_topk={chosen} does not fit moe_router_num_groups={groups} and"
                f" moe_router_topk={top_k}; change one of them",
            )
            require(
                best is None or 0 < best <= size,
                f"moe_router_group_score_topk={best} must be from 1 to the {size} experts of a group",
            )
        else:
            require(best is None, f"moe_router_group_score_topk={best} needs moe_router_num_groups; set it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-latent attention (arXiv:2405.04434); Megatron's names (`MLATransformerConfig`).

    Its rotary embedding is that of `position_embedding_type`, "rope" or "yarn", on `qk_pos_emb_head_dim` features, with
    the `yarn_*` options in place of Megatron's `rotary_scaling_factor`, `mscale` and so on.
    """

    # Latent attention
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    """Width of the queries' latent; None projects them directly."""
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    """Features of a query or key head that have no position."""
    qk_pos_emb_head_dim: int = 64
    """Features of a query head, and of the one key that all heads share, that carry the position."""
    v_head_dim: int = 128
    qk_pos_emb_interleaved: bool = True
    """The two features that turn together stand side by side in the weights, as in DeepSeek's; else half the width
    apart."""
    latent_layernorm_epsilon: float | None = None
    """Epsilon of the latents' norms; None is layernorm_epsilon."""

    def _validate_latent_attention(self) -> None:
        refused = ("rotary_interleaved", "attention_output_gate", "qk_l2_norm")
        for name in refused if self.multi_latent_attention else ():
            require(not getattr(self, name), f"{name}=True is not defined for multi_latent_attention; set it to False")
        require_positive(self, "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        require_positive(self, "latent_layernorm_epsilon")
        require(
            self.qk_pos_emb_head_dim % 2 == 0,
            f"qk_pos_emb_head_dim={self.qk_pos_emb_head_dim} must be even: it is rotated in pairs",
        )
