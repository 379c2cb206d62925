"""Files of a run folder: whole or not at all, and a disk that fails is one clear line."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from megajax.data import files
from megajax.data.files import publish, temporary_beside


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file that becomes `path` on success and goes away otherwise.

    Raises:
      ConfigError: the disk is full, or the folder cannot be written.
    """
    temporary = Path(temporary_beside(path))
    try:
        with clear_errors(path):
            yield temporary
            publish(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_errors(path: Path) -> AbstractContextManager[None]:
    """Turns the system's errors while `path` is written into one line that names it and says what to do."""
    return files.clear_errors(path, instead="give another run_dir")
