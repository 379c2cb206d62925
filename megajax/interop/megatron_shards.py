"""Tensor-parallel shards of Megatron state dicts: what each rank holds, merged and split."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.megatron_layouts import StateDict

Config = TransformerConfig | Mapping[str, Any]

_SHARDED = (
    (r"(^|\.)word_embeddings\.weight$|(^|\.)output_layer\.(weight|bias)$", 0),
    (r"\.linear_(qkv|q|kv|fc1|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)$|\.eh_proj\.weight$", 0),
    (r"\.core_attention\.softmax_offset$", 0),
    (r"\.\d+\.(self_attention|mlp)\.(weight|bias)$", 0),  # a linear map in place of the sublayer
    (r"\.mixer\.(in_proj|conv1d)\.(weight|bias)$|\.mixer\.(A_log|D|dt_bias|norm\.weight)$", 0),
    (r"(^|\.)(embedder|vision_projection\.encoder)\.(weight|bias)$", 0),
    (r"\.linear_(proj|fc2)\.weight$|\.mixer\.out_proj\.weight$", 1),
)
"""(names, dim that is divided over the ranks)."""
_REPLICATED = "|".join(
    (
        r"norm\.(weight|bias)$|\.layer_norm_(weight|bias)$|(^|\.)ln_(pre|post)\.(weight|bias)$|_(proj|fc2)\.bias$",
        r"position_embeddings(\.weight)?$|\.tokentype_embeddings\.weight$|\.relative_attention_bias\.weight$",
        r"\.router\.(weight|bias|expert_bias)$|\.gate_weight$|_latent_proj\.(weight|bias)$",
        r"^(pooler|lm_head)\.dense\.(weight|bias)$|^binary_head\.(weight|bias)$",
        r"(^|\.)(class|mask)_token$|(^|\.)conv1\.(weight|bias)$",
    )
)
_LATENT = re.compile(r"\.linear_(q|kv)_down_proj\.weight$")
"""Whole on each rank with Transformer Engine's layers, divided with the local ones."""


def _sharded_dim(name: str) -> int | None:
    """The dim of a tensor that the ranks divide between them, None where each has all of it."""
    for pattern, dim in _SHARDED:
        if re.search(pattern, name):
            return dim
    if re.search(_REPLICATED, name) or _LATENT.search(name):
        return None
    raise ConfigError(f"{name}: megajax does not know how tensor parallelism divides this tensor; remove it")


def _option(config: Config, name: str, default: Any) -> Any:
    """A field, which Megatron's config may leave out."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name)
    return default if value is None else value


def _of_module(name: str, config: Config) -> Config:
    """The config of the module that a tensor belongs to: towers and projections have their own."""
    for prefix, key in (("vision_model.", "vision_config"), ("vision_projection.", "projection_config")):
        if name.startswith(prefix) and isinstance(config, Mapping):
            return config.get(key) or {}
    return config


def _sections(name: str, size: int, given: Config) -> list[int]:
    """The parts of a dim of `size` that are each divided over the ranks.

    They are gate and up of a gated MLP; of a state space [z, x, B, C, step sizes], or [x, B, C] of its convolution.
    """
    config = _of_module(name, given)
    if ".linear_fc1." in name and _option(config, "gated_linear_unit", False):
        return [size // 2] * 2
    part = re.search(r"\.mixer\.(in_proj|conv1d)\.", name)
    if part is None:
        return [size]
    groups = _option(config, "mamba_num_groups", 8) * _option(config, "mamba_state_dim", 128)
    if part[1] == "conv1d":
        return [size - 2 * groups, groups, groups]
    heads = (size - 2 * groups) // (2 * _option(config, "mamba_head_dim", 64) + 1)
    inner = (size - 2 * groups - heads) // 2
    return [inner, inner, groups, groups, heads]


def merge_tensor_parallel(state_dicts: Sequence[StateDict], config: Config) -> dict[str, np.ndarray]:
    """The state dicts of ranks 0, 1, ... to the one of a single rank. `_extra_state` entries are dropped.

    config: a TransformerConfig or Megatron's fields, of which `gated_linear_unit` counts, the sizes of state spaces and
      the ranks of latents; for models of several modules with `vision_config` and `projection_config` beside them.

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


def _merge(name: str, shards: Sequence[np.ndarray], config: Config) -> np.ndarray:
    dim = _sharded_dim(name)
    latent = _LATENT.search(name)
    if latent is not None and len(shards[0]) < _latent_rows(latent[1], config):
        dim = 0
    if dim is None:
        odd = [rank for rank, shard in enumerate(shards) if not np.array_equal(shard, shards[0])]
        if odd:
            raise ConfigError(f"{name} should be equal on all tensor-parallel ranks but differs on rank {odd[0]}")
        return shards[0]
    if len({shard.shape for shard in shards}) > 1:
        raise ConfigError(f"{name} has different shapes on the tensor-parallel ranks: {[s.shape for s in shards]}")
    sections = [size // len(shards) for size in _sections(name, shards[0].shape[dim] * len(shards), config)]
    pieces = [np.split(shard, np.cumsum(sections)[:-1], axis=dim) for shard in shards]
    return np.concatenate([rank[i] for i in range(len(sections)) for rank in pieces], axis=dim)


def _latent_rows(kind: str, config: Config) -> int:
    if kind == "q":
        return _option(config, "q_lora_rank", 512)
    return _option(config, "kv_lora_rank", 512) + _option(config, "qk_pos_emb_head_dim", 64)


def split_tensor_parallel(state_dict: StateDict, tp: int, config: Config) -> list[dict[str, np.ndarray]]:
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


def _split(name: str, whole: np.ndarray, tp: int, config: Config) -> list[np.ndarray]:
    dim = _sharded_dim(name)
    if dim is None:
        return [whole] * tp
    sections = _sections(name, whole.shape[dim], config)
    odd = [size for size in sections if size % tp]
    if odd:
        raise ConfigError(f"{name}: dim {dim} of size {odd[0]} is not divisible by tp={tp}")
    pieces = [np.split(part, tp, axis=dim) for part in np.split(whole, np.cumsum(sections)[:-1], axis=dim)]
    return [np.ascontiguousarray(np.concatenate([part[rank] for part in pieces], axis=dim)) for rank in range(tp)]
