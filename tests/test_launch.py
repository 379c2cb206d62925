"""The launcher: variables, output, exit codes and signals."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from megajax import launch
from megajax.config import ConfigError


def _launch(code: str, *flags: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megajax.launch", *flags, "--", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_environment():
    env = launch.environment({"A": "1", "XLA_FLAGS": "--x=2"}, 1, 4, 2, 77)
    assert env == {
        "A": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "77",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "JAX_LOCAL_DEVICE_IDS": "2,3",
        "XLA_FLAGS": "--x=2 --xla_force_host_platform_device_count=2",
    }


def test_process_0_is_shown():
    code = "import os; print('I am', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
    process = _launch(code, "-n", "3")
    assert process.communicate(timeout=60) == ("I am 0 of 3\n", "")
    assert process.returncode == 0


def test_a_failure_ends_all(monkeypatch, capfd):
    """The others get a while to notice by themselves, then SIGTERM."""
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('about to fail'); print('failed', file=sys.stderr); sys.exit(7)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    assert launch.main(["-n", "3", "--", sys.executable, "-c", code]) == 7
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == ["[1] about to fail", "[1] failed", "process 1 ended with exit code 7"]


def test_a_killed_process():
    code = "import os, signal; os.environ['RANK'] == '0' and os.kill(os.getpid(), signal.SIGKILL)"
    process = _launch(code, "-n", "2")
    assert process.communicate(timeout=60) == ("", "process 0 was ended by SIGKILL\n")
    assert process.returncode == 128 + signal.SIGKILL


def test_signals_are_passed_on():
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    process = _launch(code, "-n", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--", "x"], "the following arguments are required: -n"),
        (["-n", "2"], "no command: write -- and the command behind the flags"),
        (["-n", "0", "--", "x"], "-n 0 must be at least 1"),
        (["-n", "two", "--", "x"], "invalid int value: 'two'"),
        (["-n", "2", "--devices-per-process", "0", "--", "x"], "--devices-per-process 0 must be at least 1"),
        (["-n", "2", "--nodes", "3", "--", "x"], "unrecognized arguments: --nodes 3"),
        (["-n", "2", "--", "no-such-program"], "no-such-program: no such file or directory; give a program"),
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(ConfigError, match=message):
        launch.main(argv)
