"""What Megatron's options of experts, of latent attention and of multi-token prediction are here."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

from megajax.config import ConfigError, MoEConfig, to_tuple

Fields = Mapping[str, Any]

MOE_FIELDS = tuple(
    name
    for name in MoEConfig.__dataclass_fields__
    if name not in ("moe_router_group_score_topk", "moe_router_norm_topk_prob")
)
"""Names that both have."""

LATENT_DEFAULTS: Mapping[str, Any] = {
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
"""Fields of Megatron's MLATransformerConfig and their defaults there."""

_YARN = {
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
"""Megatron's field -> ours."""


def expert_arguments(num_experts: int | None, fields: Fields) -> dict[str, Any]:
    """All that concerns experts; nothing for a dense model, whose other options Megatron does not read."""
    if not num_experts:
        return {}
    arguments = {name: to_tuple(fields[name]) for name in MOE_FIELDS if fields.get(name) is not None}
    if arguments.get("moe_token_dispatcher_type") == "flex":
        arguments["moe_token_dispatcher_type"] = "alltoall"
    if (arguments.get("moe_expert_capacity_factor") or 0) < 0:
        del arguments["moe_expert_capacity_factor"]
    return arguments


def latent_arguments(used: bool, fields: Fields) -> dict[str, Any]:
    """All that concerns multi-latent attention; nothing without it."""
    if not used:
        return {}
    given = {name: fields.get(name, default) for name, default in LATENT_DEFAULTS.items()}
    kind = given.pop("rope_type")
    if kind not in ("rope", "yarn"):
        raise ConfigError(f"rope_type={kind!r} is not supported; use rope or yarn")
    arguments = {_YARN.get(name, name): value for name, value in given.items()}
    normalization = fields.get("normalization") or "RMSNorm"
    return arguments | {"multi_latent_attention": True, "normalization": normalization}


def latent_fields(config: Any) -> dict[str, Any]:
    """The inverse of `latent_arguments`."""
    ours = {name: getattr(config, _YARN.get(name, name)) for name in LATENT_DEFAULTS if name != "rope_type"}
    return ours | {"multi_latent_attention": True, "rope_type": config.position_embedding_type}
