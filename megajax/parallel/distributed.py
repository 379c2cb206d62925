"""Starts and ends `jax.distributed` for a run of several processes; a run of one process touches nothing here."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from megajax import cli
from megajax.config_checks import ConfigError
from megajax.config_distributed import DistributedConfig
from megajax.parallel.cluster import find_cluster
from megajax.parallel.devices import find_devices
from megajax.parallel.lifeline import Lifeline, meet

_VERDICT_SECONDS = 5.0
"""A peer that dies shows first as some error of a collective; so long it may take to learn which peer it was."""


@contextlib.contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """While entered, `jax.devices()` are those of all processes of the run. Enter it before JAX is used.

    When a process fails or dies, the others end as well, each with one line on stderr and a code other than 0: that of
    the one which failed (2 after a mistake, 130 after Ctrl-C), 1 where one has died, or SIGABRT's where JAX itself was
    first. None of them returns from here then.

    Raises:
      ConfigError: the place of this process is half given, or the processes do not find each other. JAX has not been
        started then.
    """
    cluster = find_cluster(config, os.environ)
    if cluster is None:
        find_devices()
        yield
        return
    timeout = round(config.distributed_timeout_minutes * 60)
    lifeline = meet(cluster, timeout=timeout)
    # This service would answer SIGTERM in C++; the trainer does it, and agrees with the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    with _aborts_explained(lifeline, cluster.process_id, config.heartbeat_timeout_seconds):
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.num_processes,
                cluster.process_id,
                local_device_ids=cluster.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
                shutdown_timeout_seconds=timeout,
            )
            yield
            jax.distributed.shutdown()  # waits for the others
        except BaseException as error:
            _fail(lifeline, error)
        lifeline.close()


def _fail(lifeline: Lifeline, error: BaseException) -> NoReturn:
    """Ends this process without waiting for the others, as JAX would."""

    def again() -> NoReturn:
        raise error

    if isinstance(error, ConfigError | KeyboardInterrupt | BrokenPipeError):
        code = cli.exit_code(again)
    else:
        lifeline.wait_for_verdict(_VERDICT_SECONDS)
        traceback.print_exception(error)
        code = 1
    lifeline.fail(" ".join(f"{type(error).__name__}: {error}".split())[:300], code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _aborts_explained(lifeline: Lifeline, process_id: int, seconds: int) -> Iterator[None]:
    """Adds one line to what JAX prints when it aborts the process, as it does when a process has frozen, or when the
    coordinator has died and the abort comes before the lifeline's word.

    A handler of Python's would never run: the abort comes in a thread of C++ and does not return.
    """
    line = (
        f"error: JAX has ended process {process_id}, for the reason above; if that is another process which has died or"
        f" has been silent for {seconds} s, start the run again to resume from its last checkpoint\n"
    ).encode()
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(number: int) -> None:
        lifeline.wait_for_verdict(1.0)
        os.write(2, line)
        libc.signal(number, None)  # the default; abort() then goes on

    before = libc.signal(signal.SIGABRT, ctypes.cast(explain, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
