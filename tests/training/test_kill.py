"""kill -9 at random moments: the run, started again each time, ends with the bits of one that was never killed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FLAGS = "--train-iters 400 --save-interval 7 --eval-interval 50 --log-interval 1000 --hidden-dropout 0.1"


def _run(argv: list[str], env: dict[str, str], *, kill_after_rows: int | None, pause: float) -> int:
    """Starts the program; kills it `pause` seconds after it has written that many more rows. Returns its exit code."""
    rows = Path(argv[argv.index("--run-dir") + 1]) / "metrics.jsonl"

    def written() -> int:
        with contextlib.suppress(FileNotFoundError):
            return rows.read_bytes().count(b"\n")
        return 0

    command = [sys.executable, "-m", "megajax.train", *argv]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        start, size = None, written()
        while kill_after_rows is not None and process.poll() is None:
            if start is None and written() != size:  # under way: a resumed run first cuts the file back
                start = written()
            if start is not None and written() >= start + kill_after_rows:
                time.sleep(pause)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        _, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_alike(
    kills: int, tiny: Any, program_env: dict[str, str], read_saved: Callable[[Path], Any]
) -> None:
    chance = random.Random(kills)
    argv, other = tiny.argv("killed", FLAGS), tiny.argv("whole", FLAGS)
    killed = 0
    for _ in range(kills):
        rows, pause = chance.randint(1, 360 // kills), chance.uniform(0, 0.05)
        killed += _run(argv, program_env, kill_after_rows=rows, pause=pause) == -signal.SIGKILL
    assert killed == kills
    assert _run(argv, program_env, kill_after_rows=None, pause=0) == 0
    assert _run(other, program_env, kill_after_rows=None, pause=0) == 0
    (step, state), (_, expected) = (read_saved(tiny.text.with_name(name)) for name in ("killed", "whole"))
    assert step == 400
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.tobytes() == expected[name].tobytes(), name
