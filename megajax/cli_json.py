"""Reads config.json, checking names and types before any config group sees them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megajax import cli_flags
from megajax.cli_flags import meant
from megajax.config import ConfigError, TransformerConfig, to_tuple


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file, or in the config.json of a folder. Raises ConfigError where there is none."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{file} cannot be read: {reason}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(data).__name__}")
    return data


def values_from_json(data: Mapping[str, Any], config_type: type[TransformerConfig], *, source: str) -> dict[str, Any]:
    """Field -> value of everything in the groups of `data`, which may leave anything out.

    Raises:
      ConfigError: an unknown name or a value of the wrong type; the message starts with `source`.
    """
    groups = cli_flags.group_types(config_type)
    values: dict[str, Any] = {}
    for group, content in data.items():
        if group == "model_family":
            continue
        if group not in groups:
            raise ConfigError(f"{source}: {group} is unknown{meant(group, groups)}")
        values |= _fields(content, groups[group], f"{source}: {group}")
    return values


def _fields(content: Any, owner: type, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a JSON object, not {content!r}")
    known = {field.name for field in dataclasses.fields(owner) if field.init}
    hints = get_type_hints(owner)
    values = {}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{where}.{name} is unknown{meant(name, known)}")
        record = cli_flags.record_type(hints[name])
        if record is not None and isinstance(value, list):
            value = [record(**_fields(v, record, f"{where}.{name}[{i}]")) for i, v in enumerate(value)]
        values[name] = to_tuple(value)
        if not _fits(hints[name], values[name]):
            expected = cli_flags.describe(hints[name])
            raise ConfigError(f"{where}.{name}={json.dumps(value)} is not valid: expected {expected}")
    return values


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value is of the type, as JSON can express types: every int is a float, no bool is an int."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is tuple:
        if not isinstance(value, tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            return False
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return all(map(_fits, kinds, value))
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)
