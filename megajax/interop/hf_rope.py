"""Rotary embeddings in Hugging Face's two spellings, from and to `TransformerConfig`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megajax.config import ConfigError, TransformerConfig, to_tuple
from megajax.interop.hf_fields import Fields, number, positive_integer
from megajax.models.common.embeddings.positions import rotary_embedding
from megajax.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megajax.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megajax.ops.rope import yarn_mscale


def read_rope(fields: Fields, max_position_embeddings: int, *, partial: float | None = None) -> dict[str, Any]:
    """The position fields of `TransformerConfig`.

    `rope_scaling` with `rope_theta` beside it is what transformers wrote until version 4; since version 5 all of it
    stands in `rope_parameters`. A value inside the dict wins over one beside it, `rope_scaling` over
    `rope_parameters`, as in transformers (`modeling_rope_utils.py`).

    Args:
      partial: the architecture's default part of a head that is rotated; None where it always rotates all of it.
    """
    spellings = [_object(name, fields.optional(name)) for name in ("rope_scaling", "rope_parameters")]
    values = {name: value for name, value in (spellings[0] or spellings[1]).items() if value is not None}
    base = number("rope_theta", values.pop("rope_theta", fields.take("rope_theta")))
    beside = fields.optional("partial_rotary_factor")
    rotated = values.pop("partial_rotary_factor", beside if beside is not None else 1.0 if partial is None else partial)
    rotated = number("partial_rotary_factor", rotated)
    if partial is None and rotated != 1:
        raise ConfigError(f"config.json: partial_rotary_factor={rotated} is not defined for this architecture")
    legacy_kind = values.pop("type", "default")
    kind = values.pop("rope_type", legacy_kind)
    if kind not in _READERS:
        raise ConfigError(f"config.json: rope_type={kind!r} is not supported; known: {', '.join(_READERS)}")
    # Beside the dict it wins over the one inside (Phi-3's spelling).
    original = fields.optional("original_max_position_embeddings")
    if original is not None:
        values["original_max_position_embeddings"] = original
    values.setdefault("original_max_position_embeddings", max_position_embeddings)
    options = _READERS[kind](values, max_position_embeddings)
    values.pop("original_max_position_embeddings", None)
    if values:
        name, value = next(iter(values.items()))
        raise ConfigError(f"config.json: {name}={value!r} is not defined for rope_type={kind!r}")
    return {"position_embedding_type": "rope", "rotary_base": base, "rotary_percent": rotated} | options


def _object(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"config.json: {name}={value!r} must be an object")
    return dict(value or {})


def _take(values: dict[str, Any], name: str) -> float:
    if name not in values:
        raise ConfigError(f"config.json: the rotary embedding needs the field {name}")
    return number(name, values.pop(name))


def _optional(values: dict[str, Any], name: str) -> float | None:
    return _take(values, name) if name in values else None


def _original(values: dict[str, Any]) -> int:
    return positive_integer("original_max_position_embeddings", values["original_max_position_embeddings"])


def _factor(values: dict[str, Any], max_position_embeddings: int) -> float:
    if "factor" in values:
        return _take(values, "factor")
    return max_position_embeddings / _original(values)


def _read_default(values: dict[str, Any], longest: int) -> dict[str, Any]:
    return {}


def _read_linear(values: dict[str, Any], longest: int) -> dict[str, Any]:
    return {"seq_len_interpolation_factor": _take(values, "factor")}


def _read_dynamic(values: dict[str, Any], longest: int) -> dict[str, Any]:
    return {
        "rope_scaling_type": "dynamic",
        "rope_scaling_factor": _take(values, "factor"),
        "rope_original_max_position_embeddings": longest,
    }


def _read_llama3(values: dict[str, Any], longest: int) -> dict[str, Any]:
    return {
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": _take(values, "factor"),
        "rope_low_freq_factor": _take(values, "low_freq_factor"),
        "rope_high_freq_factor": _take(values, "high_freq_factor"),
        "rope_original_max_position_embeddings": _original(values),
    }


def _read_longrope(values: dict[str, Any], longest: int) -> dict[str, Any]:
    for name in ("short_factor", "long_factor"):
        if not isinstance(values.get(name), list):
            raise ConfigError(f"config.json: the rotary embedding needs {name}, a list of numbers")
    return {
        "rope_scaling_type": "longrope",
        "rope_scaling_factor": _factor(values, longest),
        "rope_original_max_position_embeddings": _original(values),
        "rope_short_factor": to_tuple([number("short_factor", v) for v in values.pop("short_factor")]),
        "rope_long_factor": to_tuple([number("long_factor", v) for v in values.pop("long_factor")]),
        "rope_attention_factor": _optional(values, "attention_factor"),
    }


def _read_yarn(values: dict[str, Any], longest: int) -> dict[str, Any]:
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": _factor(values, longest),
        "yarn_original_max_position_embeddings": _original(values),
        "yarn_beta_fast": _optional(values, "beta_fast") or 32.0,
        "yarn_beta_slow": _optional(values, "beta_slow") or 1.0,
        # There an mscale of 0 counts as missing.
        "yarn_mscale": _optional(values, "mscale") or None,
        "yarn_mscale_all_dim": _optional(values, "mscale_all_dim") or None,
        "yarn_correction_range_round_to_int": bool(values.pop("truncate", True)),
        "rope_attention_factor": _optional(values, "attention_factor"),
    }


_READERS: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "longrope": _read_longrope,
    "yarn": _read_yarn,
}


def write_rope(config: TransformerConfig, *, partial: bool = False) -> dict[str, Any]:
    """config.json's position fields, in both spellings, so that transformers 4 and 5 and tools of either age read them.

    What has no counterpart there is left out: the caller compares what can be read back with `config`.
    """
    scaling = _write_scaling(config)
    longest = config.max_sequence_length or 2048
    if config.position_embedding_type == "rope" and config.rope_scaling_type == "dynamic":
        longest = config.rope_original_max_position_embeddings  # there the two are one field
    shared: dict[str, Any] = {"rope_theta": config.rotary_base}
    shared |= {"partial_rotary_factor": config.rotary_percent} if partial else {}
    return {
        "max_position_embeddings": longest,
        **shared,
        "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
        "rope_parameters": shared | scaling,
    }


def _write_scaling(config: TransformerConfig) -> dict[str, Any]:
    if config.position_embedding_type == "yarn":
        return {
            "rope_type": "yarn",
            "factor": config.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": config.yarn_original_max_position_embeddings,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "truncate": config.yarn_correction_range_round_to_int,
            **_write_concentration(config),
        }
    if config.rope_scaling_type == "none":
        if config.seq_len_interpolation_factor is None:
            return {"rope_type": "default"}
        return {"rope_type": "linear", "factor": config.seq_len_interpolation_factor}
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling_type, "factor": config.rope_scaling_factor}
    original = {"original_max_position_embeddings": config.rope_original_max_position_embeddings}
    if config.rope_scaling_type == "llama3":
        frequencies = {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
        scaling |= original | frequencies
    if config.rope_scaling_type == "longrope":
        short, long = config.rope_short_factor or (), config.rope_long_factor or ()
        scaling |= original | {"short_factor": list(short), "long_factor": list(long)}
        if config.rope_attention_factor is not None:
            scaling["attention_factor"] = config.rope_attention_factor
    return scaling


def _write_concentration(config: TransformerConfig) -> dict[str, float]:
    rotary = rotary_embedding(config)
    assert isinstance(rotary, YarnRotaryEmbedding)
    given = {"mscale": config.yarn_mscale, "mscale_all_dim": config.yarn_mscale_all_dim}
    written = {name: value for name, value in given.items() if value}
    # One of the two alone says nothing about the concentration there, which then has the value of neither.
    said = len(written) == 2 or rotary.concentration == yarn_mscale(rotary.scaling_factor, 1.0)
    if config.rope_attention_factor is None and said:
        return written
    return written | {"attention_factor": rotary.concentration}


def position_key(config: TransformerConfig) -> tuple[Any, ...]:
    """What positions do in `config`, without the options that have no effect in it: equal keys compute the same."""
    c = config
    if c.position_embedding_type == "learned_absolute":
        return ("learned_absolute", c.max_sequence_length)
    rotary = rotary_embedding(c)
    if rotary is None:
        return ("none",)
    shared = (c.position_embedding_type, c.rotary_dim, c.rotary_base)
    original = c.rope_original_max_position_embeddings
    if isinstance(rotary, YarnRotaryEmbedding):
        ramp = (c.yarn_beta_fast, c.yarn_beta_slow, c.yarn_correction_range_round_to_int)
        scaled = (c.yarn_rotary_scaling_factor, c.yarn_original_max_position_embeddings)
        return (*shared, *scaled, *ramp, rotary.concentration)
    if isinstance(rotary, MultimodalRotaryEmbedding):
        return (*shared, c.mrope_section, c.seq_len_interpolation_factor or 1.0)
    scaling: dict[str, tuple[Any, ...]] = {
        "none": (),
        "llama3": (c.rope_scaling_factor, c.rope_low_freq_factor, c.rope_high_freq_factor, original),
        "dynamic": (c.rope_scaling_factor, original),
        "longrope": (c.rope_scaling_factor, c.rope_short_factor, c.rope_long_factor, c.rope_attention_factor, original),
    }
    interpolation = c.seq_len_interpolation_factor or 1.0
    return (*shared, c.rotary_interleaved, interpolation, c.rope_scaling_type, *scaling[c.rope_scaling_type])
