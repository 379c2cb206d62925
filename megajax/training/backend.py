"""Which backend builds the layers of a run: plain JAX, or fused kernels where the devices of its mesh have them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from megajax import kernels
from megajax.backends import BackendSpecProvider, LocalSpecProvider, TESpecProvider
from megajax.config import Config, ConfigError
from megajax.kernels import Choice
from megajax.parallel.mesh import gpu_capability


def choose_backend(config: Config, mesh: Mesh | AbstractMesh) -> BackendSpecProvider:
    """The backend for the devices of a mesh, which need not be at hand. On a mesh of no devices nothing will run, so
    any will do.

    Raises:
      ConfigError: fused kernels are asked for and the devices are no NVIDIA GPUs.
    """
    parallel, wanted = config.parallel, config.kernels
    local = LocalSpecProvider(cp_comm_type=parallel.cp_comm_type, zigzag=parallel.zigzag)
    if isinstance(mesh, AbstractMesh) or wanted.transformer_impl == "local":
        return local
    device = mesh.devices.flat[0]
    gpu = gpu_capability(device)
    kernels.choose_linears(gpu, wanted)
    if wanted.fp8_format is not None and config.model.fp16:
        raise ConfigError(f"fp8_format={wanted.fp8_format!r} is not possible with fp16=True; use bf16=True")
    _check_layers_in_bf16(config)
    if gpu is not None:
        strict = wanted.transformer_impl == "transformer_engine"
        # Where there is a GPU, JAX has its cuDNN, from whatever source.
        missing = jax.default_backend() == "cpu" and not _installed("nvidia.cudnn")
        return TESpecProvider(
            local=local,
            gpu=gpu,
            attention_backend=wanted.attention_backend,
            strict=strict,
            cudnn_missing=missing,
            grouped_gemm_backend=wanted.grouped_gemm_backend,
            fp8=None if wanted.fp8 is None else wanted.fp8.on(gpu),
        )
    for field, value, usual in (
        ("transformer_impl", wanted.transformer_impl, ("auto",)),
        ("attention_backend", wanted.attention_backend, ("auto", "unfused", "local")),
        ("grouped_gemm_backend", wanted.grouped_gemm_backend, ("auto", "unfused")),
    ):
        if value not in usual:
            raise ConfigError(
                f"{field}={value!r} needs an NVIDIA GPU, here is {device.device_kind}; use {field}='auto'"
            )
    return local


def _check_layers_in_bf16(config: Config) -> None:
    """What Megatron asks of `first_last_layers_bf16`."""
    model = config.model
    if not model.first_last_layers_bf16:
        return
    if config.kernels.fp8_recipe == "delayed":
        raise ConfigError("first_last_layers_bf16=True is not possible with fp8_recipe='delayed'; use tensorwise")
    most = model.num_layers // config.parallel.pipeline_model_parallel_size
    counts = {name: getattr(model, name) for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")}
    for name, count in counts.items():
        if not 0 <= count <= most:
            raise ConfigError(f"{name}={count} must lie between 0 and {most}, the layers of a pipeline stage")
    if not any(counts.values()):
        raise ConfigError("first_last_layers_bf16=True with 0 layers at start and end has no effect; leave it out")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the folder it would lie in
        return False


def kernels_of_step(step: Any, *arguments: Any) -> tuple[Choice, ...]:
    """What each slot of a jitted step got, found by tracing it. Called again with the same shapes, JAX remembers the
    trace; so this comes first, and in the context in which the step will be called."""
    with kernels.recording() as found:
        step.eval_shape(*arguments)
    plain = () if any(choice.slot.startswith("attention") for choice in found) else (Choice("attention", "plain"),)
    return (*plain, *found)


def describe_kernels(choices: tuple[Choice, ...]) -> str:
    """One line a slot, for the head of a log."""
    return "\n".join(map(str, choices))
