"""A step that computes with copies of its parameters: the same numbers, less to keep and to send."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.training import computed_with, setup
from megajax.training.ahead import bytes_on_a_device
from megajax.training.setup import Program, build_program, on_mesh, place_batch

SEQ, M, STEPS = 16, 2, 3
DP: dict[str, Any] = {"zero": 1}
TP_PP: dict[str, Any] = {
    "zero": 1,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
}
LAYOUTS = [
    pytest.param(DP, id="zero-1"),
    pytest.param(TP_PP, id="tp-pp"),
    pytest.param({"zero": 0}, id="zero-0", marks=pytest.mark.slow),
    pytest.param({"zero": 2}, id="zero-2", marks=pytest.mark.slow),
    pytest.param({"zero": 3}, id="zero-3", marks=pytest.mark.slow),
]


def program_of(parallel: dict[str, Any], devices: int = 4) -> Program:
    settings = ParallelConfig(**parallel)
    replicas = devices // (settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size)
    config = Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            vocab_size=64,
            normalization="RMSNorm",
            position_embedding_type="rope",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
        ),
        parallel=settings,
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.5, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=4 // replicas, global_batch_size=4 * M),
    )
    return build_program(config, FAMILIES["gpt"], devices=jax.devices()[:devices])


def trained(program: Program) -> tuple[np.ndarray, Any]:
    state, seen = program.create_state(), []
    with on_mesh(program):
        for step in range(STEPS):
            tokens = np.random.default_rng(step).integers(64, size=(4 * M, SEQ + 1)).astype(np.int32)
            batch = {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "position_ids": np.broadcast_to(np.arange(SEQ, dtype=np.int32), (4 * M, SEQ)),
                "loss_mask": np.ones((4 * M, SEQ), np.float32),
            }
            state, metrics = program.train_step(state, place_batch(program, batch, num_microbatches=M))
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(seen), jax.device_get(state.params)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_numbers_are_those_without_copies(parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, but for the order in which devices add up; XLA may not keep more digits than the program says."""
    options = setup.compiler_options
    exact = {"xla_allow_excess_precision": False}
    monkeypatch.setattr(setup, "compiler_options", lambda *arguments: options(*arguments) | exact)
    seen, params = trained(program_of(parallel))
    monkeypatch.setattr(computed_with, "cast_once", lambda _, params, dtype: jax.tree.map(lambda leaf: False, params))
    expected, wanted = trained(program_of(parallel))
    np.testing.assert_allclose(seen, expected, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, wanted)
    assert expected[0, 1] > 0.1


def test_a_replica_keeps_its_part() -> None:
    """What crosses to it is read off a GPU's program, in `tests/planning/test_report.py`: a CPU's sends fp32 only."""
    params = program_of(DP).abstract_state.params
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert 3.6 < whole / bytes_on_a_device(params) <= 4, "all but norms and biases"
