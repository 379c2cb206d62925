"""Which process of how many this is: from the flags, or from what SLURM, MPI, Kubernetes or torchrun have set."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from megajax.config_checks import ConfigError
from megajax.config_distributed import DistributedConfig

Environ = Mapping[str, str]

TORCH_PORT = 29500
"""torchrun's default of MASTER_PORT."""


class Cluster(NamedTuple):
    """A process's place among the others.

    coordinator: HOST:PORT of process 0. local_device_ids: the devices of this host that are the process's own; None
    are all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class _Found(NamedTuple):
    """What one scheduler says. `local`: (index, number) of the processes on this host."""

    names: str
    process_id: int
    num_processes: int | None
    coordinator: str | None = None
    local: tuple[int, int] = (0, 1)


def find_cluster(config: DistributedConfig, environ: Environ) -> Cluster | None:
    """This process's place, or None where it is the only one.

    Flags come first, then the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK), Open MPI,
    MPICH or Intel MPI, SLURM's srun, and the index of an indexed Kubernetes job, which needs `num_processes` besides.

    Raises:
      ConfigError: values are missing or contradict each other.
    """
    found = _torch(environ) or _mpi(environ) or _slurm(environ) or _kubernetes(config, environ)
    count, index, coordinator = config.num_processes, config.process_id, config.coordinator
    local = (0, 1)
    if found is not None and index is None:
        if count is not None and found.num_processes not in (None, count):
            raise ConfigError(f"num_processes={count} contradicts {found.num_processes} of {found.names}; drop one")
        count = count if count is not None else found.num_processes
        index, local = found.process_id, found.local
        coordinator = coordinator or found.coordinator
    if count == 1 or (count is None and coordinator is None and config.process_id is None):
        return None
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or _master(environ)
    if count is None:
        given = f"process_id={index}" if index is not None else f"coordinator={coordinator}"
        raise ConfigError(f"{given} needs num_processes: how many processes there are")
    if index is None:
        raise ConfigError(f"num_processes={count} needs process_id: which of them this is, 0 to {count - 1}")
    if coordinator is None:
        raise ConfigError(f"num_processes={count} needs coordinator: HOST:PORT of process 0, the same for all")
    if index >= count:
        names = f" ({found.names})" if found is not None and config.process_id is None else ""
        raise ConfigError(f"process_id={index} must be below num_processes={count}{names}")
    return Cluster(coordinator, count, index, _devices(local, environ))


def _int(environ: Environ, name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name}={environ[name]!r} in the environment is not a whole number; unset it") from None


def _master(environ: Environ) -> str | None:
    if "MASTER_ADDR" not in environ:
        return None
    port = _int(environ, "MASTER_PORT") if "MASTER_PORT" in environ else TORCH_PORT
    # torchrun itself listens on MASTER_PORT.
    port += environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{environ['MASTER_ADDR']}:{port}"


def _torch(environ: Environ) -> _Found | None:
    have = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if len(have) == 1 and "MASTER_ADDR" in environ:
        missing = "WORLD_SIZE" if have == ["RANK"] else "RANK"
        raise ConfigError(
            f"{have[0]}={environ[have[0]]} and MASTER_ADDR are set but not {missing}; set it too, or unset them"
        )
    if len(have) < 2:
        return None
    local = (0, 1)
    if "LOCAL_RANK" in environ and "LOCAL_WORLD_SIZE" in environ:
        local = _int(environ, "LOCAL_RANK"), _int(environ, "LOCAL_WORLD_SIZE")
    return _Found("RANK and WORLD_SIZE", _int(environ, "RANK"), _int(environ, "WORLD_SIZE"), _master(environ), local)


_MPI = (
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "PMI_FD")


def _mpi(environ: Environ) -> _Found | None:
    for rank, size, local_rank, local_size in (_MPI[:4], _MPI[4:]):
        if rank not in environ or size not in environ:
            continue
        count, local = _int(environ, size), (0, 1)
        if local_rank in environ and local_size in environ:
            local = _int(environ, local_rank), _int(environ, local_size)
        coordinator = _master(environ)
        job = next((environ[name] for name in _MPI_JOBS if name in environ), "")
        # Open MPI 4 says where its launcher runs, which is where process 0 is.
        uri = re.search(r"tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        host = "localhost" if local[1] == count else uri and (uri[1] or f"[{uri[2]}]")
        if coordinator is None and host:
            coordinator = f"{host}:{_port(zlib.crc32(job.encode()))}"
        return _Found(f"{rank} and {size}", _int(environ, rank), count, coordinator, local)
    return None


def _slurm(environ: Environ) -> _Found | None:
    # Only srun sets the list of nodes of the step; a shell inside an allocation is one process.
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS"} <= environ.keys():
        return None
    count = _int(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    coordinator = f"{_first_node(environ['SLURM_STEP_NODELIST'])}:{_port(_int(environ, 'SLURM_JOB_ID'))}"
    local = (0, 1)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if "SLURM_LOCALID" in environ and "SLURM_NODEID" in environ and tasks:
        local = _int(environ, "SLURM_LOCALID"), _tasks_of_node(tasks, _int(environ, "SLURM_NODEID"))
    return _Found("SLURM_PROCID and SLURM_NTASKS", _int(environ, "SLURM_PROCID"), count, coordinator, local)


def _first_node(nodes: str) -> str:
    """`a[003-005,9],b` -> `a003`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes; give coordinator")
    return "".join(part or "" for part in match.groups())


def _tasks_of_node(tasks: str, node: int) -> int:
    """`4(x2),3` are 4, 4 and 3 tasks on three nodes."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    return 1


def _kubernetes(config: DistributedConfig, environ: Environ) -> _Found | None:
    # Pods of an indexed job may as well be runs of their own, so their number has to be given.
    if "JOB_COMPLETION_INDEX" not in environ or config.num_processes is None:
        return None
    # A pod of a job with a headless service as its subdomain is JOB-INDEX.SUBDOMAIN...
    name = re.match(r"(.+)-\d+(\..+)?$", socket.getfqdn())
    coordinator = f"{name[1]}-0{name[2] or ''}:{_port(zlib.crc32(name[1].encode()))}" if name else None
    return _Found("JOB_COMPLETION_INDEX", _int(environ, "JOB_COMPLETION_INDEX"), None, coordinator)


def _port(job: int) -> int:
    """A port for a job, in the upper end of the ephemeral range, as `jax.distributed` chooses it."""
    return job % 2**12 + 65536 - 2**12


def _devices(local: tuple[int, int], environ: Environ) -> list[int] | None:
    """One device each for several processes on a host, unless something has divided the devices already."""
    index, number = local
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    divided = visible is not None and len(visible.split(",")) < number
    return None if number < 2 or divided or "JAX_LOCAL_DEVICE_IDS" in environ else [index]
