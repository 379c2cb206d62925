"""`--mesh tp=8,pp=4` in the trainer's flags."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from megajax.config import ConfigError

_FLAGS = ("tp", "pp", "vpp", "cp", "ep", "zero")
_SWITCHES = {"sp": "--sequence-parallel"}


def mesh_flags(mesh: str | None, devices: int) -> list[str]:
    """The words for a command line; "dp" is what is left of the devices, and checked.

    Raises:
      ConfigError: an axis that there is not, or a size that is no number.
    """
    words: list[str] = []
    sizes: dict[str, int] = {}
    for item in mesh.split(",") if mesh else []:
        name, _, value = item.strip().partition("=")
        if name in _SWITCHES:
            if value not in ("", "1"):
                raise ConfigError(f"--mesh {mesh}: {item.strip()} is not valid; write {name}, or leave it out")
            words.append(_SWITCHES[name])
            continue
        if name not in (*_FLAGS, "dp"):
            raise ConfigError(
                f"--mesh {mesh}: there is no axis {name!r}; choose from {', '.join((*_FLAGS, 'dp', 'sp'))}"
            )
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"--mesh {mesh}: {item.strip()} is not valid; expected a number")
        sizes[name] = int(value)
        words += [f"--{name}", value] if name in _FLAGS else []
    if "dp" in sizes:
        others = [max(1, sizes.get(name, 1)) for name in ("tp", "pp", "cp")]
        found = devices // (others[0] * others[1] * others[2])
        if found != sizes["dp"]:
            raise ConfigError(
                f"--mesh {mesh}: dp={sizes['dp']} is not what {devices} devices leave, {found}; change one"
            )
    return words
