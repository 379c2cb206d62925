"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator

from megajax.config import ConfigError


@contextlib.contextmanager
def clear_errors(path: str | os.PathLike[str], *, instead: str) -> Iterator[None]:
    """Turns the system's errors while `path` is written into a ConfigError of one line that names it and the fix.

    Args:
      instead: what else could be done than to make `path` writable, in the imperative.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else os.strerror(error.errno).lower() if error.errno else str(error)
        fix = "make room there" if full else "make it writable"
        raise ConfigError(f"cannot write {path}: {why}; {fix}, or {instead}") from error


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
      ConfigError: the folder cannot be written, or the disk is full. An error of the system in the body counts as such,
        so nothing but writing into the temporary folder belongs there.
    """
    target = pathlib.Path(path)
    with clear_errors(target, instead="choose a folder that can be written"):
        missing = [folder for folder in target.parents if not folder.exists()]
        temporary = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            try:
                os.rename(temporary, target)
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            remove_empty(missing)


def remove_empty(folders: Iterable[pathlib.Path]) -> None:
    """Removes the folders, innermost first, up to the first that holds something or is not there to be removed."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    """The process's umask; reading it means setting it, so it is put back at once."""
    current = os.umask(0)
    os.umask(current)
    return current
