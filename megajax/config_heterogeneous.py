"""Layers that differ one by one, as neural architecture search leaves them (Nemotron-NAS)."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megajax.config_checks import require, require_divides


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeterogeneousLayer:
    """One layer of a Nemotron-NAS model: either half may be the usual one, one linear map, or absent."""

    attention: Literal["normal", "linear", "no_op"] = "normal"
    mlp: Literal["normal", "linear", "no_op"] = "normal"
    num_query_groups: int | None = None
    ffn_hidden_size: int | None = None


def heterogeneous_layers_from_json(
    data: dict[str, Any], *, hidden_size: int, num_attention_heads: int
) -> tuple[HeterogeneousLayer, ...]:
    """Reads `{"block_configs": [{"attention": {...}, "ffn" or "mlp": {...}}, ...]}` of Nemotron-NAS checkpoints.

    `n_heads_in_group` gives `num_attention_heads / n` groups; `ffn_mult` gives `2 ffn_mult hidden_size / 3`, rounded
    up to a multiple of 256 (`megatron/core/transformer/heterogeneous/heterogeneous_config.py`).
    """
    require("block_configs" in data, "the heterogeneous layer config has no 'block_configs' list; add it")
    layers = []
    for i, block in enumerate(data["block_configs"]):
        attention, mlp = block.get("attention", {}), block.get("ffn", block.get("mlp", {}))
        groups = attention.get("num_query_groups")
        if groups is None and attention.get("n_heads_in_group"):
            require_divides(
                f"block_configs[{i}]: num_attention_heads",
                num_attention_heads,
                "n_heads_in_group",
                attention["n_heads_in_group"],
            )
            groups = num_attention_heads // attention["n_heads_in_group"]
        width = mlp.get("ffn_hidden_size") or mlp.get("intermediate_size")
        if width is None and mlp.get("ffn_mult"):
            width = -(-int(2 * mlp["ffn_mult"] * hidden_size / 3) // 256) * 256
        layers.append(
            HeterogeneousLayer(
                attention=_heterogeneous_kind(attention),
                mlp=_heterogeneous_kind(mlp),
                num_query_groups=groups,
                ffn_hidden_size=width,
            )
        )
    return tuple(layers)


def _heterogeneous_kind(block: dict[str, Any]) -> Literal["normal", "linear", "no_op"]:
    return "no_op" if block.get("no_op") else "linear" if block.get("replace_with_linear") else "normal"
