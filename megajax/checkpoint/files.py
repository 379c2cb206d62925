"""Step folders on disk: their names, the integrity manifest, atomic JSON files, leftovers and the writer's lock.

A checkpoint folder holds one folder a step, `step_00000123`, and a step folder appears under that name only by one
atomic rename, when everything in it has been written. Anything else there is a leftover of an interrupted run:

    step_N.orbax-checkpoint-tmp    a save that never finished
    step_N.deleting                an old step that was being removed
    step_N.replaced                the former step N, put aside while it is saved anew
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from megajax.config import ConfigError
from megajax.data.files import remove_empty

CONFIG_FILE = "config.json"
EXTRAS_FILE = "extras.json"
TREE_FILE = "tree.json"
INTEGRITY_FILE = "integrity.json"
LOCK_FILE = ".lock"
DELETING, REPLACED = ".deleting", ".replaced"
# Orbax adds these after the manifest, at the moment of its commit; neither is read by a restore.
_WRITTEN_AT_COMMIT = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"(step_\d{8,})\.(deleting|replaced|orbax-checkpoint-tmp.*)")
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or written. The message is one line: where, what is wrong, the fix."""


def step_folder(directory: Path, step: int) -> Path:
    """`directory/step_00000123`."""
    return directory / f"step_{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """The complete steps in `directory`, ascending; empty when it does not exist.

    Raises:
      CheckpointError: the folder cannot be listed.
    """
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot list the checkpoints ({reason(error)}); give another folder"
        ) from None
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def require_steps(directory: Path) -> list[int]:
    """`list_steps`, but a folder without any is a `CheckpointError` that says where they might be."""
    steps = list_steps(directory)
    if steps:
        return steps
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such folder; give the folder that holds the step_* folders")
    for other in (directory.parent, directory / "checkpoints"):
        if list_steps(other) and (other != directory.parent or _STEP.fullmatch(directory.name)):
            raise CheckpointError(f"{directory}: holds no step_* folder; did you mean {other}?")
    raise CheckpointError(f"{directory}: is no checkpoint, it holds no step_* folder; give the folder that does")


def fsync_folder(path: Path) -> None:
    """Makes renames inside `path` survive a power failure, where the file system allows it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Writes `path` completely or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Parses one of a step's JSON files; `CheckpointError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); restore another step") from None


def write_integrity(folder: Path) -> int:
    """Writes the manifest of `folder`: size and SHA-256 of every file in it. Returns the sum of the sizes."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in _WRITTEN_AT_COMMIT | {INTEGRITY_FILE}]
    sizes = [(folder / name).stat().st_size for name in names]
    files = {
        name: {"bytes": size, "sha256": digest}
        for name, size, digest in zip(names, sizes, _sha256_all(folder, names), strict=True)
    }
    write_text(folder / INTEGRITY_FILE, json.dumps({"files": files}, indent=1))
    fsync_folder(folder)
    return sum(sizes)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a step, or None when all are as they were written."""
    try:
        recorded = json.loads((folder / INTEGRITY_FILE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{INTEGRITY_FILE} cannot be read ({reason(error)})"
    if TREE_FILE not in expected:
        return f"{INTEGRITY_FILE} does not list {TREE_FILE}"
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    try:
        for (name, (_, digest)), found in zip(expected.items(), _sha256_all(folder, list(expected)), strict=True):
            if found != digest:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"a file cannot be read ({reason(error)})"
    return None


def _sha256_all(folder: Path, names: list[str]) -> Iterator[str]:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # Hashing releases the interpreter lock, so a large step is limited by the disk and not by one core.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(digest, names)


def remove_step(folder: Path) -> None:
    """Removes a step so that no moment shows half of it under its own name."""
    doomed = folder.with_name(folder.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def put_aside(folder: Path) -> None:
    """Renames an existing step to make room for a new save of it; undone by `clean_leftovers`."""
    if folder.exists():
        aside = folder.with_name(folder.name + REPLACED)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def clean_leftovers(directory: Path) -> None:
    """Removes what an interrupted run left; a step that was put aside and never replaced gets its name back."""
    for path in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = directory / match[1]
        if path.name.endswith(REPLACED) and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def claim(directory: Path) -> IO[str]:
    """Creates `directory`, proves that it can be written, and locks it against a second run until the file is closed.

    Raises:
      CheckpointError: not writable, the disk is full, no folder, or another process saves there. Folders that this
        would have made are then not there.
    """
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
        lock = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the store is open
    except OSError as error:
        remove_empty(missing)
        raise CheckpointError(f"save={directory}: cannot write there ({reason(error)}); give another folder") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise CheckpointError(f"save={directory}: {owner} is saving there; give another folder") from None
        # A file system without locks: two runs in one folder then stay the user's business.
    else:
        with contextlib.suppress(OSError):  # a full disk has no room for the name; the lock holds without it
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    return lock


def reason(error: BaseException) -> str:
    """Why a read or write failed, in a few words: the system's error where there is one, else the first line."""
    cause: BaseException | None = error
    while cause is not None:
        code = cause.errno if isinstance(cause, OSError) else None
        if code is None and (match := _TENSORSTORE_ERRNO.search(str(cause))):
            code = int(match[1])
        if code is not None:
            return "the disk is full" if code in _DISK_FULL else os.strerror(code).lower()
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
