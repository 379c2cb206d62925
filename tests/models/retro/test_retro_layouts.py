"""Three training steps of RETRO on every layout equal one device's."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.models.registry import FAMILIES
from megajax.models.retro.config import RetroConfig
from megajax.training.setup import build_program, on_mesh, place_batch

BATCH, STEPS, VOCAB, LENGTH = 8, 3, 60, 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that tensor parallelism leaves over, up to `devices`, are data parallel."""

    devices: int = 4
    tp: int = 1
    sp: bool = False
    zero: int = 1
    microbatches: int = 1

    def __str__(self) -> str:
        several = f"-{self.microbatches}microbatches" * (self.microbatches > 1)
        return f"{self.devices}dev-tp{self.tp}{'-sp' * self.sp}-zero{self.zero}{several}"


_SIZES: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "init_method_std": 0.2,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": 64,
    "max_sequence_length": LENGTH,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
}
_NINE: dict[str, Any] = _SIZES | {"num_layers": 9}
MODELS: dict[str, RetroConfig] = {
    "retro": RetroConfig(**_SIZES, retro_chunk_length=4),
    # Neither a chunk nor a neighbour divides by two, and the first chunk is short.
    "retro_odd": RetroConfig(
        **_NINE,
        share_embeddings_and_output_weights=False, normalization="RMSNorm", gated_linear_unit=True,
        post_layer_norm=True, retro_chunk_length=5, retro_num_neighbors=1, retro_num_retrieved_chunks=1,
        retro_encoder_num_layers=1,
    ),
    # As the default: places of text and neighbours on one line. The first chunk is short.
    "retro_relative": RetroConfig(
        **_SIZES, retro_chunk_length=6, retro_encoder_num_layers=1, position_embedding_type="rope",
        retro_encoder_rotary=True, retro_cross_attention_rotary=True,
    ),
}  # fmt: skip
LAYOUTS = [
    Layout(devices=2),
    Layout(zero=2),
    Layout(zero=3),
    Layout(devices=2, tp=2),
    Layout(devices=2, tp=2, sp=True),
    Layout(tp=2),
    Layout(tp=2, zero=2),
    Layout(tp=2, sp=True),
]
ALL_AT_ONCE = Layout(tp=2, sp=True, zero=3)
APART = Layout(tp=2, sp=True, microbatches=2)
"""Whose gradients the devices add up apart."""
CASES = [
    pytest.param("retro", ALL_AT_ONCE),
    pytest.param("retro_relative", APART),
    *(pytest.param(model, ALL_AT_ONCE, marks=pytest.mark.slow) for model in ("retro_odd", "retro_relative")),
    *(pytest.param(model, APART, marks=pytest.mark.slow) for model in ("retro", "retro_odd")),
    *(pytest.param(model, layout, marks=pytest.mark.slow) for model in MODELS for layout in LAYOUTS),
]


def _config(model: str, layout: Layout) -> Config:
    return Config(
        model_family="retro",
        model=MODELS[model],
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            zero=layout.zero,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(
            micro_batch_size=BATCH // layout.microbatches // (layout.devices // layout.tp), global_batch_size=BATCH
        ),
    )


def _batches(config: RetroConfig) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    chunks = -(-LENGTH // config.retro_chunk_length)
    neighbors = (BATCH, chunks, config.retro_num_neighbors, config.retro_retrieved_length)

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(VOCAB, size=shape).astype(np.int32)

    return [
        {
            "tokens": tokens(BATCH, LENGTH),
            "labels": tokens(BATCH, LENGTH),
            "context_tokens": tokens(*neighbors),
            "position_ids": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
            "loss_mask": (rng.random((BATCH, LENGTH)) < 0.8).astype(np.float32),
        }
        for _ in range(STEPS)
    ]


def _train(model: str, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], parameters afterwards by path)."""
    config = _config(model, layout)
    program = build_program(config, FAMILIES["retro"], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    with on_mesh(program):
        for batch in _batches(MODELS[model]):
            placed = place_batch(program, batch, num_microbatches=layout.microbatches)
            state, metrics = program.train_step(state, placed)
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
