"""The table of kernels: what it chooses, what it says of what it does not choose, and what it refuses."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax import kernels
from megajax.backends import LocalSpecProvider, TESpecProvider
from megajax.config import ConfigError, KernelConfig, TransformerConfig
from megajax.kernels import (
    ATTENTION,
    EXPERTS,
    TITLES,
    WANTED,
    AttentionUse,
    ExpertsUse,
    choose_attention,
    choose_experts,
    refusal,
)
from megajax.models.gpt.gpt_model import GPTModel
from megajax.ops import flash_attention
from megajax.ops.grouped import GroupedKernel
from megajax.ops.grouped_kernel import grouped_product

A100, H100 = (8, 0), (9, 0)
INTERPRETED = GroupedKernel(partial(grouped_product, interpret=True), most_rows=128)
PLAIN_CAUSAL = AttentionUse(dtype="bfloat16", head_dim=128, value_dim=128, causal=True)

# GPU, use, what is said, and what takes its place.
CUDNN_CANNOT: list[tuple[tuple[int, int], dict[str, Any], str, str]] = [
    ((7, 5), {}, "compute capability 8.0", "plain"),
    (H100, {"dtype": "float32"}, "set bf16=True", "plain"),
    (H100, {"head_dim": 20, "value_dim": 20}, "multiples of 8", "pallas"),
    (H100, {"head_dim": 264, "value_dim": 264}, "up to 256", "pallas"),
    (H100, {"head_dim": 520, "value_dim": 520}, "up to 256", "plain"),
    (A100, {"head_dim": 192, "value_dim": 192}, "up to 128 features before Hopper", "pallas"),
    (A100, {"head_dim": 96, "value_dim": 64}, "another size from Hopper on", "pallas"),
    (H100, {"packed": True}, "packed documents", "pallas"),
    (H100, {"hidden_keys": True}, "dense bias", "pallas"),
    (H100, {"hidden_keys": True, "dense_mask": True}, "differs between queries", "plain"),
    (H100, {"softcap": True}, "no soft cap of scores", "pallas"),
    (H100, {"dropout": True}, "attention_dropout=0", "pallas"),
    (H100, {"window": (8, 0), "causal": False}, "left of causal", "pallas"),
    (H100, {"gathered": True}, "cp_comm_type='all_gather'", "pallas"),
    (H100, {"ring": True, "zigzag": True, "window": (8, 0)}, "whole blocks", "pallas"),
    (H100, {"ring": True, "zigzag": True, "packed": True}, "packed documents", "pallas"),
    (H100, {"ring": True}, "zigzag", "pallas"),
    (H100, {"bias": True, "varied_bias": True}, "differs between samples", "pallas"),
    (H100, {"bias": True, "odd": True}, "even numbers", "pallas"),
    (H100, {"cudnn_missing": True}, "pip install --no-deps nvidia-cudnn-cu12", "pallas"),
]
CUDNN_CAN: list[tuple[tuple[int, int], dict[str, Any]]] = [
    (A100, {}),
    (A100, {"dtype": "float16", "causal": False, "bias": True}),
    (H100, {"head_dim": 256, "value_dim": 256, "window": (4096, 0)}),
    (H100, {"window": (-1, 5)}),
    (H100, {"head_dim": 192, "value_dim": 128, "sink": True}),
    (H100, {"ring": True, "zigzag": True, "sink": True}),
    (H100, {"gathered": True, "causal": False}),
    ((10, 0), {}),
]


@pytest.mark.parametrize(("gpu", "changes", "reason", "instead"), CUDNN_CANNOT)
def test_what_cudnn_cannot_do_is_said_in_one_line(gpu: Any, changes: dict[str, Any], reason: str, instead: str) -> None:
    use = dataclasses.replace(PLAIN_CAUSAL, **changes)
    said = refusal("cudnn", use, gpu)
    assert said is not None
    assert reason in said
    choice = choose_attention(use, gpu, "auto")
    assert choice.kernel == instead
    assert said in choice.why
    if instead != "plain":
        assert choose_attention(use, gpu, "fused", strict=True) == choice
        return
    with pytest.raises(ConfigError, match=r"attention_backend='fused' is not possible: cuDNN.*; Pallas") as error:
        choose_attention(use, gpu, "fused")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("gpu", "changes"), CUDNN_CAN)
def test_what_cudnn_can_do(gpu: Any, changes: dict[str, Any]) -> None:
    choice = choose_attention(dataclasses.replace(PLAIN_CAUSAL, **changes), gpu, "auto", strict=True)
    assert (choice.kernel, choice.why) == ("cudnn", "")


def test_a_cache_is_read_by_plain_attention_whatever_is_asked_for() -> None:
    choice = choose_attention(dataclasses.replace(PLAIN_CAUSAL, cached=True), H100, "fused", strict=True)
    assert choice.kernel == "plain"
    assert choice.slot == "attention to a cache"


def test_fused_is_never_plain() -> None:
    with pytest.raises(ConfigError, match="transformer_impl='transformer_engine' is not possible: cuDNN"):
        choose_attention(dataclasses.replace(PLAIN_CAUSAL, dense_mask=True), H100, "auto", strict=True)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        choose_attention(PLAIN_CAUSAL, None, "fused")


def test_every_kernel_has_a_title_a_name_and_something_that_computes_it() -> None:
    assert {"plain", *flash_attention.KERNELS} == ATTENTION.keys() <= TITLES.keys()
    assert set().union(*WANTED.values()) == ATTENTION.keys()
    assert WANTED["auto"] == tuple(ATTENTION)
    assert EXPERTS.keys() < TITLES.keys()


@pytest.mark.parametrize(
    ("gpu", "use", "reason"),
    [
        ((7, 5), ExpertsUse(dtype="bfloat16"), "compute capability 8.0"),
        (H100, ExpertsUse(dtype="float32"), "set bf16=True"),
        (H100, ExpertsUse(dtype="float16", aligned=False), "moe_ffn_hidden_size to be multiples of 16"),
        (None, ExpertsUse(dtype="bfloat16"), "needs an NVIDIA GPU"),
    ],
)
def test_why_experts_are_a_loop_is_said(gpu: Any, use: ExpertsUse, reason: str) -> None:
    choice = choose_experts(use, gpu, "auto")
    assert choice.kernel == "blocks"
    assert str(choice).startswith("experts: a loop of products (a grouped matrix product in Pallas ")
    assert reason in choice.why
    with pytest.raises(ConfigError, match="grouped_gemm_backend='fused' is not possible: a grouped") as error:
        choose_experts(use, gpu, "fused")
    assert reason in str(error.value)
    with pytest.raises(ConfigError, match="transformer_impl='transformer_engine' is not possible: a grouped"):
        choose_experts(use, gpu, "auto", strict=True)


@pytest.mark.parametrize("gpu", [A100, H100, (10, 0)])
def test_experts_that_drop_no_token_are_one_kernel(gpu: Any) -> None:
    use = ExpertsUse(dtype="bfloat16")
    assert str(choose_experts(use, gpu, "auto", strict=True)) == "experts: a grouped matrix product in Pallas"
    assert choose_experts(use, gpu, "fused").kernel == "grouped"
    assert str(choose_experts(use, gpu, "unfused")) == "experts: a loop of products"
    assert choose_experts(dataclasses.replace(use, padded=True), gpu, "auto").kernel == "gemm"


@pytest.mark.parametrize(
    "given",
    [
        {"transformer_impl": "local", "attention_backend": "fused"},
        {"transformer_impl": "transformer_engine", "attention_backend": "unfused"},
        {"transformer_impl": "local", "grouped_gemm_backend": "fused"},
        {"transformer_impl": "transformer_engine", "grouped_gemm_backend": "unfused"},
    ],
)
def test_contradictions_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(attention|grouped_gemm)_backend=.* is not possible with transformer_impl"):
        KernelConfig(**given)


CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    position_embedding_type="rope",
    softmax_type="learnable",
    window_size=(5, 0),
    window_attn_skip_freq=2,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    bf16=True,
    recompute_granularity="selective",
)
TOKENS = jnp.arange(2 * 16).reshape(2, 16) % 50


@pytest.mark.parametrize("segments", [None, TOKENS // 7])
def test_a_model_of_fused_attention_equals_the_plain_one(
    segments: Any, monkeypatch: Any, reference_kernel: Any, pallas_kernel: Any
) -> None:
    """Also where attention is recomputed: then its arguments are traced once more."""
    kernel_pair = {"cudnn": reference_kernel, "pallas": pallas_kernel}
    monkeypatch.setattr("megajax.transformer.fused_attention.KERNELS", kernel_pair)
    plain, fused = (GPTModel(CONFIG, backend=b) for b in (LocalSpecProvider(), TESpecProvider(gpu=H100)))
    variables = plain.init(jax.random.key(0), TOKENS)
    assert jax.tree.map(jnp.shape, fused.init(jax.random.key(0), TOKENS)) == jax.tree.map(jnp.shape, variables)

    def run(model: Any) -> Any:
        return jax.value_and_grad(lambda v: model.apply(v, TOKENS, labels=TOKENS, segment_ids=segments).mean())(
            variables
        )

    with kernels.recording() as found:
        got = run(fused)
    assert [choice.kernel for choice in found] == ["cudnn" if segments is None else "pallas"]
    for mine, expected in zip(jax.tree.leaves(got), jax.tree.leaves(run(plain)), strict=True):
        assert float(jnp.abs(mine - expected).max()) <= 0.03 * float(jnp.abs(expected).max())


def test_a_model_of_grouped_experts_equals_the_plain_one(monkeypatch: Any) -> None:
    """Interpreted, in fp32: the kernel is told that it is bf16."""
    monkeypatch.setattr("megajax.transformer.fused_experts.kernel_for", lambda gpu: INTERPRETED)
    monkeypatch.setattr(kernels, "_HALF", ("float32",))
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2, "gated_linear_unit": True}
    config = CONFIG.replace(bf16=False, **experts)
    fused_backend = TESpecProvider(gpu=H100, attention_backend="unfused")
    plain, fused = (GPTModel(config, backend=b) for b in (LocalSpecProvider(), fused_backend))
    variables = plain.init(jax.random.key(0), TOKENS)

    def run(model: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda v: model.apply(v, TOKENS, labels=TOKENS).mean()))(variables)

    with kernels.recording() as found:
        got = run(fused)
    assert "experts: a grouped matrix product in Pallas" in map(str, found)
    for mine, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_the_choice_is_recorded_with_its_reason() -> None:
    model = GPTModel(CONFIG, backend=TESpecProvider(gpu=H100))
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    segments = jnp.zeros_like(TOKENS)
    with kernels.recording() as found:
        jax.eval_shape(lambda v: model.apply(v, TOKENS, segment_ids=segments), variables)
    assert len(found) == 1
    assert str(next(iter(found))).startswith("attention: Pallas flash attention (cuDNN flash attention keeps packed")
