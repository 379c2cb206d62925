"""Where numbers go: rows that survive a crash, writers that are optional, lines for people."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import types
from typing import Any

import pytest

from megajax.config import Config, ConfigError, TrainConfig
from megajax.models.registry import FAMILIES
from megajax.training.metrics import Console, JsonLines, format_step, make_writers, read_rows, require_packages
from megajax.training.report import plot_loss

ROW = {
    "step": 3,
    "loss": 2.5,
    "grad_norm": 0.25,
    "learning_rate": 1e-3,
    "step_time": 0.0125,
    "tokens_per_second": 1234567.0,
    "tflops_per_device": 1.5,
    "mfu": None,
    "skipped_steps": 0,
}


def _config(**train: Any) -> Config:
    return dataclasses.replace(FAMILIES["gpt"].default, train=TrainConfig(**train))


def test_rows_are_there_at_once_and_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, resume_step=None)
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "mfu": null}\n'
    writer.close()


def test_a_new_run_begins_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    JsonLines(path, resume_step=None).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 2', "\x00\x00\x00", "é"])
def test_a_resumed_run_keeps_the_rows_up_to_its_step(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}, {"step": 3, "loss": 1.0}]
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + torn.encode()[:-1] + torn.encode()[-1:])
    assert read_rows(path) == rows
    writer = JsonLines(path, resume_step=2)
    writer.write({"step": 3, "loss": 0.5})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*rows[:3], {"step": 3, "loss": 0.5}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [("tensorboard_dir", "tensorboardX", "tensorboard"), ("wandb_project", "wandb", "wandb")],
)
def test_a_missing_package_is_named_with_its_extra(option, package, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_packages(_config())
    with pytest.raises(ConfigError) as caught:
        require_packages(_config(**{option: "here"}))
    assert str(caught.value) == f"{option}=here: {package} is not installed; run pip install 'megajax[{extra}]'"


def test_tensorboard_and_wandb_get_every_number(tmp_path, monkeypatch):
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int | None):
            calls.append(("open", directory, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("wandb", values, step)), finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: calls.append(("init", k)) or run))
    config = _config(tensorboard_dir="tb", wandb_project="p")
    writers = make_writers(config, tmp_path, {"a": 1}, resume_step=7)
    for writer in writers:
        writer.write({"step": 8, "loss": 2.0, "mfu": None})
        writer.close()
    assert calls == [
        ("open", "tb", 8),
        ("init", {"project": "p", "config": {"a": 1}}),
        ("loss", 2.0, 8),
        "closed",
        ("wandb", {"loss": 2.0, "mfu": None}, 8),
        "finished",
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_the_line_of_a_step():
    line = format_step(ROW, total=200)
    assert line == (
        "step   3/200 | loss  2.5000 | grad norm     0.25 | lr 1.00e-03 |     12 ms | 1,234,567 tok/s"
        " | 1.5 TFLOP/s/device"
    )
    assert format_step({**ROW, "mfu": 0.4567, "skipped_steps": 2}, total=200) == f"{line} | MFU 45.7% | skipped 2"


def test_the_console_draws_a_bar_only_on_a_terminal(monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((30, 10)))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 1

    plain, terminal, quiet = io.StringIO(), Terminal(), Terminal()
    for stream in (plain, terminal, quiet):
        console = Console(quiet=stream is quiet, stream=stream)
        console.progress(1, 2, "loss 1.0000")
        console.line("a line")
    assert plain.getvalue() == "a line\n"
    assert quiet.getvalue() == ""
    bar = f"{'█' * 12}{'░' * 12} 1/2 "
    assert terminal.getvalue() == f"{bar}\r{' ' * 29}\ra line\n"


def test_the_picture_shows_what_there_is(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 2, "val_loss": 2.0}, {"step": 3, "loss": 1.0}]
    for name, shown in {"all": rows, "training": rows[:1], "none": []}.items():
        path = tmp_path / f"{name}.png"
        plot_loss(shown, path, title=name, baseline=("unigram entropy", 2.5))
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3
