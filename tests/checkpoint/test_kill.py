"""kill -9 at random moments of a save: what is restored is always the newest complete step, bit for bit."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megajax.checkpoint import CheckpointStore
from megajax.config import CheckpointConfig

KILLS = 10

# Forks one child a kill from a process that has paid for the imports; jax starts its threads only in the child.
_SAVER = """
import os, sys, warnings
import numpy as np
import jax, orbax.checkpoint
from megajax.checkpoint import CheckpointStore
from megajax.config import CheckpointConfig

warnings.simplefilter("ignore")
directory, log = sys.argv[1:]

def save_for_ever(first):
    acknowledged = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    config = CheckpointConfig(save_retain=2, async_save=first % 2 == 0)
    store = CheckpointStore.open(directory, config, family="gpt", model_config={})
    for step in range(first, first + 10_000):
        rng = np.random.default_rng(step)
        state = {"params": {f"w{i}": jax.numpy.asarray(rng.standard_normal((16, 33), np.float32)) for i in range(4)}}
        store.save(step, state, {"step": step})
        store.wait()
        os.write(acknowledged, b"%d\\n" % step)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save_for_ever(int(line))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def _expected(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"params": {f"w{i}": rng.standard_normal((16, 33), np.float32) for i in range(4)}}


def _last_acknowledged(log: Path) -> int:
    lines = log.read_text().split() if log.exists() else []
    return int(lines[-1]) if lines else 0


def test_a_killed_save_is_never_mistaken_for_a_checkpoint(tmp_path):
    directory, log = tmp_path / "ck", tmp_path / "acknowledged"
    dice = random.Random(7)
    command = [sys.executable, "-c", _SAVER, str(directory), str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    unfinished, step = 0, 0
    saver = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        assert saver.stdin is not None
        assert saver.stdout is not None
        for _ in range(KILLS):
            before = step
            saver.stdin.write(f"{before + 1}\n")
            child = int(saver.stdout.readline())
            deadline = time.monotonic() + 60
            while _last_acknowledged(log) <= before:
                assert time.monotonic() < deadline, "the child never finished a save"
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
            os.kill(child, 9)
            assert saver.stdout.readline() == "dead\n"

            unfinished += any("." in path.name for path in directory.glob("step_*"))
            complete = max(int(path.name[5:]) for path in directory.glob("step_*") if "." not in path.name)
            with CheckpointStore.open(directory, CheckpointConfig(), family="gpt", model_config={}) as store:
                assert not any("." in path.name for path in directory.glob("step_*"))
                state, extras = store.restore(_expected(0))
            step = extras["step"]
            assert step == complete >= _last_acknowledged(log) > before
            for name, expected in _expected(step)["params"].items():
                assert state["params"][name].tobytes() == expected.tobytes()
    finally:
        os.killpg(saver.pid, 9)
        saver.communicate()
    assert unfinished >= KILLS // 2  # most kills did hit a save under way
