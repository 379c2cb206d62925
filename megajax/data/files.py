"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from megajax.config import ConfigError


def temporary_beside(path: str | os.PathLike[str]) -> str:
    """Creates an empty temporary file in the folder of `path` (made if needed) and returns its name.

    Raises:
      ConfigError: the folder cannot be written.
    """
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp gives 0600, which other users could not read after the rename
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose a folder that can be written") from error
    return name


def publish(temporary: str, path: str | os.PathLike[str]) -> None:
    """Flushes `temporary` to the disk and renames it to `path`."""
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder, for plain files, that becomes `path` on success.

    Several processes may do this at once for the same `path`: the first one wins, the others' folders are dropped.

    Raises:
      ConfigError: the parent folder cannot be written.
    """
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """The process's umask; reading it means setting it, so it is put back at once."""
    current = os.umask(0)
    os.umask(current)
    return current
