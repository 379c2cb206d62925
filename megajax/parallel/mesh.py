"""The device mesh: one set of named axes for every kind of parallelism."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from megajax.config import ConfigError, ParallelConfig
from megajax.parallel.expert_mesh import Refinement, refine

AXES = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")
"""Outermost first: tensor parallelism, which talks the most, gets the nearest neighbours. All are always there, most
with size 1. Context parallelism is (cp, ulysses): keys and values travel over cp, heads are traded over ulysses. Where
experts are laid out otherwise than attention, an axis may come in parts, tp1 and tp0 for tp; see `expert_mesh`."""

DATA_AXES = ("replica", "dp", "ep")
"""What the batch is divided over."""

SEQUENCE_AXES = CP, ULYSSES = ("cp", "ulysses")
"""What the tokens of a sample are divided over, inside of attention as well."""

ZERO_AXES = ("dp", "ep", *SEQUENCE_AXES)
"""What ZeRO shards over, those that see other tokens, as in Megatron; `replica` holds copies (hybrid sharding)."""


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the axes `AXES`; devices left over become `dp`.

    Raises:
      ConfigError: the number of devices is not a multiple of the sizes asked for.
    """
    devices = jax.devices() if devices is None else list(devices)
    refined = refinement(parallel, len(devices))
    # Auto, not make_mesh's newer default Explicit: sharding is said by constraints and propagated by XLA.
    types = (AxisType.Auto,) * len(refined.names)
    return jax.make_mesh(refined.shape, refined.names, axis_types=types, devices=devices)


def make_abstract_mesh(parallel: ParallelConfig, devices: int) -> AbstractMesh:
    """The same for so many devices as there need not be: it says how arrays would be divided, and nothing runs on it.

    Raises:
      ConfigError: the number of devices is not a multiple of the sizes asked for.
    """
    refined = refinement(parallel, devices)
    return AbstractMesh(refined.shape, refined.names, axis_types=(AxisType.Auto,) * len(refined.names))


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
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    copies = parallel.num_distributed_optimizer_instances
    expert = parallel.expert_model_parallel_size * parallel.resolved_expert_tensor_parallel_size
    if parallel.expert_tensor_parallel_size is None:
        return parallel.pipeline_model_parallel_size * dense * parallel.expert_model_parallel_size * copies
    return parallel.pipeline_model_parallel_size * math.lcm(dense * copies, expert * copies)


def refinement(parallel: ParallelConfig, devices: int) -> Refinement:
    """The mesh of so many devices, and what dense and expert axes are in it. Devices left over are data parallel.

    Raises:
      ConfigError: sizes that do not divide one another.
    """
    left = devices
    for name in ("pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size"):
        size = getattr(parallel, name)
        if left % size:
            raise ConfigError(f"{name}={size} does not divide the {_counted(devices, left)}; choose a divisor")
        left //= size
    refined = refine(
        dp=left,
        tp=parallel.tensor_model_parallel_size,
        ulysses=parallel.ulysses_size,
        cp=parallel.ring_size,
        pp=parallel.pipeline_model_parallel_size,
        replica=parallel.num_distributed_optimizer_instances,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
    )
    # A ring, and a trade of heads, is over one axis.
    if len(refined.dense["cp"]) > 1 or len(refined.dense["ulysses"]) > 1:
        raise ConfigError(
            f"expert_model_parallel_size={parallel.expert_model_parallel_size} with expert_tensor_parallel_size="
            f"{parallel.resolved_expert_tensor_parallel_size} makes groups that cut context_parallel_size="
            f"{parallel.context_parallel_size} in parts; choose sizes that span all of it, or none"
        )
    return refined


def _counted(devices: int, left: int) -> str:
    return f"{devices} devices" if left == devices else f"{left} groups that the other sizes make of {devices} devices"


def describe(mesh: Mesh | AbstractMesh) -> str:
    """The axes that divide something, such as `pp=2 tp=4`."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Shards that a batch is divided into."""
    return math.prod(size for axis, size in mesh.shape.items() if stem(axis) in DATA_AXES)


def stem(axis: str) -> str:
    """The axis of `AXES` that an axis of a mesh is, or is a part of."""
    return axis.rstrip("0123456789")
