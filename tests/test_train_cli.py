"""`python -m megajax.train` as a user starts it: what stands on stdout and stderr, and how it ends."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TINY = shlex.split(
    "--num-layers 1 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2"
    " --eval-iters 2 --sample-tokens 8 --make-vocab-size-divisible-by 1"
)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megajax.train", *TINY, *words]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small English text."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} cats sat on {i * 7 % 13} mats and said nothing.\n" for i in range(300)))
    return path


def test_a_run_from_its_first_to_its_last_line(text, program_env, said):
    """Into `runs/gpt` of the folder where it was started; twice is once."""
    command = _command("--data", str(text), "--train-iters", "12", "--eval-interval", "6")
    done = subprocess.run(command, cwd=text.parent, env=program_env, capture_output=True, text=True, check=False)
    assert (done.returncode, said(done.stderr)) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gpt: ")
    assert "vocabulary 257 (byte), float32" in lines[0]
    assert [line.split("|")[0].strip() for line in lines if "| loss" in line] == [
        "step  1/12",
        "step 10/12",
        "step 12/12",
    ]
    assert any(line.startswith("step 6: validation loss ") for line in lines)
    assert any("unigram entropy of the data" in line for line in lines)
    assert "sample:\nThe " in done.stdout
    assert lines[-1] == "in runs/gpt: config.json, metrics.jsonl, loss.png, checkpoints"
    run_dir = text.parent / "runs" / "gpt"
    assert {p.name for p in run_dir.iterdir()} == {"config.json", "metrics.jsonl", "loss.png", "checkpoints"}
    assert json.loads((run_dir / "config.json").read_text())["train"]["train_iters"] == 12
    wanted = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_time", "tokens", "batch_size"}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(wanted <= row.keys() or "val_loss" in row for row in rows)

    again = subprocess.run(command, cwd=text.parent, env=program_env, capture_output=True, text=True, check=False)
    assert (again.returncode, said(again.stderr)) == (0, "")
    assert again.stdout.splitlines()[2].startswith("nothing to do: resumed from ")
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == rows


def test_sigterm_finishes_the_step_and_saves(text, program_env, said):
    command = _command("--data", str(text), "--train-iters", "100000", "--log-interval", "1", "--run-dir", "run")
    with subprocess.Popen(
        command, cwd=text.parent, env=program_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, said(err)) == (0, "")
    assert "SIGTERM; resume with the same command" in out
    assert len(list((text.parent / "run" / "checkpoints").glob("step_*"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.txt"], "error: data=none.txt is no file; check the path\n"),
        (
            ["--data", "text.txt", "--tp", "3", "--run-dir", "run"],
            "error: num_attention_heads=2 is not divisible by tensor_model_parallel_size=3; change one of them\n",
        ),
    ],
)
def test_a_mistake_is_the_only_line(words, message, text, program_env, said):
    env = {name: value for name, value in program_env.items() if name != "JAX_PLATFORMS"}  # as most users have it
    done = subprocess.run(_command(*words), cwd=text.parent, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, said(done.stderr)) == (2, "", message)
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]
