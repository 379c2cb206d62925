"""Eight training steps equal Megatron's, on one device and on every layout: losses, gradient norms, final weights."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.models.registry import FAMILIES
from megajax.training.setup import Program, build_program, on_mesh, place_batch

CASE = Path(__file__).parents[1] / "golden" / "mcore_train_llama"


@dataclasses.dataclass(frozen=True)
class Layout:
    devices: int = 1
    tp: int = 1
    sp: bool = False
    zero: int = 0
    micro_batch_size: int = 2

    def __str__(self) -> str:
        dp = self.devices // self.tp
        return f"dp{dp}-tp{self.tp}{'-sp' if self.sp else ''}-zero{self.zero}-mbs{self.micro_batch_size}"


LAYOUTS = [
    Layout(),
    Layout(micro_batch_size=4),
    Layout(devices=2, micro_batch_size=1),
    Layout(devices=2, micro_batch_size=2, zero=1),
    Layout(devices=4, micro_batch_size=1, zero=1),
    Layout(devices=4, micro_batch_size=1, zero=3),
    Layout(devices=2, tp=2),
    Layout(devices=2, tp=2, sp=True),
    Layout(devices=4, tp=4, sp=True),  # more shards than key/value heads
    Layout(devices=4, tp=2, sp=True, zero=1, micro_batch_size=1),
    Layout(devices=8, tp=2, sp=True, zero=3, micro_batch_size=1),
    Layout(devices=8, tp=4, zero=3, micro_batch_size=2),
]


def _program(layout: Layout) -> tuple[Program, Pretrained]:
    transformer_config = json.loads((CASE / "config.json").read_text())["transformer_config"]
    model_args = {
        "vocab_size": 96,
        "max_sequence_length": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    pretrained = megatron.load(load_file(CASE / "model.safetensors"), "gpt", transformer_config, model_args)
    run = Config(
        model_family="gpt",
        model=pretrained.config,
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            zero=layout.zero,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(
            lr=0.01,
            min_lr=0.001,
            lr_decay_style="cosine",
            lr_warmup_iters=3,
            lr_decay_iters=10,
            weight_decay=0.1,
            adam_beta2=0.95,
        ),
        data=DataConfig(seq_length=40),
        train=TrainConfig(train_iters=8, micro_batch_size=layout.micro_batch_size, global_batch_size=4),
    )
    return build_program(run, FAMILIES["gpt"], devices=jax.devices()[: layout.devices]), pretrained


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_megatron(layout):
    program, pretrained = _program(layout)
    tokens = np.load(CASE / "inputs.npz")["tokens"].astype(np.int32).reshape(8, 4, 41)
    expected = np.load(CASE / "outputs.npz")
    state = program.create_state()
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    state = state.replace(params=jax.device_put(pretrained.params, places))
    seen: dict[str, list[Any]] = {"loss": [], "grad_norm": [], "lr": []}
    with on_mesh(program):
        for rows in tokens:
            batch = {
                "tokens": rows[:, :-1],
                "labels": rows[:, 1:],
                "loss_mask": np.ones((4, 40), np.float32),
                "position_ids": np.broadcast_to(np.arange(40, dtype=np.int32), (4, 40)),
            }
            size = program.batches.at(0)
            state, metrics = program.train_step(
                state, place_batch(program, batch, num_microbatches=size.num_microbatches)
            )
            seen["loss"].append(float(metrics.loss))
            seen["grad_norm"].append(float(metrics.grad_norm))
            seen["lr"].append(float(metrics.learning_rate))
    np.testing.assert_allclose(seen["lr"], expected["lr"], rtol=1e-5)
    np.testing.assert_allclose(seen["loss"], expected["loss"], atol=1e-5)
    np.testing.assert_allclose(seen["grad_norm"], expected["grad_norm"], rtol=2e-5)
    final = megatron.save(pretrained._replace(params=jax.device_get(state.params)))
    for name, value in load_file(CASE / "final.safetensors").items():
        np.testing.assert_allclose(final[name], value, atol=5e-5, err_msg=name)
