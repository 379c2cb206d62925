"""What XLA and its libraries are told for each kind of device, with the reason of each: one table.

Compile options go with each program, so they also hold for programs for GPUs that are not there, and leave other
programs of the process alone. Environment variables are read when a library starts: `apply_environment` comes before
JAX is used. What the user sets in XLA_FLAGS or the environment stays as it is.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple


class Setting(NamedTuple):
    """One option: a compile option of XLA by its name without `--`, or an environment variable."""

    name: str
    value: bool | int | str
    why: str

    @property
    def text(self) -> str:
        """The value as XLA_FLAGS and the environment spell it."""
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


# Compiled for 8 H100s and put on a roofline: with XLA's own thresholds, four layers of Llama 3 8B wait 9.9 ms a step
# for collectives under ZeRO-3, with these 7.9, with 1 GiB 30.4; under tensor and sequence parallelism 3.8 and 3.4.
# Pipelined collectives (xla_gpu_enable_pipelined_*) took 1.7 GB more and, under tensor parallelism, a third more time,
# for copies.
GPU_OPTIONS: tuple[Setting, ...] = (
    Setting(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "collectives start early and end late, with products between; XLA's default only in newer versions",
    ),
    Setting(
        "xla_gpu_memory_limit_slop_factor",
        109,
        "overlap may fill the 92% of the memory that JAX gets, and not only 95% of 80%: where there is no room, the"
        " collectives of layers run alone",
    ),
    *(
        Setting(
            f"xla_gpu_{kind}_combine_threshold_bytes",
            8 << 20,
            "larger collectives start when their own array is there, not when the last one is",
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    Setting(
        "xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel",
        False,
        "the one-shot kernel reaches 2% of NVLink's rate and 8 GPUs (openxla/xla 33386); NCCL sends and receives",
    ),
)

FP8_OPTIONS: tuple[Setting, ...] = (
    Setting(
        "xla_gpu_enable_triton_gemm",
        False,
        "Triton would take the products before they are known as cuBLASLt's fp8 products",
    ),
    Setting(
        "xla_gpu_dot_merger_threshold_mb",
        0,
        "products that share an operand would become one, of tensors with several scales, which has to be bf16",
    ),
)
"""Beside `GPU_OPTIONS`, for programs with fp8."""

GENERATION_OPTIONS: tuple[Setting, ...] = (
    Setting(
        "xla_gpu_dot_merger_threshold_mb",
        0,
        "products that share an operand would become one, for which kernels that no tile divides are copied together;"
        " a step of decoding does little but read kernels",
    ),
)
"""Beside `GPU_OPTIONS`, for programs of generation."""

GPU_ENVIRONMENT: tuple[Setting, ...] = (
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.92",
        "JAX takes 75% of the memory by default; the rest is for NCCL, cuDNN and CUDA themselves",
    ),
)


def gpu_options(*, fp8: bool, generation: bool = False) -> tuple[Setting, ...]:
    """The compile options of a program for NVIDIA GPUs, of training or of generation."""
    further = FP8_OPTIONS if fp8 else GENERATION_OPTIONS if generation else ()  # those for fp8 hold the others
    return (*GPU_OPTIONS, *further)


def options_in_force(options: tuple[Setting, ...], environment: Mapping[str, str]) -> tuple[Setting, ...]:
    """The compile options that the user's XLA_FLAGS do not name."""
    given = {word.partition("=")[0].lstrip("-") for word in environment.get("XLA_FLAGS", "").split()}
    return tuple(option for option in options if option.name not in given)


def apply_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the user has not set. Before JAX is first used; changes nothing where there is no GPU."""
    for variable in GPU_ENVIRONMENT:
        environment.setdefault(variable.name, variable.text)
