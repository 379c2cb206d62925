"""Three training steps of hybrids on layouts of eight devices equal one device's: losses, norms, parameters."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.data.tokenizers import build_tokenizer
from megajax.models.registry import FAMILIES
from megajax.ssm.mamba_config import MambaConfig
from megajax.training.setup import build_program, fit_config, on_mesh, place_batch

VOCAB, SEQ, BATCH, STEPS = 60, 32, 8, 3
HYBRID: dict[str, Any] = {"hybrid_override_pattern": "M-M*", "mamba_num_groups": 2}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": HYBRID,
    "one_group": {"mamba_num_groups": 1, "mamba_proj_bias": True, "mamba_d_has_hdim": True},
    "shared_blocks": {
        "hybrid_override_pattern": "MSMS",
        "mamba_num_groups": 2,
        "gated_linear_unit": True,
        "num_shared_blocks": 2,
        "shared_adapter_rank": 8,
        "shared_attention_adapter": True,
        "init_method_std": 0.1,  # there is no residual around a shared block, so larger ones amplify rounding
    },
    "shared_block": {
        "hybrid_override_pattern": "MSMSMSMS",
        "mamba_num_groups": 2,
        "gated_linear_unit": True,
        "shared_adapter_rank": 8,
        "position_embedding_type": "rope",
        "init_method_std": 0.1,
    },
    "hybrid_experts": {
        "hybrid_override_pattern": "MEM*",
        "mamba_num_groups": 4,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 16,
        "moe_aux_loss_coeff": 0.3,
    },
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh of so many devices."""

    model: str = "hybrid"
    devices: int = 8
    tp: int = 1
    sp: bool = False
    pp: int = 1
    cp: int = 1
    comm: str = "p2p"
    sizes: tuple[int, int] | None = None
    ep: int = 1
    zero: int = 1
    vpp: int = 1
    schedule: str = "1f1b"
    engine: str | None = None
    layers: int = 4
    mbs: int = 1

    def __str__(self) -> str:
        default = Layout()
        parts = [f"{f.name}{getattr(self, f.name)}" for f in dataclasses.fields(self)]
        changed = [getattr(self, f.name) != getattr(default, f.name) for f in dataclasses.fields(self)]
        return "-".join(part for part, shown in zip(parts, changed, strict=True) if shown) or "dp8"

    @property
    def dp(self) -> int:
        """Data-parallel shards, experts' axis included."""
        return self.devices // (self.tp * self.pp * self.cp)


SLOW = [
    Layout("hybrid_experts", devices=4, ep=2, cp=2, zero=3),
    Layout("hybrid_experts", devices=4, ep=2, pp=2),
    Layout("hybrid_experts", ep=2, zero=2),
    Layout("shared_blocks", devices=2),
    Layout("shared_blocks", devices=2, zero=2),
    Layout("shared_blocks", devices=2, pp=2, mbs=2),
    Layout("shared_block", devices=2, pp=2, vpp=2, layers=8, engine="table", mbs=2),
    Layout("shared_block", devices=4, pp=2, vpp=2, layers=8),
    Layout("shared_block", devices=4, pp=4, layers=8, schedule="zb-h1"),
    Layout("shared_blocks", pp=2, cp=2, zero=2, mbs=2),
]
NEWEST_JAX = [
    Layout(cp=4, comm="p2p", zero=3),  # a zigzag
    Layout(pp=2, tp=2, sp=True, zero=3, mbs=2),
]
"""What a newer JAX breaks first."""
LAYOUTS = [
    *SLOW,
    *NEWEST_JAX,
    Layout(),
    Layout(tp=2, sp=True, zero=3),
    Layout("one_group", tp=4, sp=True, mbs=4),  # groups that tensor parallelism does not divide
    Layout(zero=2),
    Layout(tp=4, mbs=2),  # two devices a group
    Layout(devices=2, cp=2, comm="all_gather", mbs=2),
    Layout(cp=4, comm="a2a"),
    Layout("one_group", cp=4, comm="a2a+p2p", sizes=(2, 2)),
    Layout(cp=2, tp=2, sp=True, zero=3),
    Layout(devices=4, pp=2, mbs=2),
    Layout(pp=2, cp=2, comm="p2p", mbs=2),
    Layout("one_group", devices=4, pp=4, mbs=2, engine="table"),
    Layout("hybrid_experts", ep=2, tp=2, sp=True, zero=3),
    Layout("shared_blocks", cp=2, tp=2, sp=True, zero=3),
    Layout("shared_blocks", pp=2, tp=2, sp=True, zero=3, mbs=2),  # whose stages have other layers and branch
]


def config_of(layout: Layout) -> Config:
    options: dict[str, Any] = {"init_method_std": 0.3} | MODELS[layout.model]
    return Config(
        model_family="mamba",
        model=MambaConfig(
            num_layers=layout.layers,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
            make_vocab_size_divisible_by=64,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            mamba_state_dim=4,
            mamba_head_dim=8,
            mamba_chunk_size=4,
            **options,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            pipeline_model_parallel_size=layout.pp,
            num_virtual_stages_per_pipeline_rank=layout.vpp,
            pipeline_schedule=layout.schedule,  # type: ignore[arg-type]
            pipeline_engine=layout.engine,  # type: ignore[arg-type]
            context_parallel_size=layout.cp,
            cp_comm_type=layout.comm,  # type: ignore[arg-type]
            hierarchical_context_parallel_sizes=layout.sizes,
            expert_model_parallel_size=layout.ep,
            zero=layout.zero,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=layout.mbs, global_batch_size=BATCH),
    )


def batches() -> list[dict[str, np.ndarray]]:
    """Rows of two packed documents each, some tokens masked."""
    rng = np.random.default_rng(5)
    index = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (BATCH, SEQ))
    found = []
    for _ in range(STEPS):
        text = rng.integers(VOCAB, size=(BATCH, SEQ + 1)).astype(np.int32)
        starts = rng.integers(1, SEQ, size=(BATCH, 1)).astype(np.int32)
        found.append(
            {
                "tokens": text[:, :-1],
                "labels": text[:, 1:],
                "loss_mask": (rng.random(index.shape) < 0.8).astype(np.float32),
                "position_ids": np.where(index >= starts, index - starts, index),
                "segment_ids": (index >= starts).astype(np.int32),
            }
        )
    return found


def train(layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], final parameters by path)."""
    program = build_program(config_of(layout), FAMILIES["mamba"], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    with on_mesh(program):
        for batch in batches():
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(program.stages.to_stored(state.params)))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def one_device(model: str, layers: int, mbs: int) -> Any:
    return train(Layout(model, devices=1, layers=layers, mbs=mbs))


def marks(layout: Layout) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (layout in SLOW) + [pytest.mark.newest_jax] * (layout in NEWEST_JAX)


@pytest.mark.parametrize("layout", [pytest.param(row, marks=marks(row)) for row in LAYOUTS], ids=str)
def test_equals_one_device(layout):
    # The losses of a router belong to a microbatch as a whole, so there the rows of each have to be the same.
    wanted = one_device(layout.model, layout.layers, layout.mbs * layout.dp if layout.model == "hybrid_experts" else 2)
    found = train(layout)
    np.testing.assert_allclose(found[0], wanted[0], rtol=3e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        atol = 3e-5 * float(np.abs(value).max()) + 1e-7
        np.testing.assert_allclose(found[1][name], value, rtol=3e-5, atol=atol, err_msg=name)


def test_heads_that_the_mesh_cannot_divide_are_refused():
    config = config_of(Layout(tp=8, devices=8))
    model = config.model.replace(num_attention_heads=8, num_query_groups=8, mamba_num_heads=4, vocab_size=None)
    tokenizer = build_tokenizer("byte")
    with pytest.raises(ConfigError) as caught:
        fit_config(dataclasses.replace(config, model=model), FAMILIES["mamba"], tokenizer)
    assert str(caught.value).startswith("mamba_num_heads=4 is not divisible by tensor_model_parallel_size=8")


def test_a_part_shorter_than_the_convolution_is_refused():
    program = build_program(config_of(Layout(cp=8)), FAMILIES["mamba"])
    placed = place_batch(program, batches()[0], num_microbatches=program.batches.at(0).num_microbatches)
    with on_mesh(program), pytest.raises(ConfigError, match=r"the 2 tokens .* are fewer than the 3"):
        program.train_step.lower(program.abstract_state, placed)  # pyright: ignore
