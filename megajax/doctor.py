"""Says what this machine has, and what a run on it, or on GPUs that are not there, would use and why:
`python -m megajax.doctor`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from megajax import cli
from megajax.config import Config, ConfigError
from megajax.kernels import Capability, Choice, other_slots
from megajax.parallel.aot import absent_gpus, compiler_silenced, target_of
from megajax.xla_flags import GPU_ENVIRONMENT, Setting, gpu_options, options_in_force

_HELP = """
All flags of the trainer (python -m megajax.train --help) may follow; without any, the default model in bf16 is meant.

examples:
  python -m megajax.doctor
  python -m megajax.doctor --target h100
  python -m megajax.doctor --target a100 --preset llama3-8b --bf16 --json
"""
_PACKAGES = ("megajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_GPU_PACKAGES = (
    *("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)


def main(argv: list[str]) -> None:
    """Prints the report."""
    options, flags = _parser().parse_known_args(argv)
    if _compiler_without_driver():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler for GPUs would complain that there is no driver
    with compiler_silenced():
        from megajax.models.registry import FAMILIES

        config = cli.parse(flags or ["--bf16"], prog="python -m megajax.doctor", families=FAMILIES)
        report = examine(config, options.target)
    print(json.dumps(report) if options.json else text(report))


def examine(config: Config, target: str | None) -> dict[str, Any]:
    """The report as plain types. target: a GPU that need not be here; None: the devices at hand."""
    import jax

    from megajax.parallel.mesh import gpu_capability

    devices = jax.devices()
    gpu = gpu_capability(devices[0]) if target is None else target_of(target).capability
    choices, trouble = _choices(config, target, gpu)
    return {
        "versions": {"python": platform.python_version()} | _versions(_PACKAGES) | _versions(_GPU_PACKAGES),
        "devices": _devices(devices, gpu_capability(devices[0])),
        "target": target,
        "model": f"{config.model_family}, {config.model.compute_dtype}",
        "kernels": [dataclasses.asdict(choice) | {"text": str(choice)} for choice in choices],
        "trouble": trouble,
        "xla_options": _settings(gpu_options(fp8=config.kernels.fp8_format is not None)) if gpu is not None else [],
        "environment": _environment() if gpu is not None else [],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "missing_extras": _missing_extras(),
    }


def _compiler_without_driver() -> bool:
    installed = _versions(("jax-cuda12-plugin", "jax-cuda13-plugin"))
    return bool(installed) and not Path("/dev/nvidiactl").exists()


def _choices(config: Config, target: str | None, gpu: Capability | None) -> tuple[tuple[Choice, ...], str | None]:
    """What each slot would get, or else why that cannot be known."""
    from megajax.models.registry import FAMILIES
    from megajax.parallel.mesh import fewest_devices
    from megajax.training.ahead import program_to_trace
    from megajax.training.backend import kernels_of_step
    from megajax.training.setup import on_mesh

    try:
        devices = None if target is None else absent_gpus(_whole_nodes(fewest_devices(config.parallel)), target)
        program, batch = program_to_trace(config, FAMILIES[config.model_family], devices)
        with on_mesh(program):
            found = kernels_of_step(program.train_step, program.abstract_state, batch)
    except ConfigError as error:
        return (), str(error)
    slots = other_slots(gpu, config.kernels)
    found = tuple(choice for choice in found if choice.slot != "linears")
    return (*found, *slots), None


def _whole_nodes(devices: int) -> int:
    return devices if devices < 8 else -(-devices // 8) * 8


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _devices(devices: list[Any], gpu: Capability | None) -> dict[str, Any]:
    import jax

    try:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, AttributeError):  # CPUs do not say
        memory = None
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "compute_capability": None if gpu is None else f"{gpu[0]}.{gpu[1]}",
        "memory_bytes": memory,
    }


def _settings(options: tuple[Setting, ...]) -> list[dict[str, str]]:
    ours = {option.name for option in options_in_force(options, os.environ)}
    return [
        {
            "name": option.name,
            "value": option.text if option.name in ours else "as in XLA_FLAGS",
            "why": option.why if option.name in ours else "the user's own",
        }
        for option in options
    ]


def _environment() -> list[dict[str, str]]:
    return [
        {
            "name": variable.name,
            "value": os.environ.get(variable.name, variable.text),
            "why": "the user's own" if variable.name in os.environ else variable.why,
        }
        for variable in GPU_ENVIRONMENT
    ]


def _missing_extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("megajax") or []:
        match = re.match(r"""([A-Za-z0-9_.-]+)(\[[^]]*\])?.*;.*extra == ["']([a-z0-9]+)["']""", requirement)
        if match is None or match[3] in ("test", "dev"):
            continue
        package = "jax-cuda12-plugin" if match[1] == "jax" else match[1]  # jax[cuda12]
        if not _versions((package,)):
            missing.setdefault(match[3], []).append(package)
    return missing


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    devices = report["devices"]
    capability = devices["compute_capability"]
    lines = ["VERSIONS", "  " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    lines += ["", "DEVICES", f"  {devices['count']} x {devices['kind']} ({devices['platform']})"]
    lines[-1] += f", compute capability {capability}" if capability else ""
    lines[-1] += f", {devices['memory_bytes'] / 2**30:.1f} GiB each" if devices["memory_bytes"] else ""
    lines += ["", f"KERNELS of {report['model']}, on {report['target'] or 'these devices'}"]
    lines += [f"  {choice['text']}" for choice in report["kernels"]]
    lines += [f"  cannot be said: {report['trouble']}"] if report["trouble"] else []
    for title, name in (("XLA OPTIONS of its programs", "xla_options"), ("ENVIRONMENT", "environment")):
        if report[name]:
            lines += ["", title]
            lines += [f"  {row['name']}={row['value']}  ({row['why']})" for row in report[name]]
    lines += ["", "XLA_FLAGS", f"  {report['xla_flags'] or 'none'}", "", "EXTRAS that are not installed"]
    lines += [f"  megajax[{extra}]: {', '.join(names)}" for extra, names in report["missing_extras"].items()] or [
        "  none"
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m megajax.doctor",
        description=" ".join((__doc__ or "").split()),
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="GPU", help="answer for a GPU that is not here: h100, h200, a100, b200")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
