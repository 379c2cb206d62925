"""Starts a program as several processes on this machine: `python -m megajax.launch -n 4 -- python -m megajax.train`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any

from megajax import cli
from megajax.config import ConfigError

GRACE_SECONDS = 10.0
"""How long the other processes may take to end by themselves after one has failed, and again after SIGTERM."""
_LINES_SHOWN = 20


def main(argv: list[str]) -> int:
    """Runs the processes; returns 0, or the exit code of the first that failed."""
    own, dashes, command = _split(argv)
    parser = cli.Parser(
        prog="python -m megajax.launch",
        description=f"{__doc__} Process 0 writes to this terminal; what the others write is shown when they fail. A"
        " failure of one ends all. SIGTERM and Ctrl-C are passed on.",
        usage="%(prog)s -n N [--devices-per-process K] -- COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("-n", "--num-processes", type=int, required=True, metavar="N", help="processes")
    parser.add_argument(
        "--devices-per-process", type=int, default=1, metavar="K", help="GPUs, or simulated CPU devices, of each [1]"
    )
    options = parser.parse_args(own)
    for flag, value in (("-n", options.num_processes), ("--devices-per-process", options.devices_per_process)):
        if value < 1:
            raise ConfigError(f"{flag} {value} must be at least 1")
    if not dashes or not command:
        raise ConfigError("no command: write -- and the command behind the flags, such as -- python -m megajax.train")
    return launch(command, options.num_processes, options.devices_per_process)


def _split(argv: Sequence[str]) -> tuple[Sequence[str], bool, Sequence[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], at < len(argv), argv[at + 1 :]


def environment(base: Mapping[str, str], index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """The variables of process `index`, under torchrun's names, and which devices it has."""
    first = index * devices
    return {
        **base,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(index),
        "WORLD_SIZE": str(count),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + devices))),
        # Of two settings the last counts.
        "XLA_FLAGS": f"{base.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
    }


def launch(command: Sequence[str], count: int, devices: int) -> int:
    """Starts `count` processes of the command and waits for them. See `main`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        processes: list[subprocess.Popen[Any]] = []
        # No signal of the terminal reaches them but through us, so that none comes twice.
        received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, lambda got, _: received.append(got)))
        try:
            for index, output in enumerate((None, *logs)):
                env = environment(os.environ, index, count, devices, port)
                kept: dict[str, Any] = {} if output is None else {"stdout": output, "stderr": output}
                processes.append(subprocess.Popen(command, env=env, start_new_session=True, **kept))
            failed = _wait(processes, received)
        except OSError as error:
            raise ConfigError(f"{command[0]}: {os.strerror(error.errno or 0).lower()}; give a program") from None
        finally:
            _end(processes)
        if failed is None:
            return 0
        code = processes[failed].returncode
        _show(failed, logs[failed - 1] if failed else None, code)
        return 128 - code if code < 0 else code


def _wait(processes: Sequence[subprocess.Popen[Any]], received: list[int]) -> int | None:
    """Until all have ended, or for a while after the first has failed: which that was."""
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        while received:
            _send(processes, received.pop(0))
        if failed is None and any(codes):
            # Who dies by a signal comes first: the others only follow.
            failed = min((i for i, code in enumerate(codes) if code), key=lambda i: (codes[i] or 0) > 0)
            deadline = time.monotonic() + GRACE_SECONDS
        if None not in codes:
            break
        time.sleep(0.05)
    return failed


def _send(processes: Sequence[subprocess.Popen[Any]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _show(index: int, log: IO[bytes] | None, code: int) -> None:
    if log is not None:
        log.seek(0)
        for line in log.read().decode(errors="replace").splitlines()[-_LINES_SHOWN:]:
            print(f"[{index}] {line}", file=sys.stderr)
    if log is None and code > 0:
        return  # it has said why
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"process {index} {how}", file=sys.stderr)


if __name__ == "__main__":
    cli.run_main(main)
