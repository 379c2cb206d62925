"""The device mesh: one set of named axes for every kind of parallelism."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from megajax.config import ConfigError, ParallelConfig

AXES = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")
"""Outermost first: tensor parallelism, which talks the most, gets the nearest neighbours. All are always there, most
with size 1. Context parallelism is (cp, ulysses): keys and values travel over cp, heads are traded over ulysses."""

DATA_AXES = ("replica", "dp", "ep")
"""What the batch is divided over."""

ZERO_AXES = ("dp", "ep")
"""What ZeRO shards over; `replica` holds copies (hybrid sharding)."""


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the axes `AXES`; devices left over become `dp`.

    Raises:
      ConfigError: the number of devices is not a multiple of the sizes asked for.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _sizes(parallel, len(devices))
    # Auto, not make_mesh's newer default Explicit: sharding is said by constraints and propagated by XLA.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_abstract_mesh(parallel: ParallelConfig, devices: int) -> AbstractMesh:
    """The same for so many devices as there need not be: it says how arrays would be divided, and nothing runs on it.

    Raises:
      ConfigError: the number of devices is not a multiple of the sizes asked for.
    """
    return AbstractMesh(_sizes(parallel, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def gpu_capability(device: Any) -> tuple[int, int] | None:
    """CUDA's compute capability of a device, present or not: (9, 0) for Hopper; None if it is no NVIDIA GPU."""
    if device.platform not in ("gpu", "cuda"):
        return None
    try:
        major, minor = str(device.compute_capability).split(".")
    except (AttributeError, ValueError):  # a GPU of another maker
        return None
    return int(major), int(minor)


def fewest_devices(parallel: ParallelConfig) -> int:
    """Devices of the smallest mesh that has the sizes asked for."""
    return math.prod(_asked(parallel).values())


def _asked(parallel: ParallelConfig) -> dict[str, int]:
    return {
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "num_distributed_optimizer_instances": parallel.num_distributed_optimizer_instances,
    }


def _sizes(parallel: ParallelConfig, devices: int) -> tuple[int, ...]:
    """The sizes of `AXES`."""
    left = devices
    for name, size in _asked(parallel).items():
        if left % size:
            raise ConfigError(f"{name}={size} does not divide the {_counted(devices, left)}; choose a divisor")
        left //= size
    return (
        parallel.pipeline_model_parallel_size,
        parallel.num_distributed_optimizer_instances,
        left,
        parallel.expert_model_parallel_size,
        parallel.ring_size,
        parallel.ulysses_size,
        parallel.tensor_model_parallel_size,
    )


def _counted(devices: int, left: int) -> str:
    return f"{devices} devices" if left == devices else f"{left} groups that the other sizes make of {devices} devices"


def describe(mesh: Mesh | AbstractMesh) -> str:
    """The axes that divide something, such as `pp=2 tp=4`."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Shards that a batch is divided into."""
    size = 1
    for axis in DATA_AXES:
        size *= mesh.shape[axis]
    return size
