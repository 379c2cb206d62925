"""Three training steps of encoders, and of encoders with decoders, on every layout, equal one device's."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.models.bert.bert_config import BertConfig
from megajax.models.registry import FAMILIES
from megajax.models.t5.t5_config import T5Config
from megajax.training.setup import build_program, on_mesh, place_batch

BATCH, STEPS, VOCAB, TEXT, WRITTEN = 8, 3, 60, 16, 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that tensor and context parallelism leave over, up to `devices`, are data parallel."""

    devices: int = 4
    tp: int = 1
    cp: int = 1
    comm: str = "p2p"
    sp: bool = False
    zero: int = 1

    def __str__(self) -> str:
        cp = f"-cp{self.cp}-{self.comm}" if self.cp > 1 else ""
        return f"{self.devices}dev-tp{self.tp}{cp}{'-sp' * self.sp}-zero{self.zero}"


_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "init_method_std": 0.3,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 64,
    "max_sequence_length": TEXT,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MODELS: dict[str, Any] = {
    "bert": BertConfig(**_SIZES),
    "bert_untied": BertConfig(
        **_SIZES, share_embeddings_and_output_weights=False, position_embedding_type="rope",
        apply_residual_connection_post_layernorm=True,
    ),
    "t5": T5Config(**_SIZES, encoder_num_layers=1, decoder_seq_length=WRITTEN),
    "t5_untied": T5Config(
        **_SIZES, share_embeddings_and_output_weights=False, position_embedding_type="learned_absolute",
        gated_linear_unit=True, normalization="RMSNorm", decoder_seq_length=WRITTEN,
    ),
}  # fmt: skip
LAYOUTS = [Layout(), Layout(zero=3), Layout(devices=2, tp=2), Layout(devices=2, tp=2, sp=True)]
DIVIDED = [
    Layout(devices=2, cp=2),
    Layout(devices=4, cp=2, tp=2, comm="all_gather"),
    Layout(devices=2, cp=2, comm="a2a"),
]
ALL_AT_ONCE = Layout(tp=2, sp=True, zero=3)
CASES = [
    *(pytest.param(model, ALL_AT_ONCE) for model in ("bert", "t5")),
    *(pytest.param(model, ALL_AT_ONCE, marks=pytest.mark.slow) for model in ("bert_untied", "t5_untied")),
    *(pytest.param(model, layout, marks=pytest.mark.slow) for model in MODELS for layout in LAYOUTS),
    pytest.param("bert", DIVIDED[0], marks=pytest.mark.slow),
    *(pytest.param("bert_untied", layout, marks=pytest.mark.slow) for layout in DIVIDED),
]


def _config(model: str, layout: Layout) -> Config:
    return Config(
        model_family=model.split("_")[0],
        model=MODELS[model],
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            cp_comm_type=layout.comm,  # type: ignore[arg-type]
            sequence_parallel=layout.sp,
            zero=layout.zero,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=TEXT),
        train=TrainConfig(
            micro_batch_size=BATCH // (layout.devices // layout.tp // layout.cp), global_batch_size=BATCH
        ),
    )


def _batches(model: str) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(VOCAB, size=(BATCH, length)).astype(np.int32)

    def kept(length: int) -> np.ndarray:
        return np.arange(length) < rng.integers(length // 2, length + 1, size=(BATCH, 1))

    batches = []
    for _ in range(STEPS):
        if model.startswith("bert"):
            batch: dict[str, Any] = {
                "tokens": tokens(TEXT),
                "labels": np.where(rng.random((BATCH, TEXT)) < 0.3, tokens(TEXT), -1).astype(np.int32),
                "tokentype_ids": rng.integers(2, size=(BATCH, TEXT)).astype(np.int32),
                "position_ids": np.tile(np.arange(TEXT, dtype=np.int32), (BATCH, 1)),
                "attention_mask": kept(TEXT),
                "is_random": rng.integers(-1, 2, size=BATCH).astype(np.int32),
            }
        else:
            batch = {"encoder_input": tokens(TEXT), "encoder_mask": kept(TEXT), "decoder_input": tokens(WRITTEN)}
            batch |= {"decoder_mask": kept(WRITTEN), "labels": tokens(WRITTEN)}
        seen = batch["attention_mask" if model.startswith("bert") else "decoder_mask"]
        batch["loss_mask"] = ((batch["labels"] >= 0) & seen).astype(np.float32)
        batches.append(batch)
    return batches


def _train(model: str, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], parameters afterwards by path)."""
    config = _config(model, layout)
    program = build_program(config, FAMILIES[config.model_family], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    with on_mesh(program):
        for batch in _batches(model):
            state, metrics = program.train_step(state, place_batch(program, batch, num_microbatches=1))
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def _one_device(model: str) -> Any:
    return _train(model, Layout(devices=1))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_equals_one_device(model: str, layout: Layout) -> None:
    found, wanted = _train(model, layout), _one_device(model)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        atol = 2e-5 * float(np.abs(value).max()) + 1e-6
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=atol, err_msg=name)
