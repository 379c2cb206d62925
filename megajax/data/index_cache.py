"""Index arrays kept on disk between runs: one folder for each key, complete or absent, mapped by every process."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megajax.config import ConfigError
from megajax.data.files import new_directory

CACHE_FORMAT = 1
"""Part of every key; raise it when the meaning of the cached arrays changes."""

Arrays = dict[str, np.ndarray]


class IndexArrays:
    """Named arrays, either held in memory or mapped from `folder`; pickling the latter sends only the name."""

    def __init__(self, arrays: Arrays | None = None, *, folder: str | None = None):
        self.folder = folder
        self.arrays = arrays if arrays is not None else _load(pathlib.Path(folder or ""))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Callable[..., IndexArrays], tuple[Any, ...]]:
        return (IndexArrays, (self.arrays,)) if self.folder is None else (_from_folder, (self.folder,))


def load_or_build(
    cache_path: str | os.PathLike[str] | None, kind: str, key: dict[str, Any], build: Callable[[], Arrays]
) -> IndexArrays:
    """The arrays that `build` makes, from the cache where it has them.

    Several processes may build the same entry at once; they make equal arrays, and one of them is kept.

    Args:
      cache_path: the cache folder; None builds in memory.
      kind: first part of the entry's name.
      key: everything the arrays depend on, as JSON values.

    Raises:
      ConfigError: the folder cannot be written, the disk is full, or an entry is damaged.
    """
    if cache_path is None:
        return IndexArrays(build())
    description = json.dumps({"format": CACHE_FORMAT, **key}, indent=1, sort_keys=True)
    entry = pathlib.Path(cache_path) / f"{kind}-{hashlib.sha256(description.encode()).hexdigest()[:32]}"
    if not entry.is_dir():
        arrays = build()
        with new_directory(entry) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            (temporary / "description.json").write_text(description + "\n")
    return _from_folder(str(entry))


def _from_folder(folder: str) -> IndexArrays:
    return IndexArrays(folder=folder)


def _load(folder: pathlib.Path) -> Arrays:
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"the index cache {folder} is damaged: {error}; delete that folder") from error
