"""kill -9 at random moments of a run, started again until it is done: the end is the same to the last bit."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STEPS_BETWEEN_KILLS = 30
FLAGS = "--save-interval 3 --eval-interval 20 --hidden-dropout 0.1"
TIMES = ("step_time", "tokens_per_second", "tflops_per_device", "mfu")


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_for_progress(process: subprocess.Popen[bytes], run_dir: Path, steps: int) -> None:
    """Until the process has taken `steps` steps beyond where it began; it may drop rows first, when it resumes."""
    deadline, least = time.monotonic() + 120, _lines(run_dir)
    while process.poll() is None and _lines(run_dir) < least + steps:
        assert time.monotonic() < deadline, "no progress"
        least = min(least, _lines(run_dir))
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(kills, tiny, read_saved, program_env):
    dice, total = random.Random(kills), STEPS_BETWEEN_KILLS * (kills + 1)
    flags = f"{FLAGS} --train-iters {total}"
    killed = tiny.text.with_name("killed")
    command = [sys.executable, "-m", "megajax.train", *tiny.argv("killed", flags)]
    log = (killed.with_name("log")).open("wb")
    starts, beyond = 0, []
    while starts <= kills:
        process = subprocess.Popen(command, env=program_env, stdout=log, stderr=log, start_new_session=True)
        starts += 1
        try:
            if starts <= kills:
                _wait_for_progress(process, killed, dice.randrange(1, STEPS_BETWEEN_KILLS))
                time.sleep(dice.uniform(0, 0.02))  # and into whatever it is doing then
                assert process.poll() is None, f"done before it could be killed: {killed.with_name('log').read_text()}"
                process.send_signal(signal.SIGKILL)
            code = process.wait(timeout=120)
        finally:
            process.kill()
        assert code == (-9 if starts <= kills else 0), killed.with_name("log").read_text()
        steps = [int(p.name[5:]) for p in (killed / "checkpoints").glob("step_*") if "." not in p.name]
        beyond.append(_lines(killed) - max(steps, default=0))
    print(f"{kills} kills; rows beyond the newest checkpoint at each: {beyond[:-1]}")

    assert (
        subprocess.run([*command[:3], *tiny.argv("whole", flags)], env=program_env, stdout=log, check=False).returncode
        == 0
    )
    whole = killed.with_name("whole")
    assert [row["step"] for row in _rows(killed) if "loss" in row] == list(range(1, total + 1))
    assert _rows(killed) == _rows(whole)
    (step, state), (other_step, other) = read_saved(killed), read_saved(whole)
    assert step == other_step == total
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert value.tobytes() == other[name].tobytes(), name
    assert {p.name for p in (killed / "checkpoints").iterdir()} == {p.name for p in (whole / "checkpoints").iterdir()}
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}
