"""Training in fp8 on simulated devices: every layout computes the same, a resumed run goes on with the same bits."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax import cli
from megajax.backends import LocalSpecProvider, TESpecProvider
from megajax.checkpoint import CheckpointStore
from megajax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    KernelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TransformerConfig,
)
from megajax.models.registry import FAMILIES
from megajax.parallel.gradient_sums import FP8_META
from megajax.ssm.mamba_config import MambaConfig
from megajax.training import blueprint
from megajax.training.setup import Program, build_program, on_mesh, place_batch

VOCAB, SEQ, BATCH, STEPS = 64, 16, 8, 3
DELAYED = KernelConfig(
    fp8_format="hybrid", fp8_recipe="delayed", fp8_amax_history_len=3, fp8_amax_compute_algo="max", fp8_margin=1
)
MXFP8 = KernelConfig(fp8_format="hybrid", fp8_recipe="mxfp8")
BLOCKWISE = KernelConfig(fp8_format="e4m3", fp8_recipe="blockwise")
TENSORWISE = KernelConfig(fp8_format="hybrid", fp8_recipe="tensorwise")


@pytest.fixture(autouse=True)
def fp8_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA computes the same products on a CPU; nobody would want it, so that only a test can ask for it."""

    def choose(config: Config, mesh: Any) -> Any:
        del mesh
        parallel = config.parallel
        local = LocalSpecProvider(cp_comm_type=parallel.cp_comm_type, zigzag=parallel.zigzag)
        return TESpecProvider(local=local, gpu=None, fp8=config.kernels.fp8)

    monkeypatch.setattr(blueprint, "choose_backend", choose)


def config_of(
    kernels: KernelConfig, *, mbs: int = 2, seq: int = SEQ, model: Any = None, adam: bool = False, **parallel: Any
) -> Config:
    optimizer = (
        OptimizerConfig(lr=0.01, weight_decay=0.5)
        if adam
        else OptimizerConfig(optimizer="sgd", lr=0.05, weight_decay=0.5)
    )
    architecture: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 64,
        "position_embedding_type": "rope",
        "init_method_std": 0.3,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    architecture |= model or {}
    hybrid = "hybrid_override_pattern" in architecture
    return Config(
        model_family="mamba" if hybrid else "gpt",
        model=MambaConfig(**architecture) if hybrid else TransformerConfig(**architecture),
        parallel=ParallelConfig(**parallel),
        kernels=kernels,
        optimizer=dataclasses.replace(optimizer, lr_decay_style="constant"),
        data=DataConfig(seq_length=seq),
        train=TrainConfig(micro_batch_size=mbs, global_batch_size=BATCH),
    )


def batches(seq: int = SEQ) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    made = []
    for _ in range(STEPS):
        text = rng.integers(VOCAB, size=(BATCH, seq + 1)).astype(np.int32)
        index = np.broadcast_to(np.arange(seq, dtype=np.int32), text[:, 1:].shape)
        mask = (rng.random(index.shape) < 0.8).astype(np.float32)
        made.append({"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": index})
    return made


def steps(program: Program, state: Any, data: list[dict[str, np.ndarray]]) -> tuple[Any, np.ndarray]:
    """(state after them, [steps, 2] of losses and gradient norms)."""
    seen = []
    with on_mesh(program):
        for batch in data:
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return state, np.array(seen)


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def train(config: Config, devices: int = 8) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms, final parameters by path)."""
    program = build_program(config, FAMILIES[config.model_family], devices=jax.devices()[:devices])
    state, seen = steps(program, program.create_state(), batches(config.data.seq_length))
    return seen, named(program.stages.to_stored(state.params))


SIZES: dict[str, Any] = {
    "delayed": {},
    "tensorwise": {},
    "mxfp8": {"hidden_size": 64, "ffn_hidden_size": 128},
    "blockwise": {"num_layers": 2, "hidden_size": 128, "kv_channels": 64, "ffn_hidden_size": 256},
}
"""Of models. For mxfp8 widths on a device are multiples of 32, for blockwise whole blocks of 128."""
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": EXPERTS,
    "wide experts": EXPERTS | {"moe_ffn_hidden_size": 256},
    "one layer of them": EXPERTS | {"moe_ffn_hidden_size": 256, "num_layers": 1},
    "ends": {"first_last_layers_bf16": True},
    "shared": {
        "hybrid_override_pattern": "SS",
        "num_layers": 2,
        "gated_linear_unit": True,
        "shared_adapter_rank": 8,
        "mamba_state_dim": 4,
        "mamba_head_dim": 8,
        "mamba_num_groups": 1,
        "mamba_chunk_size": 4,
        "init_method_std": 0.1,
    },
}


def train_exactly(
    kernels: KernelConfig, mbs: int, model: str = "dense", seq: int = SEQ, devices: int = 1, **parallel: Any
) -> Any:
    changes = SIZES[kernels.fp8_recipe] | MODELS[model] | {"params_dtype": "float64"}
    return train(config_of(kernels, mbs=mbs, seq=seq, model=changes, **parallel), devices)


one_device = functools.cache(train_exactly)


def dp_of(layout: dict[str, Any]) -> int:
    model_parallel = [size for name, size in layout.items() if name.endswith("parallel_size") and name[:6] != "expert"]
    return layout["devices"] // math.prod(model_parallel)


SP = "sequence_parallel"
DP4 = {"devices": 4, "mbs": 1, "zero": 0}  # replicas that add up their own gradients
SP2 = {"devices": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "mbs": 4}
PP2 = {"devices": 4, "pipeline_model_parallel_size": 2, "mbs": 1}
MEET = {"devices": 2, "model": "one layer of them", "expert_model_parallel_size": 2, "mbs": 4, "seq": 32}
MEET_TP2 = MEET | {"devices": 4, "tensor_model_parallel_size": 2}
EP2 = {"devices": 4, "model": "experts", "expert_model_parallel_size": 2, "mbs": 1}
LAYOUTS: list[tuple[KernelConfig, dict[str, Any]]] = [
    (DELAYED, DP4),
    (DELAYED, SP2),
    (DELAYED, PP2),
    (DELAYED, {"devices": 8, "mbs": 2, "tensor_model_parallel_size": 2, "context_parallel_size": 2, "zero": 2}),
    (DELAYED, {"devices": 2, "mbs": 2, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    (DELAYED, {"devices": 2, "mbs": 2, "pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}),
    (DELAYED, {"devices": 4, "mbs": 2, "pipeline_model_parallel_size": 4, "pipeline_schedule": "zb-h1"}),
    (DELAYED, {"devices": 4, "mbs": 1, "pipeline_model_parallel_size": 2, "pipeline_engine": "table"}),
    (DELAYED, EP2 | {"zero": 0}),
    (DELAYED, EP2 | {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero": 3, "mbs": 2}),
    (DELAYED, EP2 | {"pipeline_model_parallel_size": 2, "pipeline_engine": "table"}),
    (TENSORWISE, DP4),
    (TENSORWISE, {"devices": 4, "mbs": 1, "zero": 3}),
    (TENSORWISE, PP2 | {"model": "ends"}),
    (MXFP8, {"devices": 4, "mbs": 2, "zero": 3}),
    (MXFP8, {"devices": 4, "mbs": 2, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    (MXFP8, {"devices": 2, "context_parallel_size": 2, "mbs": 4}),
    (BLOCKWISE, {"devices": 4, "mbs": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True, "zero": 3}),
    (BLOCKWISE, MEET_TP2),
]
SLOW_LAYOUTS: list[tuple[KernelConfig, dict[str, Any]]] = [
    (MXFP8, {"devices": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True, "mbs": 2}),
    (BLOCKWISE, SP2 | {"devices": 4, "model": "wide experts", "pipeline_model_parallel_size": 2}),
    (MXFP8, MEET),
    (MXFP8, MEET_TP2),
    (BLOCKWISE, MEET),
    (MXFP8, MEET_TP2 | {SP: True}),
    (BLOCKWISE, MEET_TP2 | {SP: True}),
]


@pytest.mark.usefixtures("sums_of_53_bits")
@pytest.mark.parametrize(
    ("kernels", "layout"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
    ids=[
        "-".join([kernels.fp8_recipe, *(f"{k}{v}" for k, v in layout.items())])
        for kernels, layout in LAYOUTS + SLOW_LAYOUTS
    ],
)
def test_every_layout_computes_the_same(kernels: KernelConfig, layout: dict[str, Any]) -> None:
    found = train_exactly(kernels, **layout)
    # With delayed scaling microbatches change nothing. Otherwise the tensors are those of one, with the same samples.
    mbs = BATCH if kernels is DELAYED else layout["mbs"] * dp_of(layout)
    seq = layout.get("seq", SEQ)
    wanted = one_device(kernels, mbs, layout.get("model", "dense"), seq)
    # Blocks along tokens hold others where a mesh divides them: by powers of two of other sizes, so that other numbers
    # are too small for them. Experts read the rows that meet on a device as sequence parallelism hands them over.
    block = {"mxfp8": 32, "blockwise": 128}.get(kernels.fp8_recipe, 1)
    cut = dp_of(layout) > 1 and layout["mbs"] * seq % block > 0
    cut |= block > 1 and ("context_parallel_size" in layout or {*layout} >= {"expert_model_parallel_size", SP})
    rtol = 1e-7 if cut else 1e-12
    assert_alike(found, wanted, rtol)
    assert any(name.endswith(FP8_META) for name in wanted[1]) == (kernels is DELAYED)


def assert_alike(found: Any, wanted: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=rtol)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        atol = 10 * rtol * np.abs(value).max()
        np.testing.assert_allclose(found[1][name], value, rtol=10 * rtol, atol=atol, err_msg=name)


@pytest.mark.usefixtures("sums_of_53_bits")
@pytest.mark.parametrize(
    "layout",
    [
        {"devices": 2, "zero": 0},
        pytest.param({"devices": 4, "pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["dp2", "dp2-pp2"],
)
def test_layers_that_share_a_block_have_scales_of_their_own(layout: dict[str, Any]) -> None:
    wanted = one_device(DELAYED, BATCH, "shared")
    assert_alike(train_exactly(DELAYED, 2, "shared", **layout), wanted)
    [meta] = [value for name, value in wanted[1].items() if name.endswith("self_attention/linear_q/fp8_meta")]
    inputs, kernels, gradients = meta[:, :, 1:].swapaxes(0, 1)
    np.testing.assert_array_equal(kernels[0], kernels[1])  # of one kernel, in three steps
    assert not np.isclose(inputs[0], inputs[1], rtol=1e-3).any()
    assert not np.isclose(gradients[0], gradients[1], rtol=1e-3).any()


def test_the_state_of_delayed_scaling() -> None:
    """One entry a step, the newest first, of what each tensor held; no optimizer sees it, evaluation leaves it be."""
    program = build_program(config_of(DELAYED, model=EXPERTS), FAMILIES["gpt"], devices=jax.devices()[:1])
    state = program.create_state()
    assert not any(FP8_META in name for name in named(state.opt_state))
    history, norms = [named(state.params)], []
    for batch in batches():
        state, seen = steps(program, state, [batch])
        history.append(named(state.params))
        norms.append(seen[0, 1])
    for linear, shape in (("self_attention/linear_q", (4,)), ("mlp/experts/linear_fc1", (4, 4))):
        kernels, metas = (
            [params[f"decoder/layers/{linear}/{leaf}"] for params in history] for leaf in ("kernel", FP8_META)
        )
        assert metas[0].shape == (*shape, 3, 1 + 3)
        np.testing.assert_array_equal(metas[0], 0)
        for step, (before, after) in enumerate(itertools.pairwise(metas)):
            np.testing.assert_array_equal(after[..., 2:], before[..., 1:3])
            np.testing.assert_array_equal(after[..., 1, 1], np.abs(kernels[step]).max(axis=(-2, -1)))
            for row, largest in enumerate((448, 448, 57344)):  # margin 1; the largest of all three steps
                scale = after[..., row, 1:].max(axis=-1) / np.float32(largest) * 2
                np.testing.assert_allclose(after[..., row, 0], scale, rtol=1e-6)
    assert max(norms) < 100  # of gradients alone: inputs of layers have magnitudes beyond it, were they all added up
    with on_mesh(program):
        placed = place_batch(program, batches()[0], num_microbatches=4)
        loss = program.eval_step(state.params, placed)[0]
    assert np.isfinite(float(loss))


def test_a_skipped_step_leaves_the_scales_alone() -> None:
    config = config_of(DELAYED)
    program = build_program(config, FAMILIES["gpt"], devices=jax.devices()[:1])
    state, _ = steps(program, program.create_state(), batches()[:1])
    broken = jax.tree.map(jnp.copy, state)
    broken.params["embedding"]["word_embeddings"]["embedding"] *= np.nan
    before = named(broken.params)
    after, _ = steps(program, broken, batches()[1:2])
    for name, value in named(after.params).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def store(config: Config, program: Program, folder: Path) -> CheckpointStore:
    return CheckpointStore.open(
        folder,
        CheckpointConfig(async_save=False),
        family="gpt",
        model_config=cli.to_json(config)["model"],
        logical_axes=program.axes,
    )


def restored(config: Config, folder: Path, devices: int) -> tuple[Program, Any]:
    program = build_program(config, FAMILIES["gpt"], devices=jax.devices()[:devices])
    with store(config, program, folder) as place:
        stored, _ = place.restore(program.stages.abstract_stored(program.abstract_state))
    return program, program.stages.from_stored(stored, program.abstract_state)


def test_resumes_with_the_same_bits_and_on_another_mesh(tmp_path: Path) -> None:
    config = config_of(DELAYED, model=EXPERTS)
    program = build_program(config, FAMILIES["gpt"], devices=jax.devices()[:1])
    state, _ = steps(program, program.create_state(), batches()[:2])
    with store(config, program, tmp_path) as place:
        place.save(2, program.stages.to_stored(state), {})
    saved, (uninterrupted, _) = named(state.params), steps(program, state, batches()[2:])
    resumed, _ = steps(*restored(config, tmp_path, 1), batches()[2:])
    for name, value in named(uninterrupted).items():
        np.testing.assert_array_equal(named(resumed)[name], value, err_msg=name)

    parallel: dict[str, Any] = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    staged = config_of(DELAYED, model=EXPERTS, decoder_first_pipeline_num_layers=1, **parallel)
    program, elsewhere = restored(staged, tmp_path, 4)
    for name, value in named(program.stages.to_stored(elsewhere.params)).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)

    # A run that does not compute in fp8 takes the rest, and what it saves begins without scales.
    plain = config_of(KernelConfig(), model=EXPERTS)
    program, without = restored(plain, tmp_path, 1)
    assert not any(FP8_META in name for name in named(without))
    with store(plain, program, tmp_path / "plain") as place:
        place.save(2, program.stages.to_stored(without), {})
    _, again = restored(config, tmp_path / "plain", 1)
    for name, value in named(again.params).items():
        np.testing.assert_array_equal(value, 0 if FP8_META in name else saved[name], err_msg=name)


@pytest.mark.parametrize(
    ("kernels", "model"), [(TENSORWISE, "dense"), (DELAYED, "experts"), (MXFP8, "experts"), (BLOCKWISE, "dense")]
)
def test_learns_as_well_as_without(kernels: KernelConfig, model: str) -> None:
    """Of the same batch seen again and again; delayed scaling begins with scales of 1."""
    losses = {}
    for name, wanted in (("fp8", kernels), ("fp32", KernelConfig())):
        config = config_of(wanted, mbs=8, adam=True, model=MODELS[model] | {"init_method_std": 0.05})
        program = build_program(config, FAMILIES["gpt"], devices=jax.devices()[:1])
        _, seen = steps(program, program.create_state(), batches()[:1] * 20)
        losses[name] = seen[:, 0]
    assert losses["fp32"][-1] < 0.6 * losses["fp32"][0]
    np.testing.assert_allclose(losses["fp8"], losses["fp32"], atol=0.15, rtol=0)  # nats
