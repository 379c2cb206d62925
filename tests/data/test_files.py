"""Files and folders that appear whole or not at all."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import multiprocessing
import os
import pathlib

import pytest

from megajax.config import ConfigError
from megajax.data.files import new_directory, publish, temporary_beside


def test_publish_replaces_at_once(tmp_path):
    target = tmp_path / "deep" / "file"
    for content in ("old", "new"):
        temporary = temporary_beside(target)
        pathlib.Path(temporary).write_text(content)
        publish(temporary, target)
        assert target.read_text() == content
        assert list(target.parent.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "d") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    target = tmp_path / "made" / "too" / "d"
    with pytest.raises(ConfigError) as caught, new_directory(target) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == (
        f"cannot write {target}: the disk is full; make room there, or choose a folder that can be written"
    )
    assert list(tmp_path.iterdir()) == []


def _make(target: pathlib.Path, number: int) -> None:
    for _ in range(20):
        with new_directory(target) as folder:
            (folder / "a").write_text(str(number))
            (folder / "b").write_text(str(number))


def test_one_of_several_processes_wins(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tmp_path / "d", i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d/a").read_text() == (tmp_path / "d/b").read_text()


def test_unwritable_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        temporary_beside(tmp_path / "file" / "x")
    with pytest.raises(ConfigError, match="cannot write"), new_directory(tmp_path / "file" / "x"):
        pass
