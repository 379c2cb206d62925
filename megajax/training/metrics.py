"""Where the numbers of a run go: one line on the console, metrics.jsonl always, TensorBoard or W&B on request."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megajax.config import Config, ConfigError
from megajax.training.files import clear_errors, new_file

Row = Mapping[str, float | int | None]


class Writer(Protocol):
    """Something that keeps rows of numbers."""

    def write(self, row: Row) -> None:
        """row: `step` and named numbers."""
        ...

    def close(self) -> None:
        """Flushes."""
        ...


class JsonLines:
    """`metrics.jsonl`: one JSON object a row, appended and flushed. NaN and infinity become null: JSON has neither.

    Raises:
      ConfigError: the file cannot be written, or the disk is full.
    """

    def __init__(self, path: Path, *, resume_step: int | None):
        self.path = path
        with clear_errors(path):
            if resume_step is None:
                path.unlink(missing_ok=True)
            elif path.exists():
                _drop_after(path, resume_step)
            # Unbuffered: what a full disk has refused is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Appends a row."""
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
        rest = memoryview((json.dumps(finite) + "\n").encode())
        with clear_errors(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, none if there is no file; a last line that a crash has cut off is left out."""
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _drop_after(path: Path, step: int) -> None:
    # A killed run may have logged steps beyond its last checkpoint; the resumed one takes them again.
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row.get("step", 0) <= step]
    with new_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class TensorBoard:
    """Scalars for TensorBoard. Points after `resume_step` that a killed run has left are hidden."""

    def __init__(self, directory: str, *, resume_step: int | None):
        from tensorboardX import SummaryWriter

        with clear_errors(Path(directory)):
            self._writer = SummaryWriter(directory, purge_step=None if resume_step is None else resume_step + 1)

    def write(self, row: Row) -> None:
        """One scalar a number."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class Wandb:
    """Scalars for Weights & Biases."""

    def __init__(self, project: str, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(project=project, config=dict(config))

    def write(self, row: Row) -> None:
        """One point a number."""
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def require_packages(config: Config) -> None:
    """Raises ConfigError where the config asks for a writer whose package is missing."""
    for option, value, package, extra in (
        ("tensorboard_dir", config.train.tensorboard_dir, "tensorboardX", "tensorboard"),
        ("wandb_project", config.train.wandb_project, "wandb", "wandb"),
    ):
        if value is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{option}={value}: {package} is not installed; run pip install 'megajax[{extra}]'")


def make_writers(config: Config, run_dir: Path, as_json: Mapping[str, Any], *, resume_step: int | None) -> list[Writer]:
    """The writers that the config asks for."""
    writers: list[Writer] = [JsonLines(run_dir / "metrics.jsonl", resume_step=resume_step)]
    if config.train.tensorboard_dir is not None:
        writers.append(TensorBoard(config.train.tensorboard_dir, resume_step=resume_step))
    if config.train.wandb_project is not None:
        writers.append(Wandb(config.train.wandb_project, as_json))
    return writers


class Console:
    """Lines for people on stdout; on a terminal, the last one shows the step that is running."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._width = 0

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        if not self._quiet:
            self._stream.write(f"{self._blank()}{text}\n")
            self._stream.flush()

    def progress(self, done: int, total: int, text: str) -> None:
        """Redraws the progress bar; prints nothing unless on a terminal."""
        if self._live:
            cells = 24
            filled = cells * done // max(total, 1)
            bar = f"{'█' * filled}{'░' * (cells - filled)} {done}/{total} {text}"
            columns = os.get_terminal_size(self._stream.fileno()).columns
            bar = bar[: max(columns - 1, 10)]
            self._stream.write(f"{self._blank()}{bar}")
            self._stream.flush()
            self._width = len(bar)

    def _blank(self) -> str:
        width, self._width = self._width, 0
        return f"\r{' ' * width}\r" if width else ""


def format_step(row: Row, *, total: int) -> str:
    """The line of one training step, fixed width so that columns can be read down."""
    parts = [f"step {row['step']:>{len(str(total))}}/{total}", f"loss {_number(row['loss'], '7.4f')}"]
    parts.append(f"grad norm {_number(row['grad_norm'], '8.3g')}")
    parts.append(f"lr {_number(row['learning_rate'], '.2e')}")
    parts.append(f"{_number(row['step_time'] and 1000 * row['step_time'], '6.0f')} ms")
    parts.append(f"{_number(row['tokens_per_second'], '9,.0f')} tok/s")
    parts.append(f"{_number(row['tflops_per_device'], '.3g')} TFLOP/s/device")
    if row.get("mfu") is not None:
        parts.append(f"MFU {100 * (row['mfu'] or 0):.1f}%")
    if row.get("skipped_steps"):
        parts.append(f"skipped {row['skipped_steps']}")
    return " | ".join(parts)


def _number(value: float | int | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
