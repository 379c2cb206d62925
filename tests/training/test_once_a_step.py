"""Gradients cross the devices that see other tokens once a step, whatever divides the tokens: read off the programs."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.parallel.census import census
from megajax.parallel.replicas import axes_between_replicas
from megajax.parallel.sharding import spec_of
from megajax.training.ahead import compile_step
from megajax.training.setup import build_program, on_mesh

SEQ, M, WIDTH = 16, 2, 32
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss"),
    "moe_aux_loss_coeff": (0.3, 0.2),
    "moe_z_loss_coeff": 0.01,
}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
STATISTICS = 2 * 4 * EXPERTS["num_moe_experts"]
"""Bytes of what routers tell each other: scores and choices of each expert. A row of any parameter is longer."""
TP: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}


def _step(model: dict[str, Any], parallel: dict[str, Any]) -> tuple[str, Any]:
    """A compiled step of M microbatches on eight devices, and its mesh."""
    dense = math.prod(size for name, size in parallel.items() if name.startswith(("tensor", "pipeline", "context")))
    config = Config(
        model_family="gpt",
        model=TransformerConfig(**(SIZES | model)),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=1, global_batch_size=M * 8 // dense),
    )
    program = build_program(config, FAMILIES["gpt"], devices=jax.devices())
    place = NamedSharding(program.mesh, spec_of((None, "batch", "seq"), program.rules.table))
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    shape = (M, 8 // dense, SEQ)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=place) for name, kind in kinds.items()}
    with on_mesh(program):
        compiled = program.train_step.lower(program.abstract_state, batch).compile()  # pyright: ignore
    return compiled.as_text(), program.mesh


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param({}, CP, id="ring"),
        pytest.param({}, CP | PP | TP, id="ring-pp-tp"),
        pytest.param({}, CP | {"cp_comm_type": "a2a"}, id="ulysses"),
        pytest.param({}, CP | {"cp_comm_type": "all_gather"}, id="all_gather"),
        pytest.param(DROPOUT, TP, id="dropout"),
        pytest.param(EXPERTS, EP | TP, id="experts"),
        pytest.param(EXPERTS, EP | PP, id="experts-pp"),
        pytest.param(EXPERTS, EP | CP | {"num_distributed_optimizer_instances": 2}, id="experts-ring-copies"),
        pytest.param(EXPERTS, TP | {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}, id="folded"),
    ],
)
def test_no_gradient_crosses_replicas_in_a_loop(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    _assert_sums_are_outside_of_loops(*_step(model, parallel), SEQ)


FAMILY_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "ffn_hidden_size": WIDTH,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.mark.parametrize(
    ("family", "model", "parallel"),
    [
        pytest.param("bert", {}, CP | TP, id="bert-ring-tp"),
        pytest.param("t5", {"encoder_num_layers": 2}, PP | TP, id="t5-pp-tp", marks=pytest.mark.slow),
        pytest.param("llava", {}, CP | TP, id="llava-ring-tp", marks=pytest.mark.slow),
        pytest.param("clip", {}, TP, id="clip-tp"),
        pytest.param("radio", {}, TP, id="radio-tp", marks=pytest.mark.slow),
        pytest.param("retro", {"num_layers": 6}, TP, id="retro-tp", marks=pytest.mark.slow),
    ],
)
def test_no_gradient_of_a_model_that_declares_it_crosses(family: str, model: Any, parallel: Any) -> None:
    dense = math.prod(size for name, size in parallel.items() if name.startswith(("tensor", "pipeline", "context")))
    default = FAMILIES[family].default
    config = dataclasses.replace(
        default,
        model=default.model.replace(**(FAMILY_SIZES | model)),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        train=TrainConfig(micro_batch_size=1, global_batch_size=M * 8 // dense),
    )
    compiled = compile_step(config, FAMILIES[family], jax.devices())
    _assert_sums_are_outside_of_loops(compiled.executable.as_text(), compiled.program.mesh, config.data.seq_length)


def _assert_sums_are_outside_of_loops(text: str, mesh: Mesh, seq_length: int) -> None:
    between = set(axes_between_replicas(mesh.shape))
    sums = [c for c in census(text, mesh) if c.kind in ("all-reduce", "reduce-scatter")]
    sums = [c for c in sums if c.axes is None or between & {*c.axes}]
    for found in sums:
        # Results of experts, gradients of keys and values, and of features that are compared, on their way back.
        parts = ("experts/", "core_att", "CLIPModel.loss_sum")
        of_tokens = found.kind == "reduce-scatter" and any(part in found.op_name for part in parts)
        of_tokens |= (
            "core_att" in found.op_name and found.operand_bytes <= 4 * seq_length
        )  # the mask of a text's padding
        if found.loops and not of_tokens:
            assert found.operand_bytes <= STATISTICS * found.arrays, found
    assert sum(c.operand_bytes for c in sums if not c.loops) > 4 * WIDTH**2, "somewhere they have to meet"
