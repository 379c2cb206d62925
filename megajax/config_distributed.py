"""Several processes in one run: where they meet, and how long they wait for each other."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Self

from megajax.config_checks import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Which process of how many this is. Nothing given: what SLURM, MPI, Kubernetes or torchrun's variables say, and
    one process where there are none (`megajax.parallel.cluster`)."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for every process; the port must be free there and open to the others."""
    num_processes: int | None = None
    """Processes of the run."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    distributed_timeout_minutes: float = 10.0
    """How long the processes wait for each other at the start and at the end of a run."""
    heartbeat_timeout_seconds: int = 40
    """A process that has frozen ends the run after about this time; one that has died ends it at once."""

    def __post_init__(self) -> None:
        require_positive(self, "num_processes", "distributed_timeout_minutes")
        require(
            self.heartbeat_timeout_seconds >= 5,
            f"heartbeat_timeout_seconds={self.heartbeat_timeout_seconds} must be at least 5",
        )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            require(
                bool(host) and port.isdigit() and 0 < int(port) < 65536,
                f"coordinator={self.coordinator} must be HOST:PORT, such as node0:8476",
            )
        require(self.process_id is None or self.process_id >= 0, f"process_id={self.process_id} must not be negative")
        if self.process_id is not None and self.num_processes is not None:
            require(
                self.process_id < self.num_processes,
                f"process_id={self.process_id} must be below num_processes={self.num_processes}",
            )

    def anywhere(self) -> Self:
        """The same without this process's place, for a run's `config.json`: a run may go on with other processes."""
        return dataclasses.replace(self, coordinator=None, num_processes=None, process_id=None)
