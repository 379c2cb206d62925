"""Processes meet, part in peace, and learn in one line who did not come, who died and who failed."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from megajax.config import ConfigError
from megajax.parallel.cluster import Cluster
from megajax.parallel.lifeline import meet

_PROCESS = """
import sys, time
from megajax.config_checks import ConfigError
from megajax.parallel.cluster import Cluster
from megajax.parallel.lifeline import meet
coordinator, count, index, timeout = sys.argv[1], *map(int, sys.argv[2:5])
try:
    lifeline = meet(Cluster(coordinator, count, index), timeout=timeout)
except ConfigError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
print("met", flush=True)
order = sys.stdin.readline().strip()
if not order:
    time.sleep(600)
if order == "close":
    lifeline.close()
else:
    lifeline.fail(order, timeout % 10)
"""

AGAIN = ", start it again to resume from its last checkpoint"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `process_id, num_processes` of a run on one port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    started: list[subprocess.Popen[str]] = []

    def begin(index: int, count: int, *, timeout: int = 60) -> subprocess.Popen[str]:
        words = [coordinator, str(count), str(index), str(timeout)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", _PROCESS, *words], **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def _meet(start: Start, count: int, *, timeout: int = 60) -> list[subprocess.Popen[str]]:
    processes = [start(index, count, timeout=timeout) for index in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n"
    return processes


def test_parting_in_peace(start):
    processes = _meet(start, 3)
    for process in processes:
        assert process.communicate("close\n", timeout=30) == ("", "")
        assert process.returncode == 0


@pytest.mark.parametrize(("victim", "name"), [(0, "process 0 at localhost:"), (2, "process 2 on ")])
def test_a_dead_process_ends_the_others_at_once(start, victim, name):
    processes = _meet(start, 3)
    began = time.monotonic()
    processes.pop(victim).send_signal(signal.SIGKILL)
    for process in processes:
        out, err = process.communicate(timeout=30)
        assert (out, process.returncode) == ("", 1)
        assert err.startswith(f"error: {name}")
        assert err.endswith(" has died; the run has stopped, start it again to resume from its last checkpoint\n")
        assert err.count("\n") == 1
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("failing", "code", "advice"),
    [(0, 1, AGAIN), (1, 1, AGAIN), (0, 2, ""), (1, 2, "")],
)
def test_a_failing_process_says_why(start, failing, code, advice):
    """All end with its code; a mistake is not cured by another start."""
    processes = _meet(start, 3, timeout=60 + code)
    loser = processes.pop(failing)
    assert loser.communicate("no data\n", timeout=30) == ("", "")
    for process in processes:
        _, err = process.communicate(timeout=30)
        assert err == (
            f"error: process {failing} on {socket.gethostname()} has failed (no data); the run has stopped{advice}\n"
        )
        assert process.returncode == code


def test_who_does_not_come(start):
    hub, spoke = start(0, 4, timeout=2), start(2, 4, timeout=60)
    why = "num_processes=4: process 1, 3 did not come to localhost:"
    for process in (hub, spoke):
        out, err = process.communicate(timeout=30)
        assert out.startswith(f"refused: {why}")
        assert "within 2 s; start every process, or raise distributed_timeout_minutes" in out
        assert (err, process.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (((1, 3), (1, 3)), "process_id=1 is given to two processes; give each its own, 0 to 2"),
        (((1, 4),), "num_processes=3 in process 0, but 4 in process 1; give all the same"),
    ],
)
def test_places_that_do_not_fit(start, others, message):
    processes = [start(0, 3), *(start(*other) for other in others)]
    for process in processes:
        assert process.communicate(timeout=30)[0] == f"refused: {message}\n"


def test_strangers_are_ignored(start):
    hub = start(0, 2)
    address = ("localhost", int(hub.args[3].rpartition(":")[2]))
    stranger = None
    while stranger is None:
        try:
            stranger = socket.create_connection(address)
        except OSError:
            time.sleep(0.05)
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1\n\n")
        spoke = start(1, 2)
        for process in (hub, spoke):
            assert process.stdout.readline() == "met\n"


def test_process_0_that_does_not_answer():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
        message = rf"process 0 at {coordinator} did not answer within 1 s \(connection refused\); start it"
        with pytest.raises(ConfigError, match=message):
            meet(Cluster(coordinator, 2, 1), timeout=1)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as other:
        coordinator = f"localhost:{other.getsockname()[1]}"
        message = f"coordinator={coordinator}: address already in use; choose another port"
        with pytest.raises(ConfigError, match=message):
            meet(Cluster(coordinator, 2, 0), timeout=5)
