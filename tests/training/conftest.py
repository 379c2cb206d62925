"""A run small enough for a test: one layer of sixteen features on a few lines of text."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from megajax import cli
from megajax.checkpoint import CheckpointStore
from megajax.config import CheckpointConfig
from megajax.data.tokenizers import build_tokenizer
from megajax.models.registry import FAMILIES
from megajax.parallel import mesh
from megajax.train import main
from megajax.training import setup
from megajax.training.run import build_run_datasets
from megajax.training.setup import Program, build_program, fit_config

FLAGS = (
    "--num-layers 1 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2"
    " --lr 0.02 --eval-iters 2 --sample-tokens 0 --make-vocab-size-divisible-by 1"
)
ON_TEXT = f"{FLAGS} --tokenizer null:24"


@contextlib.contextmanager
def _devices(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "make_mesh", lambda parallel, _: mesh.make_mesh(parallel, jax.devices()[:count]))
        yield


@pytest.fixture
def one_device() -> Iterator[None]:
    """Programs of this test see the first of the eight devices."""
    with _devices(1):
        yield


def write_numbers(path: Path, *, lines: int = 300) -> Path:
    """A text of the numbers below 23, in a pattern that can be learnt."""
    path.write_text("".join(" ".join(str((i + j * j) % 23) for j in range(12)) + "\n" for i in range(lines)))
    return path


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Runs of one folder of a test.

    Attributes:
      text: the file they train on.
    """

    text: Path

    def argv(self, run_dir: str, flags: str = "") -> list[str]:
        """The words of the command line."""
        run = ["--data", str(self.text), "--run-dir", str(self.text.with_name(run_dir))]
        return [*shlex.split(ON_TEXT), *run, *shlex.split(flags)]

    def train(self, run_dir: str, flags: str = "", *, devices: int = 1) -> Path:
        """Runs to the end or to where the flags stop it; returns the run's folder."""
        with _devices(devices):
            assert main(self.argv(run_dir, flags)) == 0
        return self.text.with_name(run_dir)

    def program(self, flags: str = "", *, devices: int = 1) -> Program:
        """The compiled side of such a run, without a folder."""
        config = cli.parse(self.argv("unused", flags), prog="train", families=FAMILIES)
        tokenizer = build_tokenizer(config.data.tokenizer)
        return build_program(
            fit_config(config, FAMILIES[config.model_family], tokenizer),
            FAMILIES[config.model_family],
            devices=jax.devices()[:devices],
        )

    def datasets(self, program: Program) -> Any:
        """What a run of the program would read."""
        return build_run_datasets(program, build_tokenizer(program.config.data.tokenizer))


@pytest.fixture(scope="session")
def tiny_in() -> Callable[[Path], Tiny]:
    """Tiny runs in a folder."""
    return lambda folder: Tiny(write_numbers(folder / "numbers.txt"))


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Tiny runs in the test's own folder."""
    return Tiny(write_numbers(tmp_path / "numbers.txt"))


def saved_state(run_dir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, every array) of the newest checkpoint, read as plain arrays."""
    folder = max((run_dir / "checkpoints").glob("step_*"))
    tree = json.loads((folder / "tree.json").read_text())
    shapes = {
        name: None if entry["dtype"] == "none" else jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
        for name, entry in tree.items()
    }
    with CheckpointStore.open(
        run_dir / "checkpoints", CheckpointConfig(), family="gpt", model_config={}, read_only=True
    ) as store:
        state, _ = store.restore(shapes)
    return int(folder.name[5:]), {name: np.asarray(value) for name, value in state.items() if value is not None}


@pytest.fixture
def read_saved() -> Callable[[Path], tuple[int, dict[str, np.ndarray]]]:
    """`saved_state`."""
    return saved_state
