"""Which engine a pipeline gets when nothing is said, and that what is said is heard."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from megajax import cli
from megajax.models.registry import FAMILIES
from megajax.training.pipeline_engine import EngineChoice, choose_engine
from megajax.training.setup import build_program

SMALL = "--num-layers 8 --hidden-size 16 --num-attention-heads 4 --pp 2 --global-batch-size 128 --vocab-size 64"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def choice(flags: str, model: str = "gpt") -> EngineChoice:
    args = f"--model {model} {SMALL} {flags}".split()
    config: Any = cli.parse(args, prog="test", families=FAMILIES)
    program = build_program(config, FAMILIES[model])
    return choose_engine(program.stages, program.config)


@pytest.mark.parametrize(
    ("flags", "engine", "parts", "why"),
    [
        ("", "table", 2, "as many microbatches as Megatron's 1F1B"),
        ("--vpp 2", "table", 2, "as many microbatches"),
        ("--pipeline-engine lockstep", "lockstep", 2, "as asked for"),
        (f"{FULL} --pipeline-engine table", "table", 3, "as asked for"),
        (FULL, "lockstep", 1, "computed again"),
        ("--num-layers 6", "lockstep", 1, "two equal parts"),
        ("--decoder-first-pipeline-num-layers 2", "lockstep", 1, "two equal parts"),
        ("--cp 2 --seq-length 64", "lockstep", 1, "rings"),
        ("--zero 2", "lockstep", 1, "ZeRO"),
        ("--num-experts 4 --ep 2 --moe-router-topk 2", "lockstep", 1, "messages"),
        ("--pipeline-schedule zb-h1", "table", 1, "zb-h1"),
        ("--pipeline-schedule gpipe", "table", 2, "gpipe"),
    ],
)
def test_the_engine_and_the_parts_of_a_backward(flags: str, engine: str, parts: int, why: str) -> None:
    found = choice(flags)
    assert (found.name, found.parts) == (engine, parts)
    assert why in found.title


def test_two_stacks_run_by_the_table() -> None:
    assert choice("", model="t5").title == "pipeline engine table: the model has several stacks of layers"
