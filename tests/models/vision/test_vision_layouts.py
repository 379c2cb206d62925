"""Three training steps of the families that see, on every layout, equal one device's."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.models.multimodal.llava_config import LLaVAConfig
from megajax.models.registry import FAMILIES
from megajax.models.vision.clip_config import CLIPConfig
from megajax.models.vision.radio_config import RADIOConfig
from megajax.training.setup import build_program, on_mesh, place_batch

BATCH, STEPS, VOCAB, TEXT, SIDE = 8, 3, 60, 8, 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that tensor and pipeline parallelism leave over, up to `devices`, are data parallel. mbs: None for one
    microbatch."""

    devices: int = 4
    tp: int = 1
    sp: bool = False
    zero: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1
    comm: str = "p2p"
    mbs: int | None = None

    def __str__(self) -> str:
        staged = f"-pp{self.pp}" * (self.pp > 1) + f"-mbs{self.mbs}" * (self.mbs is not None)
        experts = f"-ep{self.ep}" if self.ep > 1 else ""
        context = f"-cp{self.cp}-{self.comm}" if self.cp > 1 else ""
        return f"{self.devices}dev-tp{self.tp}{'-sp' * self.sp}-zero{self.zero}{experts}{context}{staged}"

    @property
    def dp(self) -> int:
        """Data-parallel shards."""
        return self.devices // (self.tp * self.pp * self.cp)

    @property
    def micro_batch_size(self) -> int:
        """Of one shard."""
        return self.mbs or BATCH // self.dp


_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "init_method_std": 0.3,
}
_QUIET: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_IMAGES: dict[str, Any] = {"img_h": SIDE, "img_w": SIDE, "patch_dim": 2}
MODELS: dict[str, Any] = {
    "clip": CLIPConfig(
        **_SIZES, **_QUIET, **_IMAGES, ln_pre=True, ln_post="pooled", pooler="class_token", projection_dim=16,
        text_num_layers=1, vocab_size=VOCAB, make_vocab_size_divisible_by=64, max_sequence_length=TEXT,
    ),
    "siglip": CLIPConfig(
        **_SIZES, **_QUIET, **_IMAGES, class_token_len=0, embedder_bias=True, ln_post="tokens", pooler="attention",
        text_num_layers=1, text_causal=False, text_pooling="last", contrastive_loss="sigmoid", vocab_size=VOCAB,
        make_vocab_size_divisible_by=64, max_sequence_length=TEXT,
    ),
    "radio": RADIOConfig(
        **_SIZES, **_QUIET, **_IMAGES, max_img_h=12, max_img_w=12, class_token_len=2, summary_idxs=(0, 1),
        num_classes=10, layer_scale_init=0.5, pos_dropout=0.4,
    ),
    "llava": LLaVAConfig(
        **_SIZES, **_QUIET, **_IMAGES, vocab_size=VOCAB, make_vocab_size_divisible_by=64, num_query_groups=2,
        position_embedding_type="rope", normalization="RMSNorm", add_bias_linear=False, vision_num_layers=2,
        vision_hidden_size=16, vision_num_attention_heads=4, vision_ffn_hidden_size=32, vision_feature_layer=-2,
        drop_vision_class_token=True, freeze_vision_projection=True,
    ),
}  # fmt: skip
MODELS["llava_experts"] = MODELS["llava"].replace(
    num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16, moe_aux_loss_coeff=0.3,
    moe_router_load_balancing_type="aux_loss",
)  # fmt: skip
SLOTS = 24
"""Of 9 tokens, one of which is an image of 16."""
LAYOUTS = [Layout(), Layout(zero=2), Layout(zero=3), Layout(devices=2, tp=2), Layout(devices=2, tp=2, sp=True)]
ALL_AT_ONCE = Layout(tp=2, sp=True, zero=3)
APART = Layout(tp=2, mbs=2)
"""Two microbatches, whose gradients the devices add up apart."""
STAGED = [
    Layout(devices=8, tp=2, sp=True, zero=3, pp=2, mbs=1),
    Layout(devices=2, pp=2, mbs=2, zero=0),
]
DIVIDED = [
    Layout(cp=2, zero=3),
    Layout(devices=8, cp=2, tp=2, sp=True, mbs=2),
    Layout(devices=2, cp=2, comm="all_gather", zero=0, mbs=4),
    Layout(cp=4, comm="a2a", mbs=4),
    Layout(devices=8, cp=2, pp=2, mbs=2),
]
"""Of their sequences; every device sees whole images."""
WITH_EXPERTS = [Layout(ep=2, zero=2), Layout(tp=2, sp=True, ep=2, zero=3), Layout(pp=2, ep=2, mbs=1)]
CASES = [
    pytest.param("llava", STAGED[0]),
    pytest.param("llava", DIVIDED[1]),
    *(pytest.param("llava", layout, marks=pytest.mark.slow) for layout in (*STAGED[1:], DIVIDED[0], *DIVIDED[2:])),
    *(pytest.param("llava_experts", layout, marks=pytest.mark.slow) for layout in WITH_EXPERTS),
    *(pytest.param(model, APART, marks=pytest.mark.slow) for model in ("llava", "clip", "siglip")),
    pytest.param("radio", APART),
    pytest.param("llava_experts", Layout(ep=2, mbs=1), marks=pytest.mark.slow),
    pytest.param("clip", Layout(mbs=1)),  # a microbatch is compared with each other, wherever it lies
    *(pytest.param(model, ALL_AT_ONCE) for model in MODELS if model != "llava_experts"),
    *(
        pytest.param(model, layout, marks=pytest.mark.slow)
        for model in MODELS
        for layout in LAYOUTS
        if model != "llava_experts"
    ),
]


def _family(model: str) -> str:
    return "clip" if model == "siglip" else model.split("_")[0]


def _config(model: str, layout: Layout) -> Config:
    return Config(
        model_family=_family(model),
        model=MODELS[model],
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            zero=layout.zero,  # type: ignore[arg-type]
            expert_model_parallel_size=layout.ep,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            cp_comm_type=layout.comm,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length={"llava": SLOTS, "radio": 18}.get(_family(model), TEXT)),
        train=TrainConfig(micro_batch_size=layout.micro_batch_size, global_batch_size=BATCH),
    )


def _batches(model: str) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    batches = []
    for _ in range(STEPS):
        images = rng.normal(size=(BATCH, 3, SIDE, SIDE)).astype(np.float32)
        if model.startswith("llava"):
            text = rng.integers(VOCAB, size=(BATCH, 10)).astype(np.int32)
            text[np.arange(BATCH), rng.integers(9, size=BATCH)] = -200
            mask = (rng.random((BATCH, SLOTS)) < 0.8).astype(np.float32)
            batch: dict[str, Any] = {
                "images": images[:, None],
                "tokens": text[:, :-1],
                "labels": text[:, 1:],
                "loss_mask": mask,
            }
        else:
            batch: dict[str, Any] = {"images": images, "loss_mask": (rng.random((BATCH, 1)) < 0.8).astype(np.float32)}
            if model == "radio":
                batch["labels"] = rng.integers(10, size=(BATCH, 1)).astype(np.int32)
            else:
                batch["tokens"] = rng.integers(VOCAB, size=(BATCH, TEXT)).astype(np.int32)
        batches.append(batch)
    return batches


def _train(model: str, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], parameters before and after by path)."""
    program = build_program(_config(model, layout), FAMILIES[_family(model)], devices=jax.devices()[: layout.devices])
    state, seen = program.create_state(), []
    before = jax.device_get(state.params)
    with on_mesh(program):
        for batch in _batches(model):
            placed = place_batch(program, batch, num_microbatches=program.batches.at(0).num_microbatches)
            state, metrics = program.train_step(state, placed)
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    trees = (before, jax.device_get(state.params))
    first, last = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in trees
    )
    return np.array(seen), first, last


@functools.cache
def _one_device(model: str, mbs: int = BATCH) -> Any:
    return _train(model, Layout(devices=1, mbs=mbs))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_equals_one_device(model: str, layout: Layout) -> None:
    # The losses of a router belong to a microbatch as a whole, so there the rows of each have to be the same.
    found, wanted = _train(model, layout), _one_device(model, layout.micro_batch_size * layout.dp)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    assert found[2].keys() == wanted[2].keys()
    for name, value in wanted[2].items():
        atol = 2e-5 * float(np.abs(value).max()) + 1e-6
        np.testing.assert_allclose(found[2][name], value, rtol=2e-5, atol=atol, err_msg=name)


def test_only_what_is_frozen_stays() -> None:
    _, before, after = _one_device("llava")
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("['vision_projection']")}
    unused = {name for name in before if "['ln_post']" in name}
    assert frozen
    assert unchanged == frozen | unused
