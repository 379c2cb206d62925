"""What goes wrong on disk: damage, leftovers, no permission, two writers, a full disk."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megajax.checkpoint import CheckpointError, CheckpointStore, files, read_config
from megajax.config import CheckpointConfig

CONFIG = CheckpointConfig(async_save=False, save_retain=3)


def _open(directory: Path, **kwargs) -> CheckpointStore:
    return CheckpointStore.open(directory, CONFIG, family="gpt", model_config={}, **kwargs)


def _state(step: int) -> dict:
    return {"params": {"w": np.arange(40.0) + step, "b": np.full((3, 5), step, np.int32)}, "step": step}


def _restored_step(store: CheckpointStore, step: int | None = None) -> int:
    state, extras = store.restore(_state(0), step=step)
    np.testing.assert_array_equal(state["params"]["w"], _state(state["step"])["params"]["w"])
    np.testing.assert_array_equal(state["params"]["b"], _state(state["step"])["params"]["b"])
    assert extras == {"at": state["step"]}
    return state["step"]


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "ck"
    with _open(directory) as store:
        for step in (1, 2):
            store.save(step, _state(step), {"at": step})
    return directory


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """A folder with the good steps 1 and 2, to be damaged."""
    shutil.copytree(_saved, tmp_path / "ck")
    return tmp_path / "ck"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink], ids=["flip", "truncate", "unlink"])
def test_damage_to_any_file_is_noticed(saved, harm):
    names = [p.relative_to(saved / "step_00000002") for p in (saved / "step_00000002").rglob("*") if p.is_file()]
    assert len(names) >= 8
    pristine = saved.parent / "pristine"
    shutil.copytree(saved / "step_00000002", pristine)
    with _open(saved, read_only=True) as store:
        for name in names:
            if os.stat(pristine / name).st_size == 0 and harm is not Path.unlink:
                continue
            harm(saved / "step_00000002" / name)
            # Orbax's notes on its commit hold nothing that a restore uses; everything else must be seen.
            harmless = str(name) in ("_CHECKPOINT_METADATA", "commit_success.txt")
            assert _restored_step(store) == (2 if harmless else 1), name
            shutil.rmtree(saved / "step_00000002")
            shutil.copytree(pristine, saved / "step_00000002")
        assert _restored_step(store) == 2


def test_manifest_holds_the_sha256_of_every_file(saved):
    folder = saved / "step_00000002"
    listed = json.loads((folder / "integrity.json").read_text())["files"]
    for name, entry in listed.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk - set(listed) - {"_CHECKPOINT_METADATA", "commit_success.txt"} == {"integrity.json"}


def test_a_damaged_newest_step_is_skipped_with_one_line(saved, caplog):
    _truncate(saved / "step_00000002" / "extras.json")
    with caplog.at_level(logging.WARNING, "megajax"), _open(saved) as store:
        assert _restored_step(store) == 1
        [record] = [r for r in caplog.records if r.name.startswith("megajax")]
        assert "step_00000002: is damaged, extras.json has" in record.getMessage()
        assert "\n" not in record.getMessage()
        store.save(2, _state(2), {"at": 2})  # the run reaches step 2 again and replaces it
        assert _restored_step(store) == 2


def test_a_damaged_step_asked_for_by_number_is_an_error(saved):
    _truncate(saved / "step_00000002" / "extras.json")
    with _open(saved) as store:
        with pytest.raises(CheckpointError, match=r"step_00000002: is damaged.*restore another step \(1\)"):
            store.restore(_state(0), step=2)
        assert _restored_step(store, step=1) == 1


def test_nothing_but_damaged_steps(saved):
    for step in (1, 2):
        (saved / f"step_0000000{step}" / "integrity.json").unlink()
    with _open(saved) as store, pytest.raises(CheckpointError, match=r"step_00000002: is damaged, integrity.json"):
        store.restore(_state(0))


def test_folders_that_hold_no_checkpoint(saved, tmp_path):
    def message(directory: Path) -> str:
        store = _open(directory, read_only=True)
        assert store.latest_step() is None
        with pytest.raises(CheckpointError) as caught:
            store.restore(_state(0))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint" in message(tmp_path / "empty")
    assert str(saved) in message(saved / "step_00000002")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(saved, run / "checkpoints")
    assert f"did you mean {run / 'checkpoints'}" in message(run)
    with pytest.raises(CheckpointError, match="has no step 7; it has 1, 2"):
        _open(saved, read_only=True).restore(_state(0), step=7)
    with pytest.raises(CheckpointError, match="cannot list"):
        files.list_steps(saved / "step_00000002" / "config.json")


def test_read_only_leaves_a_folder_untouched(saved):
    (saved / "step_00000003.orbax-checkpoint-tmp").mkdir()
    before = sorted(saved.rglob("*"))
    with _open(saved, read_only=True) as store:
        assert _restored_step(store) == 2
    assert sorted(saved.rglob("*")) == before


def test_leftovers_go_at_the_next_open(saved):
    for name in ("step_00000003.orbax-checkpoint-tmp", "step_00000001.deleting", "step_00000002.replaced"):
        (saved / name / "d").mkdir(parents=True)
    (saved / "notes.txt").write_text("the user's")
    with _open(saved) as store:
        assert _restored_step(store) == 2
    assert sorted(p.name for p in saved.iterdir()) == [".lock", "notes.txt", "step_00000001", "step_00000002"]


def test_a_step_put_aside_and_not_replaced_comes_back(saved):
    (saved / "step_00000002").rename(saved / "step_00000002.replaced")
    (saved / "step_00000002.orbax-checkpoint-tmp").mkdir()
    with _open(saved) as store:
        assert _restored_step(store) == 2


def test_no_permission_is_found_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"save=.*/file/ck: cannot write there \(.*\); give another folder"):
        _open(tmp_path / "file" / "ck")


def test_a_folder_of_somebody_else_is_found_at_open():
    # Not in tmp_path, which other users may not even enter: root has to become one of them to be refused.
    with tempfile.TemporaryDirectory() as locked:
        os.chmod(locked, 0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            for directory in (Path(locked), Path(locked) / "ck"):
                with pytest.raises(CheckpointError, match="permission denied"):
                    _open(directory)
        finally:
            if root:
                os.seteuid(0)


def test_a_second_run_in_the_same_folder_is_refused(saved):
    code = (
        "import sys; from megajax.checkpoint import CheckpointError, CheckpointStore\n"
        "from megajax.config import CheckpointConfig\n"
        "try: CheckpointStore.open(sys.argv[1], CheckpointConfig(), family='gpt', model_config={})\n"
        "except CheckpointError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(saved)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with _open(saved):
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert f"process {os.getpid()} on" in refused.stdout
    assert "is saving there" in refused.stdout
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert allowed.stdout == ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failing_write_is_one_line_and_harms_nothing(saved, monkeypatch, capfd, asynchronous):
    config = CheckpointConfig(async_save=asynchronous)
    with CheckpointStore.open(saved, config, family="gpt", model_config={}) as store:
        assert _restored_step(store) == 2
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_integrity", _no_space)
            with pytest.raises(CheckpointError) as caught:
                _save_and_wait(store, 3)
        assert "step 3 was not saved (the disk is full); step 2 is intact" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")
        assert sorted(p.name for p in saved.iterdir()) == [".lock", "step_00000001", "step_00000002"]
        assert _restored_step(store) == 2
        with monkeypatch.context() as patch:  # a step that was to be replaced keeps its former self
            patch.setattr(files, "write_integrity", _no_space)
            with pytest.raises(CheckpointError):
                _save_and_wait(store, 2, force=True)
        assert _restored_step(store) == 2
        store.save(3, _state(3), {"at": 3})  # there is room again
        assert _restored_step(store) == 3


def _save_and_wait(store: CheckpointStore, step: int, force: bool = False) -> None:
    store.save(step, _state(9), {"at": 9}, force=force)
    store.wait()


def _no_space(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


_FULL_DISK = """
import os, sys
import numpy as np
from megajax.checkpoint import CheckpointError, CheckpointStore
from megajax.config import CheckpointConfig

mount = sys.argv[1]
store = CheckpointStore.open(mount + "/ck", CheckpointConfig(), family="gpt", model_config={})
state = {"params": {"w": np.arange(200_000.0)}}
store.save(1, state, {})
store.wait()
free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
for left in (1_000_000, 20_000, 0):  # the arrays, or even their first metadata, do not fit
    with open(mount + "/filler", "wb") as filler:
        filler.write(b"x" * (free - left))
    try:
        store.save(2, state, {})
        store.wait()
    except CheckpointError as error:
        print(error)
    os.remove(mount + "/filler")
    assert sorted(os.listdir(mount + "/ck")) == [".lock", "step_00000001"], os.listdir(mount + "/ck")
    store.restore(state)
store.save(2, state, {})
store.close()
assert sorted(os.listdir(mount + "/ck")) == [".lock", "step_00000001", "step_00000002"]
"""


def test_a_disk_that_is_really_full(tmp_path, said):
    mount = tmp_path / "small"
    mount.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    shell = f"mount -t tmpfs -o size=4m none {mount}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "sh", "-c", shell], capture_output=True).returncode
    ):
        pytest.skip("mounting a small tmpfs needs unprivileged user namespaces")
    command = [*namespace, "sh", "-c", f'{shell} && exec "$0" -c "$1" {mount}', sys.executable, _FULL_DISK]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all("step 2 was not saved (the disk is full); step 1 is intact" in li for li in lines)
    assert said(result.stderr) == ""


def test_config_can_be_read_without_a_store(saved):
    assert read_config(saved)["step"] == 2
    assert read_config(saved, step=1) == {"format": 1, "step": 1, "family": "gpt", "model_config": {}}
    (saved / "step_00000002" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config(saved)
