"""Trains a model: `python -m megajax.train --model gpt`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

from megajax import cli
from megajax.models.registry import FAMILIES


def main(argv: list[str]) -> int:
    """Trains as the flags say; returns the exit code."""
    config = cli.parse(argv, prog="python -m megajax.train", families=FAMILIES)
    # Only now, so that a typing mistake is answered without waiting for JAX to load.
    from megajax.parallel.distributed import processes
    from megajax.training.run import run

    with processes(config.distributed):
        config = dataclasses.replace(config, distributed=config.distributed.anywhere())
        return run(config, FAMILIES[config.model_family])


if __name__ == "__main__":
    cli.run_main(main)
