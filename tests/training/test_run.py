"""Whole runs: interrupted and resumed ones end with the same bits, evaluation is what it says, and folders are safe."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megajax.train import main
from megajax.training import loop
from megajax.training.metrics import read_rows

# Everything that a resume could get wrong: dropout, accumulated gradients, a batch that grows, saves under way.
HARD = (
    "--train-iters 10 --save-interval 2 --eval-interval 4 --hidden-dropout 0.2 --attention-dropout 0.1"
    " --global-batch-size 8 --rampup-batch-size 4 2 24"
)
TIMES = ("step_time", "tokens_per_second", "tflops_per_device", "mfu")


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _assert_same(run_dir: Path, other: Path, read_saved: Any) -> None:
    assert _rows(run_dir) == _rows(other)
    (step, state), (other_step, other_state) = read_saved(run_dir), read_saved(other)
    assert step == other_step
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        assert value.tobytes() == other_state[name].tobytes(), name
    steps = [sorted(path.name for path in (r / "checkpoints").glob("step_*")) for r in (run_dir, other)]
    assert steps[0] == steps[1]
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in other.iterdir()}


def _signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """The signal arrives while step `step` is being taken."""
    place_batch, grouped = loop.place_batch, loop._grouped
    calls: list[int] = []
    evaluating: list[bool] = []

    def place(*args: Any, **kwargs: Any) -> Any:
        if not evaluating:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
        return place_batch(*args, **kwargs)

    def group(*args: Any) -> Any:
        evaluating.append(True)
        yield from grouped(*args)
        evaluating.clear()

    monkeypatch.setattr(loop, "place_batch", place)
    monkeypatch.setattr(loop, "_grouped", group)


def test_an_interrupted_run_ends_with_the_same_bits(tiny, read_saved, monkeypatch, capsys):
    """exit_interval, SIGTERM between two saves, Ctrl-C, and a torn line; then on to the end."""
    whole = tiny.train("whole", HARD)
    steps = [row["step"] for row in _rows(whole) if "loss" in row]
    assert steps == list(range(1, 11))
    assert [row["batch_size"] for row in _rows(whole) if "loss" in row] == [4, 4, 4, 6, 6, 8, 8, 8, 8, 8]
    assert [row["step"] for row in _rows(whole) if "val_loss" in row] == [4, 8, 10]

    parts = tiny.train("parts", f"{HARD} --exit-interval 3")
    assert "stopped at step 3: exit_interval=3 is reached; resume with the same command" in capsys.readouterr().out
    assert read_saved(parts)[0] == 3
    for step, number in ((2, signal.SIGTERM), (2, signal.SIGINT)):
        with monkeypatch.context() as patched:
            _signal_at(patched, step, number)
            tiny.train("parts", HARD)
        assert f"{number.name}; resume with the same command" in capsys.readouterr().out
    assert read_saved(parts)[0] == 7
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 3.0}\n{"step": 9, "lo')  # beyond the checkpoint, and torn
    tiny.train("parts", HARD)
    _assert_same(parts, whole, read_saved)
    assert json.loads((parts / "config.json").read_text()) == {
        **json.loads((whole / "config.json").read_text()),
        "train": {**json.loads((whole / "config.json").read_text())["train"], "run_dir": str(parts)},
    }


def test_a_second_signal_does_not_wait(tiny, monkeypatch):
    place_batch = loop.place_batch

    def place(*args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return place_batch(*args, **kwargs)

    monkeypatch.setattr(loop, "place_batch", place)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny.train("run", "--train-iters 5")
    assert signal.getsignal(signal.SIGINT) is before


LAYOUTS = {
    "dp2-zero1": (2, "--micro-batch-size 2"),
    "dp2-zero3": (2, "--micro-batch-size 1 --zero 3"),
    "tp2-zero0": (2, "--tp 2 --sequence-parallel --zero 0"),
    "dp2-tp2-zero1": (4, "--tp 2 --micro-batch-size 1"),
}


def test_a_run_resumes_on_other_devices(tiny):
    """One device, then others with another division of the state: the losses stay those of the first."""
    flags = "--train-iters 6 --global-batch-size 4 --eval-interval 6"
    whole = _rows(tiny.train("whole", flags))
    half = tiny.train("half", f"{flags} --exit-interval 3")
    for name, (devices, layout) in LAYOUTS.items():
        shutil.copytree(half, half.with_name(name))
        moved = _rows(tiny.train(name, f"{flags} {layout}", devices=devices))
        assert [row["step"] for row in moved] == [row["step"] for row in whole]
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                [row[key] for row in moved if key in row],
                [row[key] for row in whole if key in row],
                rtol=2e-5,
                err_msg=name,
            )


def _files(folder: Path) -> dict[str, bytes]:
    changing = ("loss.png", ".lock")
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in changing
    }


def test_a_finished_run_has_nothing_to_do(tiny, capsys):
    run_dir = tiny.train("run", "--train-iters 3 --sample-tokens 4")
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "\nsample:\n" in out
    before = _files(run_dir)
    (run_dir / "loss.png").unlink()
    tiny.train("run", "--train-iters 3 --sample-tokens 4")
    out = capsys.readouterr().out
    assert out.count("\n") == 3, out
    assert f"nothing to do: resumed from {run_dir}/checkpoints at step 3, the end; to go on, raise train_iters=3" in out
    assert _files(run_dir) == before
    assert (run_dir / "loss.png").stat().st_size > 1000

    tiny.train("run", "--train-iters 5")
    assert [row["step"] for row in _rows(run_dir) if "loss" in row] == [1, 2, 3, 4, 5]


def test_load_continues_and_finetune_begins_anew(tiny, read_saved):
    first = tiny.train("first", "--train-iters 3")
    weights = {name: value for name, value in read_saved(first)[1].items() if name.startswith("params/")}

    on = tiny.train("on", f"--train-iters 5 --load {first}/checkpoints")
    assert [row["step"] for row in _rows(on) if "loss" in row] == [4, 5]

    tuned = tiny.train("tuned", f"--train-iters 1 --lr 0 --weight-decay 0 --load {first}/checkpoints --finetune")
    step, state = read_saved(tuned)
    assert step == 1
    assert state["samples"] == 2
    for name, value in weights.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert read_saved(first)[0] == 3


def test_samples_may_say_how_long(tiny, read_saved):
    """21 samples in batches of 2, 2, 4, 4, ...: the ramp, then whole batches while they last."""
    run_dir = tiny.train("run", "--train-samples 21 --global-batch-size 4 --rampup-batch-size 2 2 3")
    rows = [row for row in _rows(run_dir) if "loss" in row]
    assert [row["batch_size"] for row in rows] == [2, 2, 4, 4, 4, 4]
    assert read_saved(run_dir)[1]["samples"] == 20


def test_the_clock_may_stop_a_run(tiny, capsys, read_saved):
    run_dir = tiny.train("run", "--train-iters 1000 --exit-duration-in-mins 0.0001")
    assert "exit_duration_in_mins=0.0001 are over" in capsys.readouterr().out
    assert read_saved(run_dir)[0] == 1


def test_a_profile_of_some_steps(tiny):
    """Between its two steps, and not at all when a run resumes behind the first."""
    run_dir = tiny.train("run", "--train-iters 4 --profile-step-start 1 --profile-step-end 2")
    assert len(list((run_dir / "profile").rglob("*.xplane.pb"))) == 1
    tiny.train("run", "--train-iters 6 --profile-step-start 3 --profile-step-end 5")  # resumes at 4: too late
    assert len(list((run_dir / "profile").rglob("*.xplane.pb"))) == 1


def test_a_run_that_goes_wrong_stops_and_saves(tiny, capsys, read_saved):
    """Every update overflows: one line, exit code 1, the weights untouched and saved."""
    argv = tiny.argv("run", "--train-iters 20 --fp16 --loss-scale 1e38 --max-skipped-steps 3 --micro-batch-size 1")
    assert main(argv) == 1
    captured = capsys.readouterr()
    run_dir = tiny.text.with_name("run")
    [line] = captured.err.splitlines()
    assert line.startswith("error: the last 3 updates were skipped (loss 3.")
    assert line.endswith(f"raise max_skipped_steps=3; step 4 is saved in {run_dir}/checkpoints")
    step, state = read_saved(run_dir)
    assert (step, state["step"], state["samples"], state["skipped"]) == (4, 4, 0, 4)
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3, 4]
    assert [row["grad_norm"] for row in rows] == [None] * 4  # JSON has no infinity
