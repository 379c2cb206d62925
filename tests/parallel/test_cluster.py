"""A process finds its place from flags or from its environment, and half a place is a clear mistake."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket

import pytest

from megajax.config import ConfigError, DistributedConfig
from megajax.parallel.cluster import Cluster, find_cluster

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "10",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4),1",
}
TORCH = {"MASTER_ADDR": "node0", "MASTER_PORT": "4000", "RANK": "3", "WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
FLAGS = {"coordinator": "a:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, {}, None),
        ({}, FLAGS, Cluster("a:1", 2, 1)),
        ({}, {**FLAGS, "coordinator": "[::1]:8"}, Cluster("[::1]:8", 2, 1)),
        ({}, {"num_processes": 1}, None),
        ({"MASTER_ADDR": "node0"}, {}, None),
        (TORCH, {}, Cluster("node0:4000", 4, 3)),
        (TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, {}, Cluster("node0:4000", 4, 3, [1])),
        (TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, {}, Cluster("node0:4001", 4, 3)),
        (TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, {}, None),
        (TORCH, FLAGS, Cluster("a:1", 2, 1)),
        (SLURM, {}, Cluster(f"gpu007:{61440 + 1}", 10, 5, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "n[3,5].lan"}, {"coordinator": "x:9"}, Cluster("x:9", 10, 5, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "solo"}, {}, Cluster("solo:61441", 10, 5, [1])),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x10)"}, {}, Cluster("gpu007:61441", 10, 5)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, {}, Cluster("gpu007:61441", 10, 5)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}, Cluster("gpu007:61441", 10, 5, [1])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, {}, Cluster("gpu007:61441", 10, 5)),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, {}, None),  # a shell inside an allocation
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (OPEN_MPI | {"MASTER_ADDR": "node0"}, {}, Cluster("node0:29500", 4, 1, [1])),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "JAX_COORDINATOR_ADDRESS": "b:2"}, {}, Cluster("b:2", 2, 0)),
        ({"JOB_COMPLETION_INDEX": "2"}, {}, None),
        (
            {"JOB_COMPLETION_INDEX": "2"},
            {"num_processes": 3, "coordinator": "job-0.svc:7"},
            Cluster("job-0.svc:7", 3, 2),
        ),
    ],
)
def test_place(environ, flags, expected):
    assert find_cluster(DistributedConfig(**flags), environ) == expected


def test_open_mpi_says_where_process_0_is(monkeypatch):
    remote = find_cluster(DistributedConfig(), OPEN_MPI | URI)
    assert remote is not None
    assert remote.address[0] == "10.96.0.1"
    assert 61440 <= remote.address[1] < 65536
    local = find_cluster(DistributedConfig(), OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert local is not None
    assert local.address[0] == "localhost"
    monkeypatch.setattr(socket, "getfqdn", lambda: "train-2.pods.default.svc.cluster.local")
    pod = find_cluster(DistributedConfig(num_processes=4), {"JOB_COMPLETION_INDEX": "2"})
    assert pod is not None
    assert pod.address[0] == "train-0.pods.default.svc.cluster.local"


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, {"num_processes": 2}, "num_processes=2 needs process_id: which of them this is, 0 to 1"),
        ({}, {"num_processes": 2, "process_id": 0}, "num_processes=2 needs coordinator: HOST:PORT of process 0"),
        ({}, {"process_id": 0}, "process_id=0 needs num_processes"),
        ({}, {"coordinator": "a:1"}, "coordinator=a:1 needs num_processes"),
        ({"MASTER_ADDR": "a", "RANK": "1"}, {}, "RANK=1 and MASTER_ADDR are set but not WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {}, "num_processes=2 needs coordinator"),
        (TORCH | {"RANK": "4"}, {}, r"process_id=4 must be below num_processes=4 \(RANK and WORLD_SIZE\)"),
        (TORCH | {"RANK": "x"}, {}, "RANK='x' in the environment is not a whole number"),
        (TORCH, {"num_processes": 8}, "num_processes=8 contradicts 4 of RANK and WORLD_SIZE"),
        (OPEN_MPI, {}, "num_processes=4 needs coordinator"),
    ],
)
def test_half_a_place(environ, flags, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(DistributedConfig(**flags), environ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "node0"}, "coordinator=node0 must be HOST:PORT"),
        ({"coordinator": "node0:99999"}, "coordinator=node0:99999 must be HOST:PORT"),
        ({"num_processes": 0}, "num_processes=0 must be greater than 0"),
        ({"process_id": -1}, "process_id=-1 must not be negative"),
        ({"process_id": 2, "num_processes": 2}, "process_id=2 must be below num_processes=2"),
        ({"distributed_timeout_minutes": 0}, "distributed_timeout_minutes=0 must be greater than 0"),
        ({"heartbeat_timeout_seconds": 1}, "heartbeat_timeout_seconds=1 must be at least 5"),
    ],
)
def test_values(flags, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**flags)
