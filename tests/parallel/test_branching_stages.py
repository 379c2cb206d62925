"""Stages that compute different things: no permute, to which all of them would have to come, is in a branch of one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import absent_gpus
from megajax.parallel.hlo import Instruction, computations_of
from megajax.parallel.one_stage import ON_LAST_STAGE
from megajax.ssm.mamba_config import MambaConfig
from megajax.training.setup import build_program, on_mesh
from megajax.transformer.block import rows_of

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
EXPERTS: dict[str, Any] = SIZES | {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss"),
    "moe_aux_loss_coeff": (0.3, 0.2),
    "moe_z_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 24,
}
LATENT: dict[str, Any] = EXPERTS | {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 16,
    "mtp_num_layers": 1,
}
SHARED: dict[str, Any] = SIZES | {
    "num_layers": 3,
    "hybrid_override_pattern": "SMS",
    "shared_adapter_rank": 8,
    "mamba_state_dim": 4,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_chunk_size": 4,
}
"""Of a hybrid."""
TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ULYSSES: dict[str, Any] = {"context_parallel_size": 2, "cp_comm_type": "a2a"}
CASES = [
    pytest.param(SIZES | {"add_bias_linear": True, "normalization": "LayerNorm"}, TENSOR, id="dense-tp2"),
    pytest.param(SIZES, TENSOR | ULYSSES, id="dense-tp2-a2a2"),
    pytest.param(SHARED, TENSOR, id="shared_block-tp2"),
    # Its program is in those of the two that follow.
    pytest.param(EXPERTS, TENSOR | {"expert_model_parallel_size": 2}, id="experts-tp2-ep2", marks=pytest.mark.slow),
    pytest.param(
        EXPERTS | {"add_bias_linear": True}, TENSOR | {"expert_model_parallel_size": 2}, id="biased_experts-tp2-ep2"
    ),
    pytest.param(LATENT, TENSOR | {"expert_model_parallel_size": 2}, id="latent-tp2-ep2"),
    pytest.param(
        LATENT,
        TENSOR | {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
        id="latent-tp2-ep4-etp1",
    ),
]
BATCH, SEQ, MICROBATCHES = 4, 16, 2


def _compiled(model: dict[str, Any], parallel: dict[str, Any], devices: list[Any]) -> Any:
    """A training step of two stages, of one layer and of all others."""
    family, kind = ("mamba", MambaConfig) if model is SHARED else ("gpt", TransformerConfig)
    config = Config(
        model_family=family,
        model=kind(**model),
        parallel=ParallelConfig(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1, **parallel),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=1, global_batch_size=BATCH * MICROBATCHES),
    )
    program = build_program(config, FAMILIES[family], devices=devices)
    count = program.batches.at(0).num_microbatches
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    shape = (count, BATCH * MICROBATCHES // count, SEQ)
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    with on_mesh(program):
        return program.train_step.lower(program.abstract_state, batch).compile()  # pyright: ignore


def _within(computations: Mapping[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for instruction in computations[name]:
        yield instruction
        for callee in instruction.called:
            yield from _within(computations, callee)


def _assert_no_permute_in_a_branch(compiled: Any, *, of_last_stage: bool) -> None:
    computations, entry = computations_of(compiled.as_text())
    rows = rows_of("layers")  # or, where there are several stacks, a name that begins so
    found: dict[str, list[Instruction]] = {rows: [], ON_LAST_STAGE: []}
    for instruction in _within(computations, entry):
        if instruction.opcode == "conditional":
            scopes = instruction.op_name.split("/")
            for name, taken in found.items():
                if any(scope.startswith(name) for scope in scopes):
                    taken.append(instruction)
    assert found[rows], "the rows that pad a stage are in no branch"
    assert bool(found[ON_LAST_STAGE]) == of_last_stage
    collectives = 0
    for branch in (callee for each in found.values() for taken in each for callee in taken.called):
        for instruction in _within(computations, branch):
            assert not instruction.opcode.startswith("collective-permute"), instruction.op_name
            collectives += instruction.opcode.startswith(("all-gather", "reduce-scatter", "all-reduce"))
    assert collectives, "tensor parallelism's collectives belong in the branches"


@pytest.mark.parametrize(("model", "parallel"), CASES)
def test_on_simulated_devices(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    _assert_no_permute_in_a_branch(_compiled(model, parallel, jax.devices()), of_last_stage=model is LATENT)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        *CASES[-1:],
        *(pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in CASES[:-1]),
    ],
)
def test_on_h100(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    _assert_no_permute_in_a_branch(_compiled(model, parallel, absent_gpus(8)), of_last_stage=model is LATENT)
