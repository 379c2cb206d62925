"""Which layer of a hybrid model is of which kind: the pattern language, and patterns made from ratios.

Megatron: `core/ssm/mamba_hybrid_layer_allocation.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping

from megajax.config_checks import ConfigError, require

MAMBA, ATTENTION, MLP, MOE, SHARED = "M", "*", "-", "E", "S"
KINDS: Mapping[str, str] = {
    MAMBA: "Mamba-2",
    ATTENTION: "attention",
    MLP: "MLP",
    MOE: "mixture of experts",
    SHARED: "Mamba-2 after a transformer block that layers share",
}
"""Symbols of a pattern, each one layer. All but `SHARED`, which is Zamba2's, are Megatron's."""

_ELSEWHERE = {
    "|": "divides layers over pipeline stages, which is what pipeline_model_parallel_layout is for",
    "/": "begins multi-token prediction, which hybrid models do not have here",
    "G": "is a layer of Gated DeltaNet, which is not supported",
    "D": "is a layer of sparse attention, which is not supported",
    "+": "is a layer of multi-latent attention; write * and set multi_latent_attention",
}


def check_pattern(pattern: str) -> None:
    """Raises ConfigError for a symbol that is none of `KINDS`."""
    for symbol in pattern:
        if symbol not in KINDS:
            known = ", ".join(f"{key} ({kind})" for key, kind in KINDS.items())
            why = _ELSEWHERE.get(symbol, "is no symbol of a layer")
            raise ConfigError(f"hybrid_override_pattern={pattern!r}: {symbol!r} {why}; known: {known}")


def allocate_layers(
    num_layers: int, attention_ratio: float, mlp_ratio: float, override_pattern: str | None = None
) -> str:
    """The pattern, one symbol a layer.

    Without `override_pattern`, attention layers lie evenly between equal sections of Mamba layers, the first and the
    last of them included; then MLPs take the place of Mamba layers, evenly and to the right.

    Args:
      attention_ratio, mlp_ratio: parts of the layers, from 0 to 1; the rest are Mamba layers.
      override_pattern: the pattern itself. Ratios above 0 must then agree with its numbers of layers.

    Raises:
      ConfigError: ratios out of range, an unknown symbol, a pattern of another length or with other numbers of layers.
    """
    ratios = f"hybrid_attention_ratio={attention_ratio} and hybrid_mlp_ratio={mlp_ratio}"
    in_range = min(attention_ratio, mlp_ratio) >= 0 and attention_ratio + mlp_ratio <= 1
    require(in_range, f"{ratios} must be 0 or more and together at most 1")
    allocated = _allocate(num_layers, attention_ratio, mlp_ratio)
    if override_pattern is None:
        return allocated
    check_pattern(override_pattern)
    require(
        len(override_pattern) == num_layers,
        f"hybrid_override_pattern={override_pattern!r} has {len(override_pattern)} layers for num_layers={num_layers};"
        " make them equal",
    )
    if attention_ratio or mlp_ratio:
        for symbol, kind in KINDS.items():
            require(
                allocated.count(symbol) == override_pattern.count(symbol),
                f"hybrid_override_pattern={override_pattern!r} has {override_pattern.count(symbol)} layers of {kind}"
                f" where {ratios} ask for {allocated.count(symbol)}; leave out the ratios",
            )
    return override_pattern


def _allocate(num_layers: int, attention_ratio: float, mlp_ratio: float) -> str:
    attention = round(num_layers * attention_ratio)
    section = (num_layers - attention) / (attention + 1)
    pattern = _placed([MAMBA] * num_layers, ATTENTION, section)
    mlps = round(num_layers * mlp_ratio)
    if mlps:
        pattern = _placed(pattern, MLP, (num_layers - attention - mlps) / mlps)
    return "".join(pattern)


def _placed(pattern: list[str], symbol: str, every: float) -> list[str]:
    """`pattern` with `symbol` after each `every` of its Mamba layers, on average."""
    result, left = [], every
    for old in pattern:
        if old != MAMBA:
            result.append(old)
        elif left < 0.5:
            result.append(symbol)
            left += every
        else:
            result.append(old)
            left -= 1
    return result


def layer_maps(pattern: str) -> dict[str, dict[int, int]]:
    """For each symbol: the index of a layer -> its index among the layers of its kind."""
    maps: dict[str, dict[int, int]] = {symbol: {} for symbol in KINDS}
    for index, symbol in enumerate(pattern):
        maps[symbol][index] = len(maps[symbol])
    return maps
