"""The planner as a program: what it prints, the picture, the JSON, and every mistake on one line."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megajax import plan
from megajax.config import ConfigError
from megajax.parallel.schedule_plot import draw_layout, draw_text, readable_bytes
from megajax.parallel.schedules import make_schedule

SMALL = ["--schedule", "1f1b", "--pp", "4", "--microbatches", "8"]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    plan.main([*argv])
    return capsys.readouterr().out


def test_a_schedule_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert planned(capsys, *SMALL, "--bytes-per-microbatch", "3221225472").splitlines() == [
        "1f1b: 4 stages of 1 chunk, 8 microbatches",
        "",
        "tick     0  1  2  3  4  5  6  7  8  9  10 11 12 13 14 15 16 17 18 19 20 21",
        "stage 0  F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 F6 B3 F7 B4 .  B5 .  B6 .  B7",
        "stage 1  .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .",
        "stage 2  .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 .  B7 .  .",
        "stage 3  .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .",
        "",
        "22 ticks, bubble 37.5% of the useful time (F=1, B=2)",
        "microbatches alive at most, by stage: 4, 3, 2, 1",
        "their activations, by stage: 12.0 GiB, 9.0 GiB, 6.0 GiB, 3.0 GiB",
    ]


def test_long_tables_are_broken_and_shortened() -> None:
    text = draw_text(make_schedule("zb-h1", 2, 200), width=60, max_lines=20)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) < 30
    assert lines[1].startswith("stage 0  F0") and lines[-1].endswith("W199")
    hidden = next(line for line in lines if line.startswith("... ticks "))
    first, last = int(hidden.split()[2]), int(hidden.split()[4])
    ticks = [int(tick) for line in lines if line.startswith("tick") for tick in line.split()[1:]]
    assert ticks == [*range(first), *range(last + 1, make_schedule("zb-h1", 2, 200).ticks)]


def test_layouts_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("Ettt", *["tt"] * 29, "m", "L")
    assert draw_layout(layout, 16).splitlines() == [
        "stage 0      Ettt | tt",
        "stages 1-13  tt | tt",
        "stage 14     tt | m",
        "stage 15     tt | L",
    ]
    assert draw_layout(("E", "", "t", "L"), 4).splitlines()[1] == "stage 1  -"
    argv = ["--schedule", "1f1b", "--pp", "16", "--microbatches", "16", "--layout", "Et*3|(tt|)*29,m|L"]
    out = planned(capsys, *argv, "--num-layers", "61", "--mtp-num-layers", "1", "--chunks", "2")
    assert "16 stages of 2 chunks" in out and draw_layout(layout, 16) in out and "weighted by their layers" in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(planned(capsys, *SMALL, "--chunks", "2", "--num-layers", "16", "--json"))
    assert data["bubble"] == pytest.approx(3 / 16) and data["ticks"] == 38 and data["peak_live"] == [11, 9, 7, 5]
    assert data["layout"] == ["Ett", *["tt"] * 6, "ttL"] and data["bytes_in_flight"] is None
    assert data["table"][0] == ["F0.0", None, None, None] and len(data["table"]) == 38
    assert data["slots"]["saved"] == max(data["peak_live"])


def test_uneven_layers_idle_more(capsys: pytest.CaptureFixture[str]) -> None:
    def bubble(*argv: str) -> float:
        return json.loads(planned(capsys, *SMALL, "--json", *argv))["bubble"]

    even = bubble("--num-layers", "8")
    assert even == pytest.approx(3 / 8)
    # Stage 0 has 5 of 8 layers, 2.5 times its share: it never waits, and the others fit into what it takes.
    assert bubble("--num-layers", "8", "--decoder-first-pipeline-num-layers", "5") == pytest.approx(2.5 - 1)


def test_a_picture_is_saved_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "pipeline.png"
    planned(capsys, *SMALL, "--chunks", "2", "--png", str(path), "--bytes-per-microbatch", "1e9")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [file.name for file in path.parent.iterdir()] == ["pipeline.png"]


def test_pictures_of_odd_schedules(tmp_path: Path) -> None:
    for argv in (
        ["--schedule", "gpipe", "--pp", "1", "--microbatches", "1"],
        ["--schedule", "zb-h1", "--pp", "33", "--microbatches", "3"],
        ["--schedule", "1f1b", "--pp", "2", "--microbatches", "120"],
        ["--schedule", "1f1b", "--pp", "2", "--microbatches", "2", "--layout", "E||t|L"],
    ):
        plan.main([*argv, "--png", str(tmp_path / "x.png")])
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**60, "1024.0 PiB")]
)
def test_readable_bytes(size: int, text: str) -> None:
    assert readable_bytes(size) == text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to plan: give --num-devices for a training step, or --schedule"),
        (["--schedule"], "expected one argument"),
        (["--schedule", "2f2b", "--pp", "2", "--microbatches", "2"], "use one of gpipe, 1f1b, zb-h1"),
        (["--schedule", "1f1b", "--microbatches", "2"], "--pp is missing"),
        (["--schedule", "1f1b", "--pp", "2"], "--microbatches is missing"),
        (["--schedule", "1f1b", "--pp", "x", "--microbatches", "2"], "--pp"),
        (["--schedule", "1f1b", "--pp", "0", "--microbatches", "2"], "pipeline_model_parallel_size=0"),
        (
            ["--schedule", "1f1b", "--pp", "0", "--microbatches", "2", "--layout", "E|L"],
            "pipeline_model_parallel_size=0",
        ),
        (
            ["--schedule", "1f1b", "--pp", "0", "--microbatches", "2", "--num-layers", "2"],
            "pipeline_model_parallel_size",
        ),
        ([*SMALL, "--chunks", "0"], "num_virtual_stages_per_pipeline_rank=0"),
        ([*SMALL, "--chunks", "0", "--layout", "E|t|t|L"], "write 0 chunks"),
        ([*SMALL, "--chunks", "2", "--group", "3"], "microbatch_group_size_per_vp_stage=3"),
        ([*SMALL, "--layout", "Et|tL"], "has 2 stages"),
        ([*SMALL, "--layout", "E|t|t|L", "--num-layers", "3"], "has 2 t for num_layers=3"),
        ([*SMALL, "--layout", "E|t|t|L", "--account-for-loss-in-pipeline-split"], "has no effect beside --layout"),
        ([*SMALL, "--decoder-first-pipeline-num-layers", "2"], "has no effect without --num-layers"),
        ([*SMALL, "--mtp-num-layers", "2"], "has no effect without --num-layers"),
        ([*SMALL, "--num-layers", "6"], "num_layers=6 is not divisible"),
        ([*SMALL, "--num-layers", "8", "--mtp-num-layers", "-1"], "--mtp-num-layers -1"),
        ([*SMALL, "--bytes-per-microbatch", "0"], "--bytes-per-microbatch 0"),
        ([*SMALL, "--bytes-per-microbatch", "nan"], "--bytes-per-microbatch nan"),
        ([*SMALL, "--png", "/"], "is a folder"),
        ([*SMALL, "--png", "/proc/no/x.png"], "cannot write /proc/no/x.png"),
        ([*SMALL, "--colour"], "unrecognized arguments: --colour"),
        (["--schedule", "1f1b", "--pp", "64", "--microbatches", "9999999"], "the limit is"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan.main(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


STEP = ["--num-devices", "8"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mesh", "tp=8"], "--num-devices is missing"),
        (["--bf16", "--json", "plan.json"], "--json plan.json is not valid: --json takes no value; drop plan.json"),
        ([*STEP, "--target", "h900"], "target='h900' is not known; choose from h100"),
        (["--num-devices", "12"], "12 GPUs are no whole number of nodes of 8"),
        ([*STEP, "--mesh", "tp=3"], "tensor_model_parallel_size=3"),
        ([*STEP, "--mesh", "tp=16"], "tensor_model_parallel_size=16"),
        ([*STEP, "--mesh", "px=2"], "there is no axis 'px'"),
        ([*STEP, "--preset", "llama3-70c"], "llama3-70c"),
        ([*STEP, "--mesh", "pp=8", "--num-layers", "12"], "num_layers=12 is not divisible"),
        ([*STEP, "--colour"], "--colour"),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
def test_steps_that_cannot_be(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan.main(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler_for_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> Any:
        raise NotImplementedError  # as JAX does where no plugin knows the platform

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", none)
    with pytest.raises(ConfigError, match=r"pip install 'megajax\[aot\]'") as caught:
        plan.main(STEP)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
def test_a_step_as_a_program(program_env: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "new" / "plan.html"
    flags = ["--model", "gpt", "--bf16", "--num-layers", "2", "--target", "a100", "--step", "eval"]
    command = [sys.executable, "-m", "megajax.plan", "--num-devices", "2", "--mesh", "tp=2", *flags]
    env = {name: value for name, value in program_env.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [*command, "--json", "--html", str(page)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    data = json.loads(done.stdout)
    assert data["fits"] and data["target"] == "a100" and data["memory"]["card"] == 84974239744
    assert page.read_text().startswith("<!doctype html>") and "2 A100" in page.read_text()


def test_as_a_program(program_env: dict[str, str]) -> None:
    def run(*argv: str) -> Any:
        command = [sys.executable, "-m", "megajax.plan", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=program_env, check=False)

    good, bad = run(*SMALL, "--json"), run(*SMALL, "--chunks", "x")
    assert good.returncode == 0 and json.loads(good.stdout)["schedule"] == "1f1b" and good.stderr == ""
    assert bad.returncode == 2 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1
    assert bad.stderr.startswith("error: ")
