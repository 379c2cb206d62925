"""The device mesh: one set of named axes for every kind of parallelism."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from megajax.config import ConfigError, ParallelConfig

AXES = ("pp", "dp", "ep", "cp", "tp")
"""Outermost first: tensor parallelism, which talks the most, gets the nearest neighbours."""


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the axes `AXES`; devices left over become `dp`.

    Raises:
      ConfigError: the number of devices is not a multiple of the model-parallel size.
    """
    devices = jax.devices() if devices is None else list(devices)
    tp = parallel.tensor_model_parallel_size
    if len(devices) % tp:
        raise ConfigError(
            f"tensor_model_parallel_size={tp} does not divide the {len(devices)} devices; choose a divisor of them"
        )
    shape = (1, len(devices) // tp, 1, 1, tp)
    # Auto, not make_mesh's newer default Explicit: sharding is said by constraints and propagated by XLA.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_parallel_size(mesh: Mesh) -> int:
    """Shards that a batch is divided into."""
    return mesh.shape["dp"] * mesh.shape["ep"]
