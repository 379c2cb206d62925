"""What every program does at its edges: exit codes, interrupts, closed pipes, and a light import."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megajax import cli
from megajax.config import ConfigError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--version"], prog="train", families={})
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("megajax ")


def test_run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--x"])

    def exits(main: Callable[[list[str]], int | None]) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            cli.run_main(main)
        return caught.value.code, capsys.readouterr().err

    def mistake(argv: list[str]) -> None:
        raise ConfigError(f"no {argv[0]}\nhere")

    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    def bug(argv: list[str]) -> None:
        raise ValueError("a bug")

    assert exits(lambda argv: None) == (0, "")
    assert exits(lambda argv: len(argv) + 6) == (7, "")
    assert exits(mistake) == (2, "error: no --x here\n")
    assert exits(interrupt) == (130, "interrupted\n")
    with pytest.raises(ValueError, match="a bug"):
        cli.run_main(bug)


def _python(code: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **kwargs)


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    code = (
        "import sys; from megajax import cli\n"
        "sys.argv = ['train', '--model', 'x']\n"
        "cli.run_main(lambda argv: cli.parse(argv, prog='train', families={}) and None)"
    )
    done = _python(code)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --model x is unknown; there is\n")


@pytest.mark.parametrize(
    "call", ["print('x' * 100000)", "print('x')", "cli.parse(['--version'], prog='', families={})"]
)
def test_a_closed_pipe_is_quiet(call: str) -> None:
    code = (
        "import os, sys; from megajax import cli\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        f"cli.run_main(lambda argv: {call})"
    )
    done = _python(code)
    assert (done.returncode, done.stderr) == (141, "")


def test_importing_is_light() -> None:
    done = _python("import sys, megajax.cli; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr
