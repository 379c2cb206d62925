"""The table engine for H100s: no permute in what only some stages run, and the memory of p microbatches."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import absent_gpus
from megajax.parallel.branch_check import SOME_STAGES
from megajax.parallel.hlo import Instruction, computations_of
from megajax.training.setup import build_program, on_mesh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot"),
]
STAGES, SEQ, ROWS = 4, 256, 4


@functools.cache
def _compiled(microbatches: int, engine: str, schedule: str = "1f1b") -> Any:
    """A training step of 4 stages of 2 GPUs each."""
    config = Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=8, hidden_size=64, num_attention_heads=4, vocab_size=128, position_embedding_type="rope",
            hidden_dropout=0.0, attention_dropout=0.0, recompute_granularity="selective",
        ),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=STAGES, tensor_model_parallel_size=2, sequence_parallel=True,
            pipeline_engine=engine, pipeline_schedule=schedule,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=ROWS, global_batch_size=ROWS * microbatches),
    )  # fmt: skip
    program = build_program(config, FAMILIES["gpt"], devices=absent_gpus(8))
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((microbatches, ROWS, SEQ), kind) for name, kind in kinds.items()}
    with on_mesh(program):
        return program.train_step.lower(program.abstract_state, batch).compile()  # pyright: ignore


def _within(computations: Mapping[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for instruction in computations[name]:
        yield instruction
        for callee in instruction.called:
            yield from _within(computations, callee)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_what_some_stages_run_holds_no_permute(schedule):
    """A permute is one meeting of all its pairs, so it must not stand where only some stages come by. (The one that may
    be left out, where nobody sends, is in a branch that all stages take alike.)"""
    computations, entry = computations_of(_compiled(8, "table", schedule).as_text())
    everything = list(_within(computations, entry))
    loops = [i for i in everything if i.opcode == "while" and i.op_name.endswith("/while") and i.trips is None]
    names = [loop.op_name.split("/")[-2] for loop in loops if SOME_STAGES in loop.op_name.split("/")]
    last = {"1f1b": "stage_backward_1", "zb-h1": "stage_weights_0"}[schedule]
    assert sorted(names) == sorted(["stage_forward_0", "stage_backward_0", last])
    opcodes = [{i.opcode for body in loop.called for i in _within(computations, body)} for loop in loops]
    for found in opcodes:
        assert not any(opcode.startswith("collective-permute") for opcode in found)
    gathers = [any(opcode.startswith("all-gather") for opcode in found) for found in opcodes]
    assert sum(gathers) >= 2, "tensor parallelism's collectives belong in there"
    assert any(i.opcode.startswith("collective-permute") for i in everything)


def test_memory_is_that_of_p_microbatches():
    """Lockstep holds up to 2 p - 1 microbatches, the table p, whatever m is."""

    def temporary(microbatches: int, engine: str) -> int:
        return _compiled(microbatches, engine).memory_analysis().temp_size_in_bytes

    few, many = temporary(8, "table"), temporary(32, "table")
    lockstep, short = temporary(8, "lockstep"), temporary(2, "lockstep")
    print(f"temporaries: table {few:,} (m = 8), {many:,} (m = 32); lockstep {lockstep:,} (m = 8), {short:,} (m = 2)")
    inputs = 6 * ROWS * SEQ * 4  # tokens, labels, positions, mask and weights of a microbatch
    assert many - few <= 24 * inputs
    kept = (lockstep - short - 6 * inputs) / 4  # by a microbatch: of two lockstep has three slots, of eight 2 p - 1
    # What p + 1 keep, at most: a part of one lies beside the buffers, on its way into them.
    assert lockstep - few > ((2 * STAGES - 1) - (STAGES + 1)) * kept
