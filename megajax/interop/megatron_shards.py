"""Tensor-parallel shards of Megatron state dicts: what each rank holds, merged and split."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.megatron_layouts import StateDict

_SHARDED = (
    (r"(^|\.)word_embeddings\.weight$|^output_layer\.weight$", 0),
    (r"\.linear_(qkv|fc1)\.(weight|bias)$", 0),
    (r"\.core_attention\.softmax_offset$", 0),
    (r"\.\d+\.(self_attention|mlp)\.(weight|bias)$", 0),  # a linear map in place of the sublayer
    (r"\.linear_(proj|fc2)\.weight$", 1),
)
"""(names, dim that is divided over the ranks)."""
_REPLICATED = r"layernorm\.(weight|bias)$|\.layer_norm_(weight|bias)$|position_embeddings\.weight$|_(proj|fc2)\.bias$"


def _sharded_dim(name: str) -> int | None:
    """The dim of a tensor that the ranks divide between them, None where each has all of it."""
    for pattern, dim in _SHARDED:
        if re.search(pattern, name):
            return dim
    if re.search(_REPLICATED, name):
        return None
    raise ConfigError(f"{name}: megajax does not know how tensor parallelism divides this tensor; remove it")


def _halves(name: str, config: TransformerConfig | Mapping[str, Any]) -> int:
    """Into how many equal parts a tensor falls that are each divided over the ranks: gate and up of a gated MLP."""
    gated = config.get("gated_linear_unit", False) if isinstance(config, Mapping) else config.gated_linear_unit
    return 2 if gated and ".linear_fc1." in name else 1


def merge_tensor_parallel(
    state_dicts: Sequence[StateDict], config: TransformerConfig | Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The state dicts of ranks 0, 1, ... to the one of a single rank. `_extra_state` entries are dropped.

    config: a TransformerConfig or Megatron's fields, of which `gated_linear_unit` counts.

    Raises:
      ConfigError: ranks with different tensors, or different values where all should have the same.
    """
    if not state_dicts:
        raise ConfigError("merge_tensor_parallel needs the state dict of at least one rank")
    names = [name for name in state_dicts[0] if "_extra_state" not in name]
    for rank, other in enumerate(state_dicts):
        odd = sorted({name for name in other if "_extra_state" not in name} ^ set(names))
        if odd:
            raise ConfigError(f"tensor-parallel rank {rank} and rank 0 do not both have {odd[0]}")
    return {name: _merge(name, [np.asarray(s[name]) for s in state_dicts], config) for name in names}


def _merge(name: str, shards: Sequence[np.ndarray], config: TransformerConfig | Mapping[str, Any]) -> np.ndarray:
    dim = _sharded_dim(name)
    if dim is None:
        odd = [rank for rank, shard in enumerate(shards) if not np.array_equal(shard, shards[0])]
        if odd:
            raise ConfigError(f"{name} should be equal on all tensor-parallel ranks but differs on rank {odd[0]}")
        return shards[0]
    if len({shard.shape for shard in shards}) > 1:
        raise ConfigError(f"{name} has different shapes on the tensor-parallel ranks: {[s.shape for s in shards]}")
    halves = [np.split(shard, _halves(name, config), axis=dim) for shard in shards]
    return np.concatenate([rank[half] for half in range(len(halves[0])) for rank in halves], axis=dim)


def split_tensor_parallel(
    state_dict: StateDict, tp: int, config: TransformerConfig | Mapping[str, Any]
) -> list[dict[str, np.ndarray]]:
    """The inverse of `merge_tensor_parallel`: the state dict of each of `tp` ranks.

    Raises:
      ConfigError: a tensor that `tp` does not divide.
    """
    if tp < 1:
        raise ConfigError(f"tp={tp} must be at least 1")
    ranks: list[dict[str, np.ndarray]] = [{} for _ in range(tp)]
    for name, value in state_dict.items():
        if "_extra_state" in name:
            continue
        for rank, shard in enumerate(_split(name, np.asarray(value), tp, config)):
            ranks[rank][name] = shard
    return ranks


def _split(name: str, whole: np.ndarray, tp: int, config: TransformerConfig | Mapping[str, Any]) -> list[np.ndarray]:
    dim = _sharded_dim(name)
    if dim is None:
        return [whole] * tp
    halves = np.split(whole, _halves(name, config), axis=dim)
    if halves[0].shape[dim] % tp:
        raise ConfigError(f"{name}: dim {dim} of size {halves[0].shape[dim]} is not divisible by tp={tp}")
    pieces = [np.split(half, tp, axis=dim) for half in halves]
    return [np.ascontiguousarray(np.concatenate([half[rank] for half in pieces], axis=dim)) for rank in range(tp)]
