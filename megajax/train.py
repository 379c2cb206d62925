"""Trains a model: `python -m megajax.train --model gpt`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

from megajax import cli
from megajax.config import Config, ConfigError
from megajax.models.registry import FAMILIES
from megajax.xla_flags import apply_environment


def main(argv: list[str]) -> int:
    """Trains as the flags say; returns the exit code."""
    config = cli.parse(argv, prog="python -m megajax.train", families=FAMILIES)
    devices = cli.control_value(argv, "--print-sharding")
    if devices is not None:
        return print_sharding(config, devices)
    apply_environment()
    # Only now, so that a typing mistake is answered without waiting for JAX to load.
    from megajax.parallel.distributed import processes
    from megajax.training.run import run

    with processes(config.distributed):
        config = dataclasses.replace(config, distributed=config.distributed.anywhere())
        return run(config, FAMILIES[config.model_family])


def print_sharding(config: Config, devices: str) -> int:
    """Prints the table for so many devices, "" for those at hand; returns the exit code."""
    if devices and not (devices.isascii() and devices.isdigit() and int(devices)):
        raise ConfigError(f"--print-sharding {devices} is not valid: expected a number of devices, or nothing")
    import jax

    from megajax.data.tokenizers import build_tokenizer
    from megajax.parallel.devices import find_devices
    from megajax.training.setup import fit_config
    from megajax.training.sharding_table import sharding_table

    find_devices()
    family, present = FAMILIES[config.model_family], jax.device_count()
    config = fit_config(config, family, build_tokenizer(config.data.tokenizer))
    print(sharding_table(config, family, devices=int(devices) if devices else None, present=present))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
