"""GPUs that are not there: devices to compile for on a machine that has none, and what their makers say of them.

What is compiled for them can be read, counted and sized, but not run. `train_step.lower(...).compile()` works as ever
on a mesh of these; arrays and random keys have to be made outside of it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from megajax.config import ConfigError

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU, eight of them to a node. Rates are peaks of data sheets, of one GPU and one direction.

    Attributes:
      kind: what `jax.devices()[0].device_kind` says of it.
      capability: CUDA's compute capability.
      memory: bytes.
      bandwidth: bytes/s of that memory.
      bf16, fp8: FLOP/s of dense matrix products; fp8 is None where there is none.
      nvlink, network: bytes/s to GPUs of the node, and of others, over a network card of its own.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_memory: int
    shared_memory_optin: int
    l2: int
    clock_ghz: float
    memory: int
    bandwidth: float
    bf16: float
    fp8: float | None
    nvlink: float
    network: float
    fpus: int = 128

    def description(self) -> str:
        """As XLA wants it (`xla/backends/gpu/target_config`), of which a driver would tell where there is one."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory_optin}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              core_count: {self.cores} fpus_per_core: {self.fpus}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2}
              clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.kind}"
        """


_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "cores": 132,
    "shared_memory": 233472,
    "shared_memory_optin": 232448,
    "l2": 52428800,
    "clock_ghz": 1.98,
    "bf16": 989e12,
    "fp8": 1979e12,
    "nvlink": 450e9,
    "network": 50e9,
}

TARGETS: Mapping[str, Target] = {
    "h100": Target(kind="NVIDIA H100 80GB HBM3", memory=84978434048, bandwidth=3.35232e12, **_HOPPER),
    "h200": Target(kind="NVIDIA H200", memory=150120038400, bandwidth=4.8e12, **_HOPPER),
    "a100": Target(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        shared_memory=167936,
        shared_memory_optin=166912,
        l2=41943040,
        clock_ghz=1.41,
        fpus=64,
        memory=84974239744,
        bandwidth=2.039e12,
        bf16=312e12,
        fp8=None,
        nvlink=300e9,
        network=25e9,
    ),
    "b200": Target(
        kind="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        shared_memory=233472,
        shared_memory_optin=232448,
        l2=132644864,
        clock_ghz=1.965,
        memory=191501303808,
        bandwidth=8e12,
        bf16=2250e12,
        fp8=4500e12,
        nvlink=900e9,
        network=50e9,
    ),
}
"""Value of `--target` -> the GPU, in its SXM form, with a 400 Gb/s network card a GPU (A100: 200 Gb/s)."""


def target_of(name: str) -> Target:
    """The GPU of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in TARGETS:
        raise ConfigError(f"target={name!r} is not known; choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def absent_gpus(count: int, target: str = "h100") -> list[Any]:
    """`count` devices of a kind that `TARGETS` knows, 8 to a node, for `make_mesh` or `build_program`.

    Raises:
      ConfigError: an unknown kind, a number that is no whole number of nodes, or no compiler for it is installed.
    """
    from jax.experimental import topologies

    description = target_of(target).description()
    nodes, rest = divmod(count, GPUS_PER_NODE)
    if count < 1 or (nodes and rest):
        raise ConfigError(f"{count} GPUs are no whole number of nodes of {GPUS_PER_NODE}; change the number")
    topology = f"{nodes}x1x{GPUS_PER_NODE}" if nodes else f"1x1x{rest}"
    try:
        described = topologies.get_topology_desc(platform="cuda", topology=topology, target_config=description)
    except NotImplementedError:
        raise ConfigError(
            f"target={target!r} needs XLA's compiler for it: pip install 'megajax[aot]', and JAX_PLATFORMS=cpu where"
            " there is no GPU"
        ) from None
    return list(described.devices)


@contextlib.contextmanager
def compiler_silenced() -> Iterator[TextIO]:
    """Keeps back what XLA writes to stderr, such as that there is no driver; shows it if what is done here fails. Gives
    the stderr of before.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        usual = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            with os.fdopen(os.dup(usual), "w") as stderr:
                yield stderr
        except ConfigError:
            raise
        except BaseException:
            said.seek(0)
            os.write(usual, said.read())
            raise
        finally:
            os.dup2(usual, 2)
            os.close(usual)
