"""Two processes share a store: each writes and reads its own shards, and both restore the same step."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np

_PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from megajax.checkpoint import CheckpointError, CheckpointStore
from megajax.config import CheckpointConfig

directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

def array(value, *spec):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda at: value[at])

def state(step, padded, *spec):
    table = np.zeros((padded, 4), np.float32)
    table[:5] = np.arange(20).reshape(5, 4) + step
    return {"params": {"table": array(table, *spec)}, "rng": array(np.arange(2, dtype=np.uint32))}

axes = {"params": {"table": ("vocab", "embed")}, "rng": None}
options = {"family": "gpt", "model_config": {"vocab_size": 5}, "logical_axes": axes}
store = CheckpointStore.open(directory, CheckpointConfig(save_retain=2), **options)
for step in (1, 2, 3):
    store.save(step, state(step, 8, ("dp", "tp")), {"step": step})
store.wait()
if index == 0:
    os.truncate(directory + "/step_00000003/tree.json", 10)
wanted = state(2, 6, "tp", "dp")
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
restored, extras = store.restore(abstract)
assert extras == {"step": 2}
for name, expected in wanted["params"].items():
    for one, other in zip(restored["params"][name].addressable_shards, expected.addressable_shards, strict=True):
        assert one.index == other.index
        np.testing.assert_array_equal(one.data, other.data)
store.save(3, state(3, 8, ("dp", "tp")), {"step": 3})
assert store.latest_step() == 3
try:
    store.restore(abstract, step=9)
except CheckpointError as error:
    print("refused", error)
store.close()
print("done")
"""


def test_two_processes_save_and_restore_together(tmp_path, read_raw):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    directory = tmp_path / "ck"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(directory), port, str(index)], env=environment, **pipes)
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("done" in output and "refused" in output for output in outputs), outputs
    assert "has no step 9; it has 2, 3" in outputs[0]
    assert sorted(os.listdir(directory)) == [".lock", "step_00000002", "step_00000003"]
    table = read_raw(directory / "step_00000003", "params/table")
    np.testing.assert_array_equal(table, np.arange(20).reshape(5, 4) + 3)
    assert json.loads((directory / "step_00000003" / "extras.json").read_text()) == {"step": 3}
