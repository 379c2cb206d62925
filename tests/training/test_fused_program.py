"""The training step compiled for GPUs that are not there: which kernels it calls, and what it sends."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import math
import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from megajax.config import (
    Config,
    ConfigError,
    DataConfig,
    KernelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TransformerConfig,
)
from megajax.kernels import Choice
from megajax.models.registry import FAMILIES
from megajax.ops.attention import AttentionMask, dot_product_attention
from megajax.ops.flash_attention import KERNELS, flash_attention
from megajax.parallel.aot import TARGETS, absent_gpus
from megajax.parallel.census import census
from megajax.parallel.hlo import executed
from megajax.parallel.roofline import estimate
from megajax.parallel.sharding import spec_of
from megajax.training.backend import describe_kernels, kernels_of_step
from megajax.training.setup import Program, build_program, on_mesh

SEQ, M, L = 320, 2, 2
MODEL: dict[str, Any] = {
    "num_layers": L,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "ffn_hidden_size": 256,
    "vocab_size": 256,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bf16": True,
}


def build(devices: list[Any], kernels: dict[str, Any], model: dict[str, Any], **parallel: Any) -> tuple[Program, Any]:
    """A program and an abstract batch for it."""
    rows = 2 if parallel.get("zero") == 3 else parallel.get("expert_model_parallel_size", 1)
    config = Config(
        model_family="gpt",
        model=TransformerConfig(**MODEL | model),
        parallel=ParallelConfig(**parallel),
        kernels=KernelConfig(**kernels),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=1, global_batch_size=M * rows),
    )
    program = build_program(config, FAMILIES["gpt"], devices=devices)
    place = NamedSharding(program.mesh, spec_of((None, "batch", "seq"), program.rules.table))
    dtypes = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    return program, {
        name: jax.ShapeDtypeStruct((M, rows, SEQ), dtype, sharding=place) for name, dtype in dtypes.items()
    }


aot = all(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "nvidia"))
on_h100 = pytest.mark.skipif(not aot, reason="needs the extra aot, and nvidia-cudnn-cu12")


def calls(text: str) -> Counter[str]:
    return Counter(re.findall(r'custom_call_target="(__cudnn[^"]*)"', text))


# Layout -> forward and backward calls in a layer, and all-to-alls. In a ring of two: three quarters of a square at
# home, two away. A pipeline has forwards before backwards, both together, and backwards after.
LAYOUTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "tp2-sp": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 1, 0),
    "ring2": ({"context_parallel_size": 2}, 5, 0),
    "ulysses2": ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, 1, 4),
    "pp2-tp2-sp": (
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        2,
        0,
    ),
}


@on_h100
@pytest.mark.parametrize(
    "layout", ["tp2-sp", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tp2-sp")]
)
def test_attention_of_the_h100_program_is_cudnn(layout: str) -> None:
    parallel, times, all_to_alls = LAYOUTS[layout]
    devices = math.prod(size for name, size in parallel.items() if name.endswith("_size"))
    program, batch = build(absent_gpus(devices), {}, {}, **parallel)
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
        assert describe_kernels(choices) == "attention: cuDNN flash attention"
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    assert calls(text) == {"__cudnn$fmhaSoftmax": times, "__cudnn$fmhaSoftmaxBackward": times}
    sent = Counter(c.kind for c in census(text, program.mesh) for _ in range(c.arrays) if "all-to-all" in c.kind)
    assert sent.total() == all_to_alls
    assert f"{SEQ},{SEQ}]" not in text  # no scores


def pallas_calls(text: str) -> Counter[str]:
    return Counter(re.findall(r'custom_call_target="[^"]*triton[^"]*".*\bname = "(\w+)"', text))


# As LAYOUTS, for packed documents.
PACKED_LAYOUTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "tp2-sp": LAYOUTS["tp2-sp"],
    "ring2": LAYOUTS["ring2"],
    "gather2": ({"context_parallel_size": 2, "cp_comm_type": "all_gather"}, 1, 0),
    "pp2-tp2-sp": LAYOUTS["pp2-tp2-sp"],
}


@on_h100
@pytest.mark.parametrize(
    ("layout", "dropout"),
    [
        ("tp2-sp", 0.0),
        *(pytest.param(name, 0.0, marks=pytest.mark.slow) for name in PACKED_LAYOUTS if name != "tp2-sp"),
        pytest.param("tp2-sp", 0.1, marks=pytest.mark.slow),
    ],
)
def test_attention_to_packed_documents_and_with_dropout_is_pallas(layout: str, dropout: float) -> None:
    parallel, times, all_to_alls = PACKED_LAYOUTS[layout]
    devices = math.prod(size for name, size in parallel.items() if name.endswith("_size"))
    program, batch = build(absent_gpus(devices), {}, {"attention_dropout": dropout}, **parallel)
    batch["segment_ids"] = batch["tokens"]
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
        assert describe_kernels(choices).startswith("attention: Pallas flash attention (cuDNN flash attention ")
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    names = ("attention_forward", "attention_backward_q", "attention_backward_kv")
    assert pallas_calls(text) == dict.fromkeys(names, times)
    assert not calls(text)
    sent = Counter(c.kind for c in census(text, program.mesh) for _ in range(c.arrays) if "all-to-all" in c.kind)
    assert sent.total() == all_to_alls
    assert not re.search(rf"\b{SEQ},\d*{SEQ}\]", text)  # no scores
    found = estimate(text, program.mesh, TARGETS["h100"])
    assert {name for name in found.kernels if name.startswith("Pallas")} == {f"Pallas: {name}" for name in names}


@on_h100
@pytest.mark.parametrize("target", ["h100", pytest.param("a100", marks=pytest.mark.slow)])
def test_memory_of_pallas_attention_grows_as_the_sequence(target: str) -> None:
    """Forward and backward of one layer, at 4 and at 16 blocks; plain attention's grows with the square."""
    program, _ = build(absent_gpus(1, target), {}, {})

    def temporaries(S: int, kernel: Any) -> int:
        place = NamedSharding(program.mesh, PartitionSpec())
        q, k, ids = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for shape, dtype in (((1, S, 4, 80), jnp.bfloat16), ((1, S, 2, 80), jnp.bfloat16), ((1, S), jnp.int32))
        )

        def run(q: Any, k: Any, v: Any, ids: Any, dy: Any) -> Any:
            mask = AttentionMask(causal=True, q_segment_ids=ids, kv_segment_ids=ids)
            attend = dot_product_attention if kernel is None else partial(flash_attention, kernel=kernel)
            return jax.vjp(lambda q, k, v: attend(q, k, v, mask=mask, scale=0.1), q, k, v)[1](dy)

        memory: Any = jax.jit(run).lower(q, k, k, ids, q).compile().memory_analysis()
        return memory.temp_size_in_bytes

    short, long = (temporaries(S, KERNELS["pallas"]) for S in (512, 2048))
    assert long < 4.5 * short
    assert temporaries(2048, None) > 4 * long


@on_h100
def test_a_soft_cap_of_scores_is_pallas() -> None:
    program, batch = build(absent_gpus(1), {}, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
        reason = "cuDNN flash attention has no soft cap of scores, as attn_logit_softcapping asks for"
        assert describe_kernels(choices) == f"attention: Pallas flash attention ({reason})"
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    assert pallas_calls(text) == dict.fromkeys(
        ("attention_forward", "attention_backward_q", "attention_backward_kv"), 1
    )
    assert f"{SEQ},{SEQ}]" not in text  # no scores


LATENT = {"multi_latent_attention": True, "num_query_groups": None, "q_lora_rank": 64, "kv_lora_rank": 32}
SIZES = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}


@on_h100
@pytest.mark.slow
def test_values_of_latent_attention_are_not_padded() -> None:
    program, batch = build(absent_gpus(1), {}, LATENT | SIZES)
    with on_mesh(program):
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    assert calls(text) == {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
    results = [line.split("custom-call(")[0] for line in text.splitlines() if '"__cudnn$fmhaSoftmaxBackward"' in line]
    assert re.findall(r"bf16\[1,4,320,(\d+)\]", results[0]) == ["192", "192", "128"]


@on_h100
@pytest.mark.parametrize(
    ("recipe", "zero"),
    [("tensorwise", 3), ("delayed", 1), pytest.param("tensorwise", 1, marks=pytest.mark.slow)],
)
def test_linears_of_layers_are_fp8_where_they_are_asked_to_be(recipe: str, zero: int) -> None:
    """q, k, v, proj, fc1 and fc2, forward and both gradients; the head's three products are not. ZeRO-3's weights are
    gathered in fp8; under sequence parallelism there are no more collectives than without fp8, but for scales."""
    parallel = {"zero": 3} if zero == 3 else {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    program, batch = build(absent_gpus(2), {"fp8_format": "hybrid", "fp8_recipe": recipe}, {}, **parallel)
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
        assert Choice("linears", f"fp8-{recipe}") in choices
        lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        text = lowered.compile().as_text()
    assert Counter(re.findall(r'custom_call_target="(__cublas[^"]*)"', text)) == {
        "__cublas$lt$matmul$f8": 6 * 3,
        "__cublas$lt$matmul": 3,
    }
    inside = [collective for collective in census(text, program.mesh) if collective.loops == (M, L)]
    arrays = {kind: sum(c.arrays for c in inside if c.kind == kind) for kind in ("all-gather", "reduce-scatter")}
    if zero == 3:
        one_byte_each = 4 * 128 * 256 + 2 * 128 * 128
        assert sum(c.result_bytes for c in inside if c.kind == "all-gather") == 2 * one_byte_each
    else:
        assert arrays == {"all-gather": 6, "reduce-scatter": 4}


EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 1024, "moe_router_topk": 2, "gated_linear_unit": True}


@on_h100
@pytest.mark.parametrize(
    "parallel",
    [
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        pytest.param({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_experts_of_the_h100_program_are_one_kernel_a_linear_map(parallel: dict[str, int]) -> None:
    """Forward and for each gradient, with the collectives of the loop, in no more memory, and with no loop whose turns
    only a run knows. Tensor parallelism is without sequence parallelism here: its devices share each expert."""
    found = {}
    for backend in ("fused", "unfused"):
        program, batch = build(absent_gpus(4), {"grouped_gemm_backend": backend}, EXPERTS, **parallel)
        with on_mesh(program):
            choices = kernels_of_step(program.train_step, program.abstract_state, batch)
            lowered = program.train_step.lower(program.abstract_state, batch)  # pyright: ignore[reportFunctionMemberAccess]
            found[backend] = program, describe_kernels(choices), lowered.compile()
    program, said, executable = found["fused"]
    _, said_of_loop, loop = found["unfused"]
    assert said.splitlines()[1:] == ["experts: a grouped matrix product in Pallas"]
    assert said_of_loop.splitlines()[1:] == ["experts: a loop of products"]
    text, text_of_loop = (str(each.as_text()) for each in (executable, loop))
    # A pipeline has forwards before backwards, both together, and backwards after.
    passes = 2 if "pipeline_model_parallel_size" in parallel else 1
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3 * 3 * passes
    assert unknown_loops(text) == 0 < unknown_loops(text_of_loop)
    sent, sent_by_loop = (
        Counter((c.kind, c.axes, c.loops) for c in census(each, program.mesh)) for each in (text, text_of_loop)
    )
    assert sent == sent_by_loop
    # The plan counts as much, of as many blocks of 128 rows.
    work, work_of_loop = (estimate(each, program.mesh, TARGETS["h100"], turns=7) for each in (text, text_of_loop))
    assert work.flops == work_of_loop.flops > estimate(text, program.mesh, TARGETS["h100"], turns=6).flops
    assert work.kernels["Pallas: grouped_matmul"] == 2 * work.kernels["Pallas: grouped_matmul_dw"]
    assert executable.memory_analysis().temp_size_in_bytes <= loop.memory_analysis().temp_size_in_bytes


def unknown_loops(text: str) -> int:
    """Loops whose number of turns the compiler does not know."""
    return sum(inner.opcode == "while" and inner.trips is None for inner, _ in executed(text))


@on_h100
@pytest.mark.parametrize(
    ("kernels", "model", "parallel", "said"),
    [
        ({"attention_backend": "unfused"}, {}, {}, "attention: plain JAX"),
        ({"transformer_impl": "local"}, {}, {}, "attention: plain JAX"),
        ({}, {"bf16": False}, {}, "attention: plain JAX (cuDNN flash attention computes in bf16 or fp16; set"),
        (
            {},
            {"window_size": (64, 0), "window_attn_skip_freq": 2},
            {"context_parallel_size": 2},
            "attention: Pallas flash attention (cuDNN flash attention takes whole blocks",
        ),
    ],
)
def test_what_is_not_fused_is_said(kernels: Any, model: Any, parallel: Any, said: str) -> None:
    program, batch = build(absent_gpus(2 if parallel else 1), kernels, model, **parallel)
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
    assert describe_kernels(choices).startswith(said)


@on_h100
def test_what_is_asked_for_and_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ConfigError, match="attention_backend='fused' is not possible: cuDNN") as error:
        build(absent_gpus(1), {"attention_backend": "fused"}, {"bf16": False})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernels", [{"transformer_impl": "transformer_engine"}, {"attention_backend": "fused"}])
def test_fused_kernels_need_a_gpu(kernels: dict[str, Any]) -> None:
    [(field, value)] = kernels.items()
    with pytest.raises(ConfigError, match=rf"{field}='{value}' needs an NVIDIA GPU, here is cpu; use {field}='auto'"):
        build(jax.devices()[:1], kernels, {})


@on_h100
def test_without_cudnn_to_compile_with_attention_is_pallas_and_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr("megajax.training.backend._installed", lambda package: False)
    program, batch = build(absent_gpus(1), {}, {})
    with on_mesh(program):
        choices = kernels_of_step(program.train_step, program.abstract_state, batch)
    assert describe_kernels(choices).startswith("attention: Pallas flash attention (cuDNN")
    assert "pip install --no-deps nvidia-cudnn-cu12" in describe_kernels(choices)
