"""Three training steps on every layout of eight devices equal one device's: losses, gradient norms, parameters."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from megajax.models.registry import FAMILIES
from megajax.training.setup import build_program, on_mesh, place_batch

VOCAB, SEQ, BATCH, STEPS = 60, 16, 8, 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that the sizes leave over, up to `devices`, are data parallel."""

    devices: int = 8
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    schedule: str = "1f1b"
    engine: str | None = None
    pipeline: str | None = None
    first: int | None = None
    cp: int = 1
    comm: str = "p2p"
    sizes: tuple[int, int] | None = None
    ep: int = 1
    etp: int | None = None
    zero: int = 1
    copies: int = 1
    mbs: int = 1
    batch: int = BATCH
    layers: int = 4
    model: str = "tied"

    def __str__(self) -> str:
        default = Layout()
        parts = [f"{f.name}{getattr(self, f.name)}" for f in dataclasses.fields(self)]
        changed = [getattr(self, f.name) != getattr(default, f.name) for f in dataclasses.fields(self)]
        return "-".join(part for part, shown in zip(parts, changed, strict=True) if shown) or "dp8"

    @property
    def dp(self) -> int:
        """Data-parallel shards, experts' axis included."""
        return self.devices // (self.tp * self.pp * self.cp)


NEWEST_JAX = [
    Layout(cp=2, tp=2, sp=True),
    Layout(pp=2, cp=2, tp=2, sp=True, model="untied"),
    Layout(pp=2, cp=2, comm="a2a", vpp=2, zero=3),
    Layout(pp=2, tp=2, sp=True, zero=2, engine="table", model="untied"),
    Layout(pp=2, cp=2, comm="a2a", tp=2, sp=True, schedule="zb-h1"),
    Layout(devices=4, pp=2, schedule="gpipe", zero=3, mbs=2),
    Layout(model="experts", ep=2, cp=2),
    Layout(model="experts", ep=2, pp=4, layers=5, pipeline="Et|tt||ttL"),  # some stages run one layer beside none
    Layout(model="experts", ep=8, etp=1, tp=2, cp=2, comm="a2a", sp=True, zero=3),  # experts over dp x cp x tp
    Layout(model="latent", pp=2, tp=2, sp=True, ep=2, first=1),
]
"""Regions of each kind, in others: what a newer JAX breaks first."""
LAYOUTS = [
    *NEWEST_JAX,
    Layout(),
    Layout(zero=0),
    Layout(zero=2),
    Layout(zero=3),
    Layout(zero=2, copies=2),
    Layout(zero=3, copies=4),
    Layout(ep=4, zero=3),
    Layout(devices=4, zero=2, mbs=2, model="untied"),
    Layout(devices=2, tp=2, mbs=4),
    Layout(tp=4, sp=True, model="untied"),  # more shards than key/value heads
    Layout(tp=2, zero=2),
    Layout(tp=2, sp=True, zero=3),
    Layout(devices=2, cp=2),
    Layout(cp=4, comm="a2a"),
    Layout(devices=2, pp=2, mbs=2),
    Layout(cp=4, zero=3),
    Layout(cp=2, comm="all_gather", zero=2, model="untied"),
    Layout(cp=4, comm="a2a+p2p", sizes=(2, 2), model="untied"),
    Layout(cp=2, tp=2, sp=True, zero=3, model="untied"),
    Layout(cp=2, tp=4, sp=True, mbs=2),
    Layout(pp=2, zero=3),
    Layout(pp=4, zero=2, model="untied"),
    Layout(pp=8, layers=8),
    Layout(devices=2, pp=2, batch=6, mbs=2, model="untied"),
    Layout(devices=4, pp=4, layers=5, pipeline="Et|tt||ttL", mbs=2),
    Layout(devices=4, pp=2, tp=2, sp=True, first=1, zero=2, model="untied"),  # computes padding, and drops it
    Layout(devices=2, pp=2, vpp=2, mbs=2),
    Layout(devices=2, pp=2, vpp=2, batch=6, mbs=2, zero=0),  # microbatches that the stages do not divide
    Layout(devices=4, pp=4, vpp=2, layers=8),
    Layout(devices=2, pp=2, vpp=4, layers=8, mbs=2),
    Layout(devices=4, pp=2, tp=2, sp=True, first=1, layers=4),
    Layout(pp=2, tp=2, sp=True, zero=3, model="untied"),
    Layout(pp=2, cp=2, zero=2),
    Layout(pp=2, ep=2, zero=3, copies=2, model="untied"),
    Layout(devices=2, pp=2, vpp=2, engine="table", batch=6, mbs=2),
    Layout(devices=4, pp=4, schedule="zb-h1", zero=0, model="untied"),
    Layout(model="gemma", tp=2, sp=True, zero=3),
    Layout(model="gemma", cp=2, tp=2, sp=True),
    Layout(model="gemma", cp=4, comm="all_gather", zero=2),
    Layout(model="gemma", devices=4, pp=2, tp=2, mbs=2),
    Layout(model="experts", zero=0),
    Layout(model="experts", ep=8),
    Layout(model="experts", ep=4, batch=16),  # two microbatches, whose gradients the devices add up apart
    Layout(model="experts", ep=2, copies=2, batch=16),
    Layout(model="experts", ep=8, etp=1, tp=2, cp=2, comm="a2a", sp=True),  # experts over dp x cp x tp
    Layout(model="experts", ep=2, etp=1, tp=4),  # copies of experts over dp and a part of tp
    Layout(model="experts", ep=4, zero=3),
    Layout(model="experts", ep=2, zero=2, copies=2),
    Layout(model="experts", ep=2, tp=2, sp=True, zero=3),
    Layout(model="experts", ep=2, tp=4, mbs=2),
    Layout(model="experts", ep=2, cp=2, zero=3),
    Layout(model="experts", ep=2, pp=2, tp=2, sp=True),
    Layout(model="experts", devices=4, pp=4, layers=5, pipeline="Et|tt||ttL", mbs=2),
    Layout(model="experts", ep=2, pp=2, vpp=2, engine="table", zero=3),
    Layout(model="latent", ep=2, tp=2, sp=True, zero=3),
    Layout(model="latent", ep=4, zero=2),
    Layout(model="latent", cp=4, comm="all_gather"),
    Layout(model="latent", cp=2, comm="a2a", tp=2, sp=True, zero=3),
    Layout(model="latent", cp=2, comm="a2a", pp=2, tp=2, sp=True),
    Layout(model="latent", pp=2, tp=2, sp=True, zero=3),
]
RARE = [
    Layout(model="experts", ep=2, etp=2, tp=4, mbs=2),  # experts over a part of tp
    Layout(model="experts", ep=2, etp=1, pp=2, tp=2, sp=True, zero=2),  # experts over tp, copies over dp
    Layout(model="experts", ep=2, etp=4, tp=2, sp=True, zero=3),  # an expert over tp and a part of dp
    Layout(model="experts", ep=2, etp=4, tp=2, sp=True, batch=16),
    Layout(model="experts", ep=2, etp=4, devices=8, batch=16),  # and over dp alone
    Layout(model="latent", cp=2, ep=2, comm="a2a", pp=2, first=1),
    Layout(model="latent", devices=4, pp=2, ep=2),
]
"""Run with the slow tests."""

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"position_embedding_type": "learned_absolute", "max_sequence_length": SEQ},
    "untied": {
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "share_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "qk_layernorm": True,
        "recompute_granularity": "selective",
    },
}
MODELS["gemma"] = MODELS["untied"] | {
    "share_embeddings_and_output_weights": True,
    "qk_layernorm": False,
    "activation_func": "gelu_tanh",
    "layernorm_zero_centered_gamma": True,
    "sandwich_norm": True,
    "embedding_multiplier": 32**0.5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "window_size": (5, 0),
    "window_attn_skip_freq": 2,
}
MODELS["experts"] = MODELS["untied"] | {
    "qk_layernorm": False,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss"),
    "moe_aux_loss_coeff": (0.3, 0.2),
    "moe_z_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 24,
}
MODELS["latent"] = MODELS["experts"] | {
    "qk_layernorm": True,
    "num_query_groups": None,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "mtp_num_layers": 1,
}
PACKED = ("untied", "experts", "latent")


def _config(layout: Layout, **model: Any) -> Config:
    architecture: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0} | MODELS[layout.model] | model
    return Config(
        model_family="gpt",
        model=TransformerConfig(
            num_layers=layout.layers,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
            make_vocab_size_divisible_by=64,
            init_method_std=0.3,
            **architecture,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            pipeline_model_parallel_size=layout.pp,
            num_virtual_stages_per_pipeline_rank=layout.vpp,
            pipeline_schedule=layout.schedule,  # type: ignore[arg-type]
            pipeline_engine=layout.engine,  # type: ignore[arg-type]
            pipeline_model_parallel_layout=layout.pipeline,
            decoder_first_pipeline_num_layers=layout.first,
            context_parallel_size=layout.cp,
            cp_comm_type=layout.comm,  # type: ignore[arg-type]
            hierarchical_context_parallel_sizes=layout.sizes,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            zero=layout.zero,  # type: ignore[arg-type]
            num_distributed_optimizer_instances=layout.copies,
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=layout.mbs, global_batch_size=layout.batch),
    )


def _batches(layout: Layout) -> list[dict[str, np.ndarray]]:
    """Rows of two packed documents each (for the untied model), some tokens masked."""
    rng = np.random.default_rng(5)
    batches = []
    for _ in range(STEPS):
        text = rng.integers(VOCAB, size=(layout.batch, SEQ + 1)).astype(np.int32)
        index = np.broadcast_to(np.arange(SEQ, dtype=np.int32), text[:, 1:].shape)
        batch = {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": (rng.random(index.shape) < 0.8).astype(np.float32),
            "position_ids": index,
        }
        if layout.model in PACKED:
            starts = rng.integers(1, SEQ, size=(layout.batch, 1)).astype(np.int32)
            batch["segment_ids"] = (index >= starts).astype(np.int32)
            batch["position_ids"] = np.where(index >= starts, index - starts, index)
        batches.append(batch)
    return batches


def _train(layout: Layout, **model: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], final parameters by path)."""
    program = build_program(_config(layout, **model), FAMILIES["gpt"], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    with on_mesh(program):
        for batch in _batches(layout):
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(program.stages.to_stored(state.params)))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def _one_device(model: str, layers: int, batch: int, dropout: float = 0.0, mbs: int = 2) -> Any:
    layout = Layout(devices=1, model=model, layers=layers, batch=batch, mbs=mbs)
    return _train(layout, hidden_dropout=dropout, attention_dropout=dropout)


def _assert_equal(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        # 1e-7: the bias of keys has no gradient but rounding, since softmax does not see it
        atol = 2e-5 * float(np.abs(value).max()) + 1e-7
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=atol, err_msg=name)


def _marks(layout: Layout) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (layout in RARE) + [pytest.mark.newest_jax] * (layout in NEWEST_JAX)


@pytest.mark.parametrize("layout", [pytest.param(row, marks=_marks(row)) for row in [*LAYOUTS, *RARE]], ids=str)
def test_equals_one_device(layout):
    # The losses of a router belong to a microbatch as a whole, so there the rows of each have to be the same.
    mbs = layout.mbs * layout.dp if layout.model in ("experts", "latent") else 2
    _assert_equal(_train(layout), _one_device(layout.model, layout.layers, layout.batch, mbs=mbs))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout of eight devices that the trainer accepts."""
    sizes = [size for size in itertools.product((1, 2, 4), repeat=3) if math.prod(size) <= 8]
    tp, cp, pp = draw(st.sampled_from(sizes))
    dp = 8 // (tp * cp * pp)
    sp = tp > 1 and draw(st.booleans())
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    schedule = draw(st.sampled_from(["1f1b", "gpipe"] if vpp > 1 else ["1f1b", "gpipe", "zb-h1"])) if pp > 1 else "1f1b"
    engine = draw(st.sampled_from([None, "table"])) if pp > 1 else None
    comms = ["all_gather", *(["a2a"] if tp * cp <= 4 else [])]
    if schedule == "1f1b" and engine is None:
        comms.append("p2p")
    zero = draw(st.sampled_from([0, 1, 2, 3]))
    return Layout(
        tp=tp,
        sp=sp,
        pp=pp,
        vpp=vpp,
        schedule=schedule,
        engine=engine,
        cp=cp,
        comm=draw(st.sampled_from(comms)) if cp > 1 else "p2p",
        zero=zero,
        copies=draw(st.sampled_from([n for n in (1, 2, 4) if dp % n == 0])) if zero else 1,
        mbs=draw(st.sampled_from([n for n in (1, 2) if BATCH % (n * dp) == 0])),
        layers=8 if pp * vpp == 8 else 4,
        model=draw(st.sampled_from(["tied", "untied"])),
    )


@pytest.mark.slow
@settings(max_examples=12, deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts())
def test_any_layout_equals_one_device(layout):
    note(str(layout))
    _assert_equal(_train(layout), _one_device(layout.model, layout.layers, layout.batch))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(devices=2, pp=2, mbs=2),
        Layout(devices=4, pp=2, vpp=2, tp=2, mbs=2),
        Layout(devices=4, pp=4, layers=5, pipeline="Et|tt||ttL", mbs=2),
        Layout(devices=4, tp=2, sp=True),
        Layout(pp=2, cp=2, comm="a2a"),
        Layout(devices=4, cp=2, comm="all_gather", model="untied"),
    ],
    ids=str,
)
def test_dropout_masks_are_those_of_one_device(layout):
    """A microbatch draws its masks from its own key, whichever stage, and whichever chunk, it is on; devices that work
    apart draw their parts of them."""
    wanted = _one_device(layout.model, layout.layers, layout.batch, dropout=0.3)
    assert abs(wanted[0][0, 0] - _one_device(layout.model, layout.layers, layout.batch)[0][0, 0]) > 1e-3
    _assert_equal(_train(layout, hidden_dropout=0.3, attention_dropout=0.3), wanted)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(
    ("recompute", "how"),
    [({}, {}), (FULL, {}), ({}, {"engine": "table"}), pytest.param({}, {"schedule": "zb-h1"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_memory_does_not_grow_with_microbatches(recompute, how):
    """What is held between forward and backward is a ring; all that grows is a weight for each token."""
    counts, sizes = (8, 32, 128), []
    for count in counts:
        layout = Layout(devices=2, pp=2, mbs=1, batch=count, **how)
        model = recompute | ({"recompute_num_layers": 1} if recompute else {})
        program = build_program(_config(layout, **model), FAMILIES["gpt"], devices=jax.devices()[:2])
        [row, *_] = _batches(Layout(batch=1))
        shapes = {name: jax.ShapeDtypeStruct((count, 1, SEQ), array.dtype) for name, array in row.items()}
        with on_mesh(program):
            compiled = program.train_step.lower(program.abstract_state, shapes).compile()  # pyright: ignore
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    bytes_of_a_token = (sizes[-1] - sizes[0]) / (counts[-1] - counts[0]) / SEQ
    activation = 32 * 4  # one hidden state, of which a layer keeps a dozen
    assert bytes_of_a_token <= 2 * 4 < activation / 8, sizes


def test_evaluation_in_a_pipeline_is_that_of_one_device():
    """Several microbatches at once, the last of which only fills up."""
    found = []
    for layout in (Layout(devices=1, mbs=2), Layout(devices=4, pp=2, vpp=2, mbs=1)):
        program = build_program(_config(layout), FAMILIES["gpt"], devices=jax.devices()[: layout.devices])
        batch = _batches(layout)[0]
        batch["loss_mask"][-2:] = 0
        with on_mesh(program):
            placed = place_batch(program, batch, num_microbatches=BATCH // 2)
            found.append([float(x) for x in program.eval_step(program.create_state().params, placed)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
