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
    """Devices that the sizes leave over, up to `devices`, are data parallel. mbs: None for one microbatch. layers: of
    the last stack, the one before has half as many; None is what the model has."""

    devices: int = 4
    tp: int = 1
    cp: int = 1
    comm: str = "p2p"
    sp: bool = False
    zero: int = 1
    pp: int = 1
    vpp: int = 1
    engine: str | None = None
    schedule: str = "1f1b"
    first: int | None = None
    mbs: int | None = None
    batch: int = BATCH
    layers: int | None = None

    def __str__(self) -> str:
        default = Layout()
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "-".join(f"{k}{v}" for k, v in parts.items() if v != getattr(default, k)) or "dp4"

    @property
    def dp(self) -> int:
        """Data-parallel shards."""
        return self.devices // (self.tp * self.cp * self.pp)

    @property
    def micro_batch_size(self) -> int:
        """Of one shard."""
        return self.mbs or self.batch // self.dp


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
_TAMER: dict[str, Any] = _SIZES | {"init_method_std": 0.15}
"""With 0.3 the gradients of eight layers double each step, and rounding with them."""
MODELS: dict[str, Any] = {
    "bert": BertConfig(**_SIZES),
    "bert_untied": BertConfig(
        **_SIZES, share_embeddings_and_output_weights=False, position_embedding_type="rope",
        apply_residual_connection_post_layernorm=True,
    ),
    "t5": T5Config(**_SIZES, encoder_num_layers=1, decoder_seq_length=WRITTEN),
    "t5_untied": T5Config(
        **_TAMER,
        share_embeddings_and_output_weights=False, position_embedding_type="learned_absolute",
        gated_linear_unit=True, normalization="RMSNorm", decoder_seq_length=WRITTEN,
    ),
}  # fmt: skip
LAYOUTS = [Layout(), Layout(zero=2), Layout(zero=3), Layout(devices=2, tp=2), Layout(devices=2, tp=2, sp=True)]
DIVIDED = [
    Layout(devices=2, cp=2),
    Layout(devices=4, cp=2, tp=2, comm="all_gather"),
    Layout(devices=2, cp=2, comm="a2a"),
]
STAGED = [
    Layout(devices=2, pp=2, mbs=2, layers=4, zero=0),
    Layout(pp=2, mbs=1, layers=4, zero=2),
    Layout(devices=2, pp=2, vpp=2, mbs=2, batch=6, layers=8),  # microbatches that the stages do not divide
    Layout(devices=8, pp=4, tp=2, sp=True, mbs=2, layers=8),
    Layout(devices=2, pp=2, mbs=2, layers=4, engine="table"),
]
ALONE = [
    Layout(devices=2, pp=2, first=1, mbs=2, layers=4),
    Layout(devices=2, pp=2, schedule="zb-h1", mbs=2, layers=4),
    Layout(devices=4, pp=2, cp=2, mbs=2, layers=4),
]
"""Only for one stack of layers."""
ALL_AT_ONCE = Layout(tp=2, sp=True, zero=3)
APART = Layout(tp=2, mbs=2)
"""Two microbatches, whose gradients the devices add up apart."""
ALL_AND_STAGES = Layout(devices=8, pp=2, tp=2, sp=True, zero=3, mbs=1, layers=4)
CASES = [
    *(pytest.param(model, ALL_AND_STAGES) for model in ("bert", "t5")),
    *(pytest.param(model, ALL_AND_STAGES, marks=pytest.mark.slow) for model in ("bert_untied", "t5_untied")),
    *(
        pytest.param(model, layout, marks=pytest.mark.slow)
        for model in ("bert", "t5", "t5_untied")
        for layout in STAGED
    ),
    *(pytest.param("bert", layout, marks=pytest.mark.slow) for layout in ALONE),
    *(pytest.param(model, ALL_AT_ONCE) for model in ("bert", "t5")),
    pytest.param("bert", APART),
    pytest.param("t5", APART, marks=pytest.mark.slow),
    pytest.param("bert", Layout(devices=8, cp=2, mbs=1), marks=pytest.mark.slow),
    pytest.param("t5", Layout(pp=2, mbs=2, layers=4), marks=pytest.mark.slow),
    *(pytest.param(model, ALL_AT_ONCE, marks=pytest.mark.slow) for model in ("bert_untied", "t5_untied")),
    *(pytest.param(model, layout, marks=pytest.mark.slow) for model in MODELS for layout in LAYOUTS),
    pytest.param("bert", DIVIDED[0], marks=pytest.mark.slow),
    *(pytest.param("bert_untied", layout, marks=pytest.mark.slow) for layout in DIVIDED),
]


def _config(model: str, layout: Layout, **options: Any) -> Config:
    if layout.layers is not None:
        options["num_layers"] = layout.layers
        options |= {"encoder_num_layers": layout.layers // 2} if model.startswith("t5") else {}
    return Config(
        model_family=model.split("_")[0],
        model=MODELS[model].replace(**options),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            cp_comm_type=layout.comm,  # type: ignore[arg-type]
            sequence_parallel=layout.sp,
            zero=layout.zero,  # type: ignore[arg-type]
            pipeline_model_parallel_size=layout.pp,
            num_virtual_stages_per_pipeline_rank=layout.vpp,
            pipeline_engine=layout.engine,  # type: ignore[arg-type]
            pipeline_schedule=layout.schedule,  # type: ignore[arg-type]
            decoder_first_pipeline_num_layers=layout.first,
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=TEXT),
        train=TrainConfig(micro_batch_size=layout.micro_batch_size, global_batch_size=layout.batch),
    )


def _batches(model: str, size: int = BATCH) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(VOCAB, size=(size, length)).astype(np.int32)

    def kept(length: int) -> np.ndarray:
        return np.arange(length) < rng.integers(length // 2, length + 1, size=(size, 1))

    batches = []
    for _ in range(STEPS):
        if model.startswith("bert"):
            batch: dict[str, Any] = {
                "tokens": tokens(TEXT),
                "labels": np.where(rng.random((size, TEXT)) < 0.3, tokens(TEXT), -1).astype(np.int32),
                "tokentype_ids": rng.integers(2, size=(size, TEXT)).astype(np.int32),
                "position_ids": np.tile(np.arange(TEXT, dtype=np.int32), (size, 1)),
                "attention_mask": kept(TEXT),
                "is_random": rng.integers(-1, 2, size=size).astype(np.int32),
            }
        else:
            batch = {"encoder_input": tokens(TEXT), "encoder_mask": kept(TEXT), "decoder_input": tokens(WRITTEN)}
            batch |= {"decoder_mask": kept(WRITTEN), "labels": tokens(WRITTEN)}
        seen = batch["attention_mask" if model.startswith("bert") else "decoder_mask"]
        batch["loss_mask"] = ((batch["labels"] >= 0) & seen).astype(np.float32)
        batches.append(batch)
    return batches


def _train(model: str, layout: Layout, **options: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], parameters afterwards by path)."""
    config = _config(model, layout, **options)
    program = build_program(config, FAMILIES[config.model_family], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    with on_mesh(program):
        for batch in _batches(model, layout.batch):
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(program.stages.to_stored(state.params)))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def _one_device(model: str, batch: int, mbs: int, layers: int | None, dropout: float = 0.0) -> Any:
    # What belongs to a microbatch as a whole, such as the mean loss of the binary head, needs the same rows in each.
    return _train(model, Layout(devices=1, batch=batch, mbs=mbs, layers=layers), hidden_dropout=dropout)


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_equals_one_device(model: str, layout: Layout) -> None:
    wanted = _one_device(model, layout.batch, layout.micro_batch_size * layout.dp, layout.layers)
    _assert_equal(_train(model, layout), wanted)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param("bert", Layout(devices=2, pp=2, mbs=4, layers=4), marks=pytest.mark.slow),
        pytest.param("t5", Layout(devices=2, pp=2, mbs=2, layers=4)),
        pytest.param("t5_untied", Layout(devices=4, pp=2, tp=2, vpp=2, mbs=4, layers=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dropout_masks_are_those_of_one_device(model: str, layout: Layout) -> None:
    """A microbatch draws its masks from its own key, whichever stage, and whichever stack, it is on."""
    wanted = _one_device(model, layout.batch, layout.micro_batch_size, layout.layers, dropout=0.3)
    calm = _one_device(model, layout.batch, layout.micro_batch_size, layout.layers)
    assert abs(wanted[0][0, 0] - calm[0][0, 0]) > 1e-3
    _assert_equal(_train(model, layout, hidden_dropout=0.3), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "t5"])
def test_memory_does_not_grow_with_microbatches(model: str) -> None:
    """What is held between forward and backward does not; all that grows is the input."""
    sizes, counts = [], (8, 32)
    for count in counts:
        layout = Layout(devices=2, pp=2, mbs=1, batch=count, layers=4)
        program = build_program(_config(model, layout), FAMILIES[model], devices=jax.devices()[: layout.devices])
        [row, *_] = _batches(model, count)
        shapes = {k: jax.ShapeDtypeStruct((count, 1, *a.shape[1:]), a.dtype) for k, a in row.items()}
        with on_mesh(program):
            compiled = program.train_step.lower(program.abstract_state, shapes).compile()  # pyright: ignore
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    bytes_of_a_token = (sizes[-1] - sizes[0]) / (counts[-1] - counts[0]) / TEXT
    activation = 32 * 4  # one hidden state, of which a layer keeps a dozen
    assert bytes_of_a_token <= 3 * 4 < activation / 8, sizes


def test_evaluation_in_a_pipeline_is_that_of_one_device() -> None:
    found = []
    for layout in (Layout(devices=1, mbs=2, layers=4), Layout(devices=2, pp=2, mbs=2, layers=4)):
        program = build_program(_config("t5", layout), FAMILIES["t5"], devices=jax.devices()[: layout.devices])
        with on_mesh(program):
            placed = place_batch(program, _batches("t5")[0], num_microbatches=4)
            found.append([float(x) for x in program.eval_step(program.create_state().params, placed)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def _assert_equal(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        atol = 2e-5 * float(np.abs(value).max()) + 1e-6
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=atol, err_msg=name)
