"""The command line: flags, presets and config files to one validated `Config`, and errors to one line.

Precedence: flags > `--config FILE` > `--preset NAME` > the default of the model family. tyro turns the words after a
flag into a value of the field's type. What surrounds it is done here, because a program needs to know which flags were
given (fields that follow from others are filled in again, and a flag that changes nothing is an error), Megatron's
spellings are not all fields, and a mistake is to be answered by one line.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import tyro

from megajax import __version__, cli_effects, cli_flags, cli_help
from megajax.cli_flags import Flag, describe, meant, spell
from megajax.cli_json import read_json, values_from_json
from megajax.config import Config, ConfigError, TransformerConfig, heterogeneous_layers_from_json


class FamilyCli(Protocol):
    """What the command line needs to know of a model family."""

    @property
    def name(self) -> str:
        """Value of `--model`."""
        ...

    @property
    def config_type(self) -> type[TransformerConfig]:
        """Its fields are the flags of the model."""
        ...

    @property
    def default(self) -> Config:
        """What runs without flags: small enough for a CPU."""
        ...

    @property
    def presets(self) -> Mapping[str, Callable[[], TransformerConfig]]:
        """Value of `--preset` -> the model's config."""
        ...


Families = Mapping[str, FamilyCli]


@dataclasses.dataclass(frozen=True)
class _Given:
    """One flag of the command line and the words behind it."""

    flag: str
    words: tuple[str, ...]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The fields it sets."""

    def __str__(self) -> str:
        return shlex.join((self.flag, *self.words))


def parse(argv: Sequence[str], *, prog: str, families: Families) -> Config:
    """The config that a command line asks for.

    Prints one warning on stderr when it ignores flags of Megatron that mean nothing here. `--help` and `--version`
    print and exit with code 0.

    Args:
      argv: the words after the program's name.
      prog: how the program is called, for the help text.
      families: the model families by name; the first is the default of `--model`.

    Raises:
      ConfigError: something cannot work; one line that names the flag, its value and the fix.
      SystemExit: after `--help` or `--version`.
    """
    control, given = _split_control(_scan(argv))
    if "--version" in control:
        print(f"megajax {__version__}", flush=True)
        raise SystemExit(0)
    path = control.get("--config")
    data = read_json(path) if path is not None else {}
    family = _choose_family(control, data, families)
    base = _preset(family, control["--preset"]) if "--preset" in control else family.default
    if "--help" in control:
        print(cli_help.help_text(prog, {name: tuple(f.presets) for name, f in families.items()}, base), flush=True)
        raise SystemExit(0)
    values = values_from_json(data, family.config_type, source=str(path))
    flags = cli_flags.flags_of(family.config_type)
    if "--preset" in control and values.keys() >= {f.name for f in flags.values() if f.group == "model"}:
        raise ConfigError(
            f"--preset {control['--preset']} has no effect: --config {path} describes the whole model; drop one"
        )
    ignored = [g.flag for g in given if _is_ignored(g.flag, flags)]
    given = [_interpret(g, flags, family.name, families) for g in given if g.flag not in ignored]
    values = _override(values, _merge(given), flags)
    swiglu = any(g.flag == "--swiglu" for g in given)
    values |= _companions(values, base, from_preset="--preset" in control, swiglu=swiglu)
    try:
        config = _apply(base, _with_records(base, values), flags)
    except ConfigError as error:
        raise ConfigError(_as_flags(str(error), flags)) from None
    _refuse_no_effect(given, config, flags)
    if ignored:
        print(f"warning: ignored, because JAX has no use for it: {', '.join(dict.fromkeys(ignored))}", file=sys.stderr)
    return config


def control_value(argv: Sequence[str], flag: str) -> str | None:
    """What stands behind a flag of `CONTROL` on a command line: "" for nothing, None where there is no such flag.

    Raises:
      ConfigError: as `parse`.
    """
    return _split_control(_scan(argv))[0].get(flag)


def to_json(config: Config) -> dict[str, Any]:
    """`config` as the plain types of JSON, for `config.json`. A field that follows from others is null."""
    data = dataclasses.asdict(config)
    del data["model"]["_derived"]
    data["model"] |= dict.fromkeys(config.model._derived)
    return json.loads(json.dumps(data))


def from_json(data: Mapping[str, Any], *, families: Families) -> Config:
    """Inverse of `to_json`. What `data` leaves out has the family's default.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or values that contradict each other.
    """
    family = _choose_family({}, data, families)
    values = values_from_json(data, family.config_type, source="config")
    values |= _companions(values, family.default)
    return _apply(family.default, values, cli_flags.flags_of(family.config_type))


class Parser(argparse.ArgumentParser):
    """For programs with few flags of their own: a mistake is a ConfigError, as everywhere."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ConfigError(f"{message}; see --help")


def run_main(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a program and exits with `exit_code` of it. An exception that is a bug keeps its traceback."""
    raise SystemExit(exit_code(lambda: main(sys.argv[1:])))


def exit_code(action: Callable[[], int | None]) -> int:
    """The action's own code, or else 2 after a user's mistake (`error: ...` on stderr), 130 after Ctrl-C, 141 when the
    reader of stdout has gone.
    """
    try:
        code = action() or 0
        sys.stdout.flush()
    except ConfigError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; give it a place to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    return code


# Words to flags


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _scan(argv: Sequence[str]) -> list[_Given]:
    """Groups the words behind each flag; `--flag=word` is one of them."""
    given: list[_Given] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            given.append(_Given(name.replace("_", "-"), (value,) if equals else ()))
        elif word == "-h":
            given.append(_Given("--help", ()))
        elif word.startswith("-") and not _is_number(word):
            raise ConfigError(f"{word} is not a flag; flags start with two hyphens (text may follow as --flag={word})")
        elif given:
            given[-1] = dataclasses.replace(given[-1], words=(*given[-1].words, word))
        else:
            raise ConfigError(f"{word!r} follows no flag; flags start with two hyphens, see --help")
    return given


def _split_control(given: Sequence[_Given]) -> tuple[dict[str, str], list[_Given]]:
    control = {}
    for g in given:
        if g.flag not in cli_flags.CONTROL:
            continue
        least, most, takes = cli_flags.CONTROL_VALUES.get(g.flag, (1, 1, "one value"))
        if not least <= len(g.words) <= most or "" in g.words:
            raise ConfigError(f"{g} is not valid: {g.flag} takes {takes}")
        control[g.flag] = g.words[0] if g.words else ""
    return control, [g for g in given if g.flag not in cli_flags.CONTROL]


def _choose_family(control: Mapping[str, str], data: Mapping[str, Any], families: Families) -> FamilyCli:
    saved = data.get("model_family")
    asked = control.get("--model")
    if saved is not None and asked not in (None, saved):
        raise ConfigError(f"--model {asked} differs from model_family={saved} of --config; drop --model")
    name = str(asked or saved or next(iter(families)))
    if name not in families:
        what = f"--model {name}" if asked or not saved else f"model_family={name}"
        raise ConfigError(f"{what} is unknown; there is {', '.join(families)}{meant(name, families)}")
    return families[name]


def _preset(family: FamilyCli, name: str) -> Config:
    if name not in family.presets:
        known = ", ".join(family.presets) or "none"
        raise ConfigError(f"--preset {name} is unknown; --model {family.name} has {known}{meant(name, family.presets)}")
    return dataclasses.replace(family.default, model=family.presets[name]())


def _is_ignored(flag: str, flags: Mapping[str, Flag]) -> bool:
    return _field_of(flag, flags) is None and any(fnmatch.fnmatchcase(flag, pattern) for pattern in cli_flags.IGNORED)


def _field_of(flag: str, flags: Mapping[str, Flag]) -> Flag | None:
    """The field that `--name`, or `--no-name` for booleans, sets."""
    name = cli_flags.ALIASES[flag] if flag in cli_flags.ALIASES else flag[2:].replace("-", "_")
    if name in flags and not flags[name].is_record:
        return flags[name]
    positive = name.removeprefix("no_")
    return flags[positive] if positive != name and positive in flags and flags[positive].is_bool else None


def _interpret(given: _Given, flags: Mapping[str, Flag], family: str, families: Families) -> _Given:
    """Adds the fields that the flag sets."""
    flag = given.flag
    field = _field_of(flag, flags)
    if field is not None:
        value = _bool(given, field) if field.is_bool else _typed(given, field.annotation)
        return dataclasses.replace(given, changes={field.name: value})
    if flag in cli_flags.SWITCHES:
        if given.words:
            raise ConfigError(f"{given} is not valid: {flag} takes no value; drop {given.words[0]!r}")
        return dataclasses.replace(given, changes=cli_flags.SWITCHES[flag])
    if flag in cli_flags.RECORD_FILES:
        return dataclasses.replace(given, changes={cli_flags.RECORD_FILES[flag]: read_json(_typed(given, str))})
    for row in cli_flags.REFUSED:
        if any(fnmatch.fnmatchcase(flag, pattern) for pattern in row.patterns):
            if len(given.words) == 1 and given.words[0] in row.accepted:
                return given
            raise ConfigError(f"{given} is {row.reason}")
    for other in families.values():
        if _field_of(flag, cli_flags.flags_of(other.config_type)) is not None:
            raise ConfigError(f"{flag} has no effect on --model {family}; it belongs to --model {other.name}")
    names = [spell(f.name) for f in flags.values() if not f.is_record]
    names += ["--no-" + f.name.replace("_", "-") for f in flags.values() if f.is_bool]
    names += [*cli_flags.CONTROL, *cli_flags.ALIASES, *cli_flags.SWITCHES, *cli_flags.RECORD_FILES]
    raise ConfigError(f"{flag} is unknown{meant(flag, names, '; see --help')}")


def _bool(given: _Given, field: Flag) -> bool:
    if not given.words:
        return given.flag == spell(field.name)
    value = given.words[0].lower()
    if len(given.words) > 1 or value not in ("true", "false") or given.flag != spell(field.name):
        name = field.name.replace("_", "-")
        raise ConfigError(f"{given} is not valid: {given.flag} takes no value; write --{name} or --no-{name}")
    return value == "true"


def _typed(given: _Given, annotation: Any) -> Any:
    """The words as a value of type `annotation`."""
    expected = describe(annotation)
    if not given.words:
        raise ConfigError(f"{given.flag} needs a value: {expected}")
    holder = dataclasses.make_dataclass("Holder", [("value", annotation)])
    words = [f"--value={given.words[0]}", *given.words[1:]]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro draws a box there
            value = tyro.cli(holder, args=words, console_outputs=False).value
    except SystemExit:
        valid = False
    else:
        parts = value if isinstance(value, tuple) else (value,)
        valid = all(math.isfinite(part) for part in parts if isinstance(part, float))
    if not valid:
        close = meant(given.words[0], expected.split("|")) if "|" in expected else ""
        raise ConfigError(f"{given} is not valid: expected {expected}{close}")
    return value


# Values to a config


def _merge(given: Sequence[_Given]) -> dict[str, Any]:
    """All settings. A flag given twice counts the last time; two flags that disagree are an error."""
    values: dict[str, Any] = {}
    owner: dict[str, _Given] = {}
    for g in given:
        for name, value in g.changes.items():
            first = owner.get(name, g)
            if first.flag.replace("--no-", "--") != g.flag.replace("--no-", "--") and values[name] != value:
                raise ConfigError(f"{first} and {g} disagree about {name}; drop one")
            values[name], owner[name] = value, g
    return values


def _override(lower: Mapping[str, Any], given: Mapping[str, Any], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Flags over the values of a file. A flag also takes back what it excludes, wherever that came from."""
    replaced = [
        other
        for name, value in given.items()
        if name in cli_flags.REPLACES and not flags[name].is_off(value)
        for other in cli_flags.REPLACES[name]
    ]
    return {**lower, **{name: flags[name].default for name in replaced}, **given}


def _companions(
    values: Mapping[str, Any], base: Config, *, from_preset: bool = False, swiglu: bool = False
) -> dict[str, Any]:
    """Values of `min_lr` and `ffn_hidden_size`, where nobody gave them and those of `base` do not suit.

    The least learning rate and the MLP width of a model family's default go with its own learning rate and hidden
    size; under others they fall back to zero and to the usual width. That is 4 hidden_size, and two thirds of it in
    multiples of 64 for a gated MLP or after Megatron's `--swiglu`.
    """
    found: dict[str, Any] = {}
    if "lr" in values and "min_lr" not in values:
        found["min_lr"] = 0.0
    model = base.model
    own_width = None if "ffn_hidden_size" in model._derived else model.ffn_hidden_size
    resized = "hidden_size" in values and "ffn_hidden_size" not in values and own_width is not None and not from_preset
    if resized or (swiglu and values.get("ffn_hidden_size", own_width) is None):
        gated = swiglu or values.get("gated_linear_unit", model.gated_linear_unit)
        size = values.get("hidden_size", model.hidden_size)
        found["ffn_hidden_size"] = max(64, size * 8 // 3 // 64 * 64) if gated else None
    return found


def _with_records(base: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the content of a heterogeneous layer file into records, which need sizes of the final model."""
    content = values.get("heterogeneous_layers")
    if not isinstance(content, dict):
        return dict(values)
    sizes = {name: getattr(base.model, name) for name in ("hidden_size", "num_attention_heads")}
    sizes |= {name: values[name] for name in sizes if name in values}
    try:
        layers = heterogeneous_layers_from_json(content, **sizes)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"heterogeneous_layers: the file is not a list of block_configs ({error})") from None
    return {**values, "heterogeneous_layers": layers}


def _apply(base: Config, values: Mapping[str, Any], flags: Mapping[str, Flag]) -> Config:
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        changes.setdefault(flags[name].group, {})[name] = value
    model = base.model.replace(**changes.pop("model", {}))
    groups = {group: dataclasses.replace(getattr(base, group), **new) for group, new in changes.items()}
    return dataclasses.replace(base, model=model, **groups)


def _as_flags(message: str, flags: Mapping[str, Flag]) -> str:
    """Field names in a message of the config groups as the flags that set them."""

    def flag(match: re.Match[str]) -> str:
        name, equals = match.groups()
        return spell(name) + equals if name in flags and (equals or "_" in name) else match[0]

    return re.sub(r"\b([a-z]\w*)(=?)", flag, message)


def _refuse_no_effect(given: Sequence[_Given], config: Config, flags: Mapping[str, Flag]) -> None:
    for g in given:
        names = {name for name, value in g.changes.items() if not flags[name].is_off(value)} | {g.flag}
        if fix := cli_effects.what_is_missing(names, config):
            raise ConfigError(f"{g} has no effect: {fix}")
