"""Runs of several processes: the numbers of one, one set of files, and an end together, whatever ends it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megajax.train import main

TIMES = ("step_time", "tokens_per_second", "tflops_per_device", "mfu")
ENDED = "the run has stopped, start it again to resume from its last checkpoint"


class Processes:
    """Training runs under the launcher."""

    def __init__(self, tiny: Any):
        self._tiny = tiny
        self._started: list[subprocess.Popen[str]] = []

    def start(self, run_dir: str, flags: str, *, count: int = 2, devices: int = 1) -> subprocess.Popen[str]:
        """Starts a run; its launcher leads a group of its own."""
        launcher = ["megajax.launch", "-n", str(count), "--devices-per-process", str(devices), "--"]
        command = [sys.executable, "-m", *launcher, sys.executable, "-m", "megajax.train"]
        command += self._tiny.argv(run_dir, flags)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._started.append(subprocess.Popen(command, **pipes))
        return self._started[-1]

    def train(self, run_dir: str, flags: str, *, count: int = 2, devices: int = 1) -> tuple[Path, str]:
        """Runs to the end; returns the run's folder and what was printed."""
        process = self.start(run_dir, flags, count=count, devices=devices)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        return self.folder(run_dir), out

    def folder(self, run_dir: str) -> Path:
        """The run's folder."""
        return self._tiny.text.with_name(run_dir)

    def when_at(self, process: subprocess.Popen[str], run_dir: str, step: int) -> list[int]:
        """Waits until the run has logged `step`; returns the ids of its processes in order."""
        deadline = time.monotonic() + 300
        while not any(row["step"] >= step for row in _rows(self.folder(run_dir))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.01)
        return _children(process)

    def end(self) -> None:
        """Kills what still runs."""
        for process in self._started:
            children = _children(process) if process.poll() is None else []
            process.kill()
            for child in children:
                os.kill(child, signal.SIGKILL)
            process.communicate()


def _children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture
def processes(tiny: Any) -> Iterator[Processes]:
    """Runs in the test's own folder."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    started = Processes(tiny)
    yield started
    started.end()


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _assert_close(run_dir: Path, other: Path, read_saved: Any) -> None:
    rows, other_rows = _rows(run_dir), _rows(other)
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-5)
    (step, state), (other_step, other_state) = read_saved(run_dir), read_saved(other)
    assert step == other_step
    for name, value in state.items():
        np.testing.assert_allclose(value, other_state[name], rtol=1e-4, atol=1e-6, err_msg=name)


def _assert_same(run_dir: Path, other: Path, read_saved: Any) -> None:
    assert _rows(run_dir) == _rows(other)
    (step, state), (other_step, other_state) = read_saved(run_dir), read_saved(other)
    assert step == other_step
    for name, value in state.items():
        assert value.tobytes() == other_state[name].tobytes(), name
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in other.iterdir()}
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {p.name for p in (other / "checkpoints").iterdir()}


# Microbatches, dropout and masked documents: rows in another order would show.
HARD = "--train-iters 60 --global-batch-size 8 --eval-interval 60 --save-interval 10 --hidden-dropout 0.1"


def test_two_processes_die_resume_and_stop_together(processes, tiny, read_saved, said):
    """One is killed: the other says so and ends. Steps taken again are the same. A signal to one stops both."""
    run = processes.start("run", HARD)
    os.kill(processes.when_at(run, "run", 14)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = run.communicate(timeout=120)
    seconds = time.monotonic() - killed
    assert run.returncode == 128 + signal.SIGKILL
    assert f"process 1 on {os.uname().nodename} has died; {ENDED}\n" in err
    assert err.endswith("process 1 was ended by SIGKILL\n")
    assert seconds < 30
    before = [row for row in _rows(processes.folder("run")) if "loss" in row]

    run = processes.start("run", HARD)
    os.kill(processes.when_at(run, "run", before[-1]["step"] + 2)[1], signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, said(err)) == (0, "")
    assert "checkpoints at step 10\n" in out
    assert "SIGTERM; resume with the same command" in out
    assert out.count("in /") == 1  # one process speaks
    after = [row for row in _rows(processes.folder("run")) if "loss" in row]
    assert after[: len(before)] == before
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    one = tiny.train("one", f"{HARD} --exit-interval {len(after)}", devices=2)
    _assert_close(processes.folder("run"), one, read_saved)
    assert {p.name for p in processes.folder("run").iterdir()} == {p.name for p in one.iterdir()}
    config = json.loads((processes.folder("run") / "config.json").read_text())
    assert config["distributed"]["num_processes"] is None


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(processes, read_saved):
    """Stopped by a signal, then by the death of process 0, then done: as if nothing had happened."""
    run = processes.start("parts", HARD)
    os.kill(processes.when_at(run, "parts", 3)[1], signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, out + err
    stopped, _ = read_saved(processes.folder("parts"))
    assert 3 <= stopped < 60

    run = processes.start("parts", HARD)
    os.kill(processes.when_at(run, "parts", stopped + 2)[0], signal.SIGKILL)
    assert run.communicate(timeout=120)[1].endswith("process 0 was ended by SIGKILL\n")
    assert run.returncode == 128 + signal.SIGKILL

    parts, out = processes.train("parts", f"{HARD} --sample-tokens 4")
    assert out.count("step 60/60") == 1  # of one process only
    assert "on dp=2 of 2 processes" in out
    assert "\nsample:\n" in out
    _assert_same(parts, processes.train("whole", HARD)[0], read_saved)


def test_processes_that_share_their_rows(processes, tiny, read_saved):
    """Tensor parallelism between two processes, and --config on another number of them."""
    flags = "--train-iters 6 --global-batch-size 4 --eval-interval 3 --tp 2 --sequence-parallel"
    run_dir, _ = processes.train("two", flags)
    _assert_close(run_dir, tiny.train("one", flags, devices=2), read_saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "layout"),
    [
        (4, 1, "--tp 2 --zero 1 --micro-batch-size 2"),
        (4, 1, "--zero 3 --micro-batch-size 1"),
        (2, 2, "--zero 1 --micro-batch-size 1"),
        (2, 2, "--tp 2 --zero 0 --micro-batch-size 2"),
    ],
)
def test_layouts(processes, tiny, read_saved, count, devices, layout):
    flags = f"--train-iters 6 --global-batch-size 8 --eval-interval 3 {layout}"
    run_dir, _ = processes.train("several", flags, count=count, devices=devices)
    _assert_close(run_dir, tiny.train("one", flags, devices=count * devices), read_saved)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 0), (4, 0), (4, 2)])
def test_a_dead_process_ends_a_run(processes, read_saved, tiny, count, victim):
    """Any of them; then one process goes on with what they have saved."""
    flags = "--train-iters 2000 --global-batch-size 8 --micro-batch-size 1 --save-interval 5 --split 1,0,0"
    run = processes.start("run", flags, count=count)
    pids = processes.when_at(run, "run", 12)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    _, err = run.communicate(timeout=120)
    print(f"{time.monotonic() - began:.2f} s")
    assert run.returncode == 128 + signal.SIGKILL
    assert f"process {victim} was ended by SIGKILL" in err
    assert victim == 0 or f"process {victim} on {os.uname().nodename} has died; {ENDED}" in err
    step, _ = read_saved(processes.folder("run"))
    assert step >= 5
    shutil.copytree(processes.folder("run"), processes.folder("copy"))
    # Evaluation takes a batch of every data-parallel shard, so its numbers depend on how many there are.
    on = flags.replace("2000", str(step + 3))
    _assert_close(tiny.train("copy", on), processes.train("run", on)[0], read_saved)


@pytest.mark.slow
def test_a_frozen_process_ends_a_run(processes):
    """It holds its connections, so only JAX's heartbeat tells."""
    flags = "--train-iters 100000 --global-batch-size 8 --heartbeat-timeout-seconds 10"
    run = processes.start("run", flags)
    frozen = processes.when_at(run, "run", 3)[1]
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    _, err = run.communicate(timeout=120)
    print(f"{time.monotonic() - began:.1f} s")
    assert run.returncode == 128 + signal.SIGABRT
    assert "error: JAX has ended process 0, for the reason above" in err
    assert "has been silent for 10 s, start the run again to resume from its last checkpoint" in err


@pytest.mark.slow
def test_the_clock_of_process_0_stops_all(processes, read_saved):
    run_dir, out = processes.train("run", "--train-iters 100000 --exit-duration-in-mins 0.02")
    assert "exit_duration_in_mins=0.02 are over" in out
    assert read_saved(run_dir)[0] == max(row["step"] for row in _rows(run_dir))


@pytest.mark.slow
def test_a_mistake_of_all_is_one_line(processes, said):
    run = processes.start("run", "--train-iters 5 --load nowhere")
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert said(err).splitlines()[0].startswith("error: ")
    assert "Traceback" not in err
    assert not processes.folder("run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-processes 2", "num_processes=2 needs process_id"),
        ("--coordinator node0:1 --process-id 0", "process_id=0 needs num_processes"),
        ("--coordinator node0 --num-processes 2 --process-id 0", "--coordinator=node0 must be HOST:PORT"),
        ("--num-processes 2 --process-id 2", "--process-id=2 must be below --num-processes=2"),
    ],
)
def test_half_given_flags(tiny, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", *tiny.argv("run", flags)])
    from megajax import cli

    with pytest.raises(SystemExit) as caught:
        cli.run_main(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not tiny.text.with_name("run").exists()
