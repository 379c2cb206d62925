"""The text of --help: every flag on one line, grouped, with the defaults of the chosen model."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megajax import cli_flags
from megajax.config import Config

_COLUMN = 44
"""Where the explanations start."""


def show(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    return repr(value) if isinstance(value, float) else str(value)


def _documentation(owner: type) -> tuple[dict[str, str], dict[str, str]]:
    """Field -> first sentence of the string below it, and field -> title of the comment above its section."""
    docs: dict[str, str] = {}
    sections: dict[str, str] = {}
    for cls in reversed([c for c in owner.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(cls))
        titles = {i: m[1] for i, line in enumerate(source.splitlines(), 1) if (m := re.match(r" {4}# (\w.*)$", line))}
        body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
        name = None
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
                sections[name] = next((titles[i] for i in sorted(titles, reverse=True) if i < node.lineno), "")
            elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docs[name] = " ".join(str(node.value.value).split()).split(". ")[0].rstrip(".")
            else:
                name = None
    return docs, sections


def _in_reading_order(flags: Iterable[cli_flags.Flag]) -> list[cli_flags.Flag]:
    """Group by group; in each, what a class says itself before what the classes say that it is made of."""

    def place(flag: cli_flags.Flag) -> tuple[int, int]:
        said_by = (flag.name in inspect.get_annotations(cls) for cls in flag.owner.__mro__)
        return groups.index(flag.group), [*said_by].index(True)

    flags = list(flags)
    groups = list(dict.fromkeys(flag.group for flag in flags))
    return sorted(flags, key=place)


def _flag_line(flag: cli_flags.Flag, default: Any, doc: str) -> tuple[str, str]:
    others = [alias for alias, field in cli_flags.ALIASES.items() if field == flag.name]
    names = ", ".join([cli_flags.spell(flag.name), *others])
    if flag.is_bool:
        names, default = names.replace("--", "--[no-]", 1), "on" if default else "off"
    else:
        names = f"{names} {cli_flags.describe(flag.annotation)}"
    known = "" if default is None or default == () else f" [{show(default)}]"
    return names, f"{doc}{known}".strip()


def _lines(left: str, right: str, width: int) -> Iterator[str]:
    one = f"  {left}".ljust(_COLUMN - 2) + f"  {right}"
    if len(one) <= width:
        yield one.rstrip()
        return
    wrapped = textwrap.wrap(right, width - _COLUMN)
    if len(left) + 4 > _COLUMN:
        yield f"  {left}"
    else:
        yield f"  {left}".ljust(_COLUMN) + wrapped.pop(0)
    yield from (" " * _COLUMN + line for line in wrapped)


def help_text(prog: str, families: Mapping[str, tuple[str, ...]], config: Config) -> str:
    """The whole text.

    Args:
      prog: how the program is called, such as `python -m megajax.train`.
      families: name of every model family -> names of its presets.
      config: its values are the defaults shown.
    """
    width = max(min(shutil.get_terminal_size().columns, 120), 80)
    presets = ", ".join(families[config.model_family]) or "none"
    controls = {
        "--model": f"{', '.join(families)} [{config.model_family}]",
        "--preset": f"of {config.model_family}: {presets}",
    }
    metavars = {"--model": " NAME", "--preset": " NAME", "--config": " FILE", "--help": ", -h"}
    metavars["--print-sharding"] = " [DEVICES]"
    out = [f"usage: {prog} [--model NAME] [--preset NAME | --config FILE] [flags]", ""]
    out += ["A flag wins over --config, that over --preset, that over the defaults in [brackets]. Megatron-LM's names."]
    out += ["", "program"]
    for name, text in cli_flags.CONTROL.items():
        extra = f": {controls[name]}" if name in controls else ""
        out += _lines(name + metavars.get(name, ""), text + extra, width)
    docs_of = {owner: _documentation(owner) for owner in cli_flags.group_types(type(config.model)).values()}
    heading = ""
    for flag in _in_reading_order(cli_flags.flags_of(type(config.model)).values()):
        docs, sections = docs_of[flag.owner]
        title = f"{flag.group}: {sections[flag.name].lower()}" if sections.get(flag.name) else flag.group
        if title != heading:
            out += ["", title]
            heading = title
        if not flag.is_record:
            value = getattr(getattr(config, flag.group), flag.name)
            out += _lines(*_flag_line(flag, value, docs.get(flag.name, "")), width)
    out += ["", "Megatron's other spellings"]
    for switch, changes in cli_flags.SWITCHES.items():
        out += _lines(switch, " ".join(_setting(k, v) for k, v in changes.items()) or "accepted", width)
    for name, field in cli_flags.RECORD_FILES.items():
        out += _lines(f"{name} FILE", f"{field} from a JSON file", width)
    return "\n".join(out)


def _setting(field: str, value: Any) -> str:
    flag = cli_flags.spell(field)
    if isinstance(value, bool):
        return flag if value else "--no-" + flag[2:]
    return f"{flag} {show(value)}"
