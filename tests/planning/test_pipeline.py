"""What a plan says of a pipeline: of a training step by either engine, and of an evaluation."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import pytest

from megajax import cli
from megajax.models.registry import FAMILIES
from megajax.planning.pipeline import PipelineView, pipeline_of
from megajax.training.ahead import Compiled
from megajax.training.setup import build_program

SMALL = "--model gpt --num-layers 8 --hidden-size 16 --num-attention-heads 4 --vocab-size 64 --global-batch-size 128"
STAGES, MICROBATCHES = 4, 8


def view(step: Any, *flags: str) -> PipelineView:
    config: Any = cli.parse([*SMALL.split(), "--pp", f"{STAGES}", *flags], prog="test", families=FAMILIES)
    program = build_program(config, FAMILIES["gpt"])
    batch = {"tokens": jax.ShapeDtypeStruct((MICROBATCHES, 2, 8), "int32")}
    return pipeline_of(Compiled(step, program, None, (), batch, (0.0, 0.0)))


@pytest.mark.parametrize(
    ("step", "engine", "busy", "kept", "idle"),
    [
        # Three ticks of a forward are idle; it keeps 2 p - 1 microbatches, the first stage of 1F1B p.
        ("train", "lockstep", 8 / 11, (7, 4), 3 / 11),
        # p - 1 forwards and backwards in two parts, and as many as there are microbatches; nothing idle is computed.
        ("train", "table", 8 / (3 * 11), (4, 4), 0.0),
        ("eval", "table", 8 / 11, None, 3 / 11),  # forward alone, in lockstep
    ],
)
def test_a_pipeline_is_seen_as_it_runs(step: str, engine: str, busy: float, kept: Any, idle: float) -> None:
    found = view(step, "--pipeline-engine", engine)
    assert found.engine == (f"pipeline engine {engine}: as asked for" if step == "train" else None)
    assert (found.busy, found.idle_share) == (pytest.approx(busy), pytest.approx(idle))
    assert found.in_flight == kept
