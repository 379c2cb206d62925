"""Finding the devices of this machine, quietly where there is nothing to say."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax

from megajax.parallel.aot import compiler_silenced

_DRIVER = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""What is there where a driver for NVIDIA's GPUs is, the last under Windows' Linux."""


def find_devices() -> None:
    """Lets JAX start its backends, as the first use of it would.

    JAX's CUDA wheels, which the extra `aot` brings to machines without a GPU, log a traceback when they find no driver.
    That is kept back where there is none and nobody has asked for GPUs; with a driver every word shows. One line each
    they say as JAX is imported, before anybody can help it.
    """
    expected = any(Path(path).exists() for path in _DRIVER) or "cuda" in os.environ.get("JAX_PLATFORMS", "")
    with contextlib.nullcontext() if expected else compiler_silenced():
        jax.devices()
