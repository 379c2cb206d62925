"""GPUs that are not there: devices to compile for on a machine that has none of them.

What is compiled for them can be read, counted and sized, but not run. `train_step.lower(...).compile()` works as ever
on a mesh of these; arrays and random keys have to be made outside of it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from megajax.config import ConfigError

GPUS_PER_NODE = 8

# XLA's description of the device (`xla/backends/gpu/target_config`), of which a driver would tell where there is one.
TARGETS = {
    "h100": """
        gpu_device_info {
          cuda_compute_capability { major: 9 }
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 10 }
        runtime_version { major: 12 minor: 9 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


def absent_gpus(count: int, target: str = "h100") -> list[Any]:
    """`count` devices of a kind that `TARGETS` knows, 8 to a node, for `make_mesh` or `build_program`.

    Raises:
      ConfigError: an unknown kind, a number that is no whole number of nodes, or no compiler for it is installed.
    """
    from jax.experimental import topologies

    if target not in TARGETS:
        raise ConfigError(f"target={target!r} is not known; choose from {', '.join(TARGETS)}")
    nodes, rest = divmod(count, GPUS_PER_NODE)
    if nodes and rest:
        raise ConfigError(f"{count} GPUs are no whole number of nodes of {GPUS_PER_NODE}; change the number")
    topology = f"{nodes}x1x{GPUS_PER_NODE}" if nodes else f"1x1x{rest}"
    try:
        described = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=TARGETS[target])
    except NotImplementedError:
        raise ConfigError(
            f"target={target!r} needs XLA's compiler for it: pip install 'megajax[aot]', and JAX_PLATFORMS=cpu where"
            " there is no GPU"
        ) from None
    return list(described.devices)
