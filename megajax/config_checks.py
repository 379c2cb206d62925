"""Checks of settings, and the error that a user's mistake becomes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the field, its value, and the fix."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_divides(what: str, size: int, by: str, divisor: int) -> None:
    """Raises unless `divisor`, the value of the field `by`, divides `size`."""
    require(divisor > 0, f"{by}={divisor} must be at least 1")
    require(size % divisor == 0, f"{what}={size} is not divisible by {by}={divisor}; change one of them")


def require_positive(config: Any, *names: str) -> None:
    """Raises if a field is neither None nor above 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name}={value} must be greater than 0")


def require_fraction(config: Any, *names: str) -> None:
    """Raises if a field is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value < 1.0, f"{name}={value} must be at least 0 and below 1")


def parse_split(split: str) -> tuple[float, float, float]:
    """`"969,30,1"` -> fractions of train, validation and test that sum to 1."""
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        parts = []
    parts += [0.0] * (3 - len(parts))
    require(
        len(parts) == 3 and min(parts) >= 0 and sum(parts) > 0,
        f"split={split!r} must be up to three numbers such as 969,30,1",
    )
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def to_tuple(value: Any) -> Any:
    """Lists (as JSON gives them) to tuples, all the way down, so that configs stay hashable."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(to_tuple(v) for v in value)
    return value
