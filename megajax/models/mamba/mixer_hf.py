"""What the Hugging Face formats of Mamba-2 and hybrids have in common: the tensors of a mixer, and its options."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Row
from megajax.interop.hf_fields import Fields, number
from megajax.ssm.mamba_config import MambaConfig


def linear(name: str, *parts: str) -> tuple[Row, Row]:
    """The tensors of a linear layer: weight and bias."""
    weights, biases = (tuple(f"{part}/{leaf}" for part in parts) for leaf in ("kernel", "bias"))
    return Row(f"layers.{{i}}.{name}.weight", weights, transposed=True), Row(f"layers.{{i}}.{name}.bias", biases)


def mixer_rows(name: str) -> tuple[Row, ...]:
    """The tensors of a mixer, which the file calls `name`."""
    return (
        *linear(f"{name}.in_proj", *(f"mixer/in_proj_{part}" for part in ("z", "x", "B", "C", "dt"))),
        *linear(f"{name}.conv1d", *(f"mixer/conv1d_{part}" for part in ("x", "B", "C"))),
        *(Row(f"layers.{{i}}.{name}.{leaf}", (f"mixer/{leaf}",)) for leaf in ("dt_bias", "A_log", "D")),
        Row(f"layers.{{i}}.{name}.norm.weight", ("mixer/norm/scale",)),
        *linear(f"{name}.out_proj", "mixer/out_proj"),
    )


def outer_rows(embedding: str, norm: str) -> tuple[Row, ...]:
    """The tensors of the words and of the last norm, by what the file calls them."""
    return (
        Row(f"{embedding}.weight", ("embedding/word_embeddings/embedding",), vocabulary=True),
        Row(f"{norm}.weight", ("decoder/final_layernorm/scale",)),
    )


def read_limits(fields: Fields) -> dict[str, Any]:
    """`time_step_limit`, [least, greatest]; infinity as JSON, or as transformers 5, writes it."""
    limits = fields.take("time_step_limit")
    if limits is None:
        return {}
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise ConfigError(f"config.json: time_step_limit={limits!r} must be two numbers")
    low, high = (_number("time_step_limit", limit) for limit in limits)
    return {"mamba_dt_clamp_min": low, "mamba_dt_clamp_max": None if math.isinf(high) else high}


def _number(name: str, value: Any) -> float:
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else number(name, value)


def write_limits(config: MambaConfig) -> list[Any]:
    """The inverse of `read_limits`."""
    high = config.mamba_dt_clamp_max
    return [config.mamba_dt_clamp_min, {"__float__": "Infinity"} if high is None else high]


def require(fields: Fields, name: str, *only: Any) -> None:
    """Raises ConfigError for a field that is none of `only`."""
    value = fields.take(name)
    if value not in only:
        raise ConfigError(f"config.json: {name}={value!r} is not supported; it must be {only[0]!r}")


def ignore(fields: Fields, names: str) -> None:
    """For fields that say again what others say, or that nothing reads."""
    for name in names.split():
        fields.optional(name)


PLAIN: Mapping[str, Any] = {"normalization": "RMSNorm", "add_bias_linear": False}


def hybrid(config: TransformerConfig) -> MambaConfig:
    """`config`, which must be that of a hybrid."""
    assert isinstance(config, MambaConfig)
    return config


def expansion(config: MambaConfig) -> int:
    """Inner size over hidden size; nearest whole number."""
    return max(1, config.mamba_inner_size // config.hidden_size)
