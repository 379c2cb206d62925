"""A checkpoint of any layout goes on on any other: the next losses are those of the run that stayed on one device.

Every source is a real one: two steps of AdamW on that layout, saved. Every layout is compiled once in a process, and
the workers share what they have saved.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TransformerConfig,
)
from megajax.models.registry import FAMILIES
from megajax.training.run import open_store, restore
from megajax.training.setup import Program, build_program, on_mesh, place_batch
from megajax.training.state import TrainState

VOCAB, SEQ, BATCH = 60, 16, 8
SAVED_AT, STEPS = 2, 4

ONE = "one"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    ONE: (1, {}),
    "zero0": (8, {"zero": 0}),
    "zero1-copies2": (8, {"zero": 1, "num_distributed_optimizer_instances": 2}),
    "zero2": (8, {"zero": 2}),
    "zero3": (8, {"zero": 3}),
    "tp4": (8, {"tensor_model_parallel_size": 4}),  # more shards than key/value heads
    "tp2-sp-zero3": (8, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero": 3}),
    "cp4-ring": (4, {"context_parallel_size": 4}),
    "cp2-ulysses-zero2": (8, {"context_parallel_size": 2, "cp_comm_type": "a2a", "zero": 2}),
    "pp4": (8, {"pipeline_model_parallel_size": 4}),
    "pp2-vpp2-zero3": (4, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "zero": 3}),
    "pp2-vpp2-uneven": (
        8,
        {
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
            "pipeline_model_parallel_layout": "Et|tt||tL",
        },
    ),
    "pp2-tp2-sp-cp2": (
        8,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "context_parallel_size": 2,
        },
    ),
}
"""Name -> devices and how they are divided; those left over are data parallel."""

QUICK = ("zero3", "zero1-copies2", "tp2-sp-zero3", "cp2-ulysses-zero2", "pp2-vpp2-uneven")
ALL = tuple(name for name in LAYOUTS if name != ONE)


@functools.cache
def program_of(layout: str) -> Program:
    """The compiled side of the run."""
    devices, parallel = LAYOUTS[layout]
    config = Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
            make_vocab_size_divisible_by=64,
            position_embedding_type="rope",
            normalization="RMSNorm",
            add_bias_linear=False,
            init_method_std=0.3,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=0.01, lr_decay_style="constant", weight_decay=0.1),
        data=DataConfig(seq_length=SEQ),
        checkpoint=CheckpointConfig(async_save=False),
        train=TrainConfig(micro_batch_size=1, global_batch_size=BATCH),
    )
    return build_program(config, FAMILIES["gpt"], devices=jax.devices()[:devices])


def train(program: Program, state: TrainState, start: int, stop: int) -> tuple[TrainState, list[tuple[float, float]]]:
    """Steps [start, stop): the state after them, and the loss and gradient norm of each."""
    seen = []
    with on_mesh(program):
        for step in range(start, stop):
            rng = np.random.default_rng(step)
            text = rng.integers(VOCAB, size=(BATCH, SEQ + 1)).astype(np.int32)
            batch = {
                "tokens": text[:, :-1],
                "labels": text[:, 1:],
                "loss_mask": (rng.random((BATCH, SEQ)) < 0.8).astype(np.float32),
                "position_ids": np.broadcast_to(np.arange(SEQ, dtype=np.int32), (BATCH, SEQ)),
            }
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, seen


def save(program: Program, state: TrainState, directory: Path) -> None:
    """As the training loop does."""
    with open_store(program, directory) as store:
        store.save(int(state.step), program.stages.to_stored(state), {"from": directory.name})


def load(program: Program, directory: Path) -> TrainState:
    """As the start of a run does."""
    with open_store(program, directory, read_only=True) as store:
        state, extras = restore(program, store)
    assert extras == {"from": directory.name}
    return state


@contextlib.contextmanager
def only_one_worker(path: Path) -> Iterator[None]:
    """Makes the other workers wait here."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Runs:
    """What all workers of this test run have trained, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def expected(self) -> np.ndarray:
        """Loss and gradient norm [steps, 2] of the run that stays on one device; saved before its first step, and,
        without stopping, in the middle."""
        path = self.folder / "expected.json"
        with only_one_worker(self.folder / "expected.lock"):
            if not path.exists():
                program = program_of(ONE)
                state = program.create_state()
                save(program, state, self.folder / "start")
                state, first = train(program, state, 0, SAVED_AT)
                save(program, state, self.folder / ONE)
                _, rest = train(program, state, SAVED_AT, STEPS)
                path.write_text(json.dumps([*first, *rest]))
        return np.array(json.loads(path.read_text()))

    def saved(self, layout: str) -> Path:
        """The checkpoint of a run on that layout, which began with the same weights."""
        expected, directory = self.expected(), self.folder / layout
        with only_one_worker(self.folder / f"{layout}.lock"):
            if not directory.exists():
                program = program_of(layout)
                state, seen = train(program, load(program, self.folder / "start"), 0, SAVED_AT)
                np.testing.assert_allclose(seen, expected[:SAVED_AT], rtol=2e-5)
                save(program, state, directory)
        return directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Shared between the workers: each has a folder of its own in that of the whole run."""
    own = tmp_path_factory.getbasetemp()
    return Runs((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "resume_matrix")


@pytest.mark.parametrize(
    ("target", "sources"),
    [
        *(pytest.param(target, QUICK, id=target) for target in QUICK),
        *(pytest.param(target, ALL, id=f"{target}-from-all", marks=pytest.mark.slow) for target in ALL),
    ],
)
def test_goes_on_as_one_device_would(target, sources, runs):
    program, expected = program_of(target), runs.expected()
    # Its own checkpoint first: the workers then begin with different ones, instead of waiting for each other.
    turn = sources.index(target)
    for source in (*sources[turn:], *sources[:turn], ONE):
        state = load(program, runs.saved(source))
        assert int(state.step) == SAVED_AT
        _, seen = train(program, state, SAVED_AT, STEPS)
        np.testing.assert_allclose(seen, expected[SAVED_AT:], rtol=2e-5, err_msg=f"from {source}")
