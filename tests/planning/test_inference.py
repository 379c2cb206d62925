"""Plans of decoding and prefill for H100s that are not there, against arithmetic by hand."""

# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import json
import re
from typing import Any

import jax
import pytest

from megajax import cli, plan
from megajax.config import ConfigError
from megajax.inference.ahead import CompiledInference, Phase, compile_inference
from megajax.models.registry import FAMILIES
from megajax.parallel.aot import absent_gpus
from megajax.parallel.hlo import Instruction, bytes_of, computations_of
from megajax.planning.inference import InferenceReport, inference_report_of
from megajax.planning.inference_views import format_inference, inference_page

needs_aot = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")

L, D, F, V, HEADS, GROUPS, B, T = 4, 512, 1024, 1024, 8, 4, 16, 256
SIZES = f"""--bf16 --params-dtype bfloat16 --num-layers {L} --hidden-size {D} --ffn-hidden-size {F}
 --num-attention-heads {HEADS} --seq-length 64 --swiglu --untie-embeddings-and-output-weights --normalization RMSNorm
 --disable-bias-linear --make-vocab-size-divisible-by {V} --position-embedding-type rope""".split()
TP = ("--tp", "2")
DENSE = ("--model", "gpt", *SIZES, "--num-query-groups", str(GROUPS))
C, ROPE, EXPERTS = 128, 32, 8
LATENT = (
    *("--model", "gpt", *SIZES, "--multi-latent-attention", "--q-lora-rank", "128", "--kv-lora-rank", str(C)),
    *("--qk-head-dim", "64", "--qk-pos-emb-head-dim", str(ROPE), "--v-head-dim", "64"),
    *("--num-moe-experts", str(EXPERTS), "--moe-router-topk", "2", "--moe-ffn-hidden-size", "256", "--ep", "4"),
)
STATE, SSM_HEADS, SSM_GROUPS, CONV = 64, 16, 2, 4
HYBRID = (
    *("--model", "mamba", *SIZES, "--num-query-groups", str(GROUPS), "--hybrid-override-pattern", "M*M-"),
    *("--mamba-state-dim", str(STATE), "--mamba-num-heads", str(SSM_HEADS), "--mamba-num-groups", str(SSM_GROUPS)),
    *("--mamba-head-dim", str(2 * D // SSM_HEADS)),
)


@functools.cache
def compiled(phase: Phase, *flags: str) -> CompiledInference:
    config = cli.parse(flags, prog="test", families=FAMILIES)
    family = FAMILIES[config.model_family]
    return compile_inference(config, family, absent_gpus(8), phase, max_requests=B, max_seq_length=T)


def planned(*flags: str, phase: Phase = "decode") -> InferenceReport:
    return inference_report_of(compiled(phase, *flags), "h100")


@needs_aot
def test_bytes_and_collectives_of_decoding_are_those_of_arithmetic():
    """On tp=2, dp=4. Messages: arXiv:1909.08053, one sum for attention and one for the MLP of each layer."""
    report = planned(*DENSE, *TP)
    memory, head = report.memory, D // HEADS
    layer = D * D * 2 + 2 * D * GROUPS * head + 3 * D * F
    norms = L * (2 * D + 2 * head) + D  # two a layer, those of queries and keys, the last
    assert memory.parameters == 2 * ((L * layer + 2 * V * D) // 2 + norms)
    assert memory.cache == 2 * L * (B // 4) * T * (GROUPS // 2) * head * 2
    assert report.parameters == L * layer + 2 * V * D + norms
    assert memory.fits and memory.peak >= memory.parameters + memory.cache + memory.temporaries
    [sums] = [row for row in report.traffic if row.in_layers]
    assert (sums.kind, sums.axes, sums.times) == ("all-reduce", "tp", 2 * L)
    assert sums.sent == 2 * L * (B // 4) * D * 2, "2 (n - 1) / n of the residual stream of the requests here, in bf16"
    assert {row.axes for row in report.traffic} == {"tp"}, "replicas have nothing to say to each other"
    assert report.floor == pytest.approx((memory.parameters + memory.cache) / 3.35232e12)
    assert report.floor <= report.compute <= report.seconds
    assert report.tokens_per_second == pytest.approx(B / report.seconds / 8)


@needs_aot
@pytest.mark.parametrize("flags", [(*DENSE, *TP), LATENT, (*HYBRID, *TP)], ids=["dense", "latent", "hybrid"])
def test_the_cache_is_written_where_it_lies(flags: tuple[str, ...]):
    """No second one, and no copy: what is written of keys is one token of each request."""
    one = compiled("decode", *flags)
    memory, cache = one.executable.memory_analysis(), planned(*flags).memory.cache
    assert memory.alias_size_in_bytes >= cache
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096
    stacks = {f"bf16[{','.join(map(str, leaf.sharding.shard_shape(leaf.shape)))}]" for leaf in _stacks(one)}
    text = one.executable.as_text()
    copied = [line for line in text.splitlines() if re.search(r"= \S+ copy\(", line)]
    assert stacks and not [line for line in copied if any(stack in line for stack in stacks)]


@needs_aot
@pytest.mark.parametrize("flags", [(*DENSE, *TP), (*HYBRID, *TP)], ids=["dense", "hybrid"])
def test_products_read_the_weights_where_they_lie(flags: tuple[str, ...]):
    """Each is read by one operation, which gives less than that: none is taken out of a larger array, or moved."""
    one = compiled("decode", *flags)
    computations, entry = computations_of(one.executable.as_text())
    kernels = {i.name: i for i in computations[entry] if i.opcode == "parameter" and "kernel" in i.op_name}
    assert len(kernels) == sum("kernel" in str(path[-1]) for path, _ in jax.tree.leaves_with_path(one.program.params))
    users: dict[str, list[Instruction]] = {name: [] for name in kernels}
    for instruction in computations[entry]:
        for name in {kernels[read].name for read in instruction.operands if read in kernels}:
            if instruction.opcode == "bitcast":
                kernels[instruction.name] = kernels[name]
            else:
                users[name].append(instruction)
    large = {name for name in users if bytes_of(kernels[name].shape) >= 2 * D * C}
    assert all(len(users[name]) == 1 for name in large)
    assert all(bytes_of(users[name][0].shape) < bytes_of(kernels[name].shape) for name in large)


def _stacks(one: CompiledInference) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(one.program.cache) if T in leaf.shape]


@needs_aot
def test_latents_are_all_that_multi_latent_attention_keeps():
    """On ep=4, dp=2: requests are divided over both."""
    report = planned(*LATENT)
    assert report.memory.cache == L * (B // 8) * T * (C + ROPE) * 2
    kinds = {row.axes for row in report.traffic if row.in_layers}
    assert kinds == {"ep"}, "only experts lie on several devices"


@needs_aot
def test_a_decoder_keeps_what_it_wrote_and_what_the_encoder_read():
    """On tp=2, dp=4. No step reads the encoder, or projects the text again: the FLOPs are those of arithmetic."""
    flags = [flag for flag in SIZES if flag not in ("--position-embedding-type", "rope")]
    report = planned("--model", "t5", *flags, *TP)
    keys = 2 * L * (B // 4) * T * D // 2 * 2
    assert report.memory.cache == 2 * keys + (B // 4) * T + T, "the text's mask and the positions beside them"
    reading = 16 * 2 * T * D  # the kernel's rows of queries, of which one is wanted; scores and sums
    assert report.executed_flops == (B // 4) * (L * (6 * D * D + 3 * D * F + reading) + V * D)
    encoder = L * (4 * D * D + 3 * D * F) // 2 * 2  # and each decoder layer's keys and values of the text
    assert report.memory.unread == pytest.approx(encoder + L * 2 * D * D // 2 * 2, rel=0.02)
    assert report.memory.peak >= report.memory.parameters + report.memory.cache


@needs_aot
def test_states_do_not_grow_with_the_texts():
    """Two Mamba layers and one of attention on tp=2, dp=4."""
    report = planned(*HYBRID, *TP)
    inner, requests = 2 * D, B // 4
    state = requests * (inner // 2) * STATE * 4
    window = requests * (CONV - 1) * (inner // 2 + 2 * SSM_GROUPS * STATE // 2) * 2
    keys = 2 * requests * T * (GROUPS // 2) * (D // HEADS) * 2
    assert report.memory.cache == 2 * (state + window) + keys


@needs_aot
def test_a_prefill_is_one_pass_of_flash_attention_and_makes_the_last_logits_alone():
    report = planned(*DENSE, *TP, phase="prefill")
    assert report.kernels["__cudnn$fmhaSoftmax"] == L
    assert report.memory.cache == planned(*DENSE, *TP).memory.cache
    assert report.tokens == B * T
    layer = 2 * D * D + 2 * D * GROUPS * (D // HEADS) + 3 * D * F
    attention, logits = 4 * T * D, 2 * D * V  # of a token, all devices together
    assert report.executed_flops < (B // 4) * T / 2 * (L * (2 * layer + attention) + logits / 4)


@needs_aot
def test_text_and_page_and_json_say_the_same():
    report = planned(*DENSE, *TP)
    text, html = format_inference(report), inference_page(report)
    assert f"one token more for each of {B} requests of up to {T} tokens" in text
    for words in ("MEMORY  fits: peak", "cache", "tokens/s per GPU at most", "COLLECTIVES of a GPU, for each token"):
        assert words in text
    assert "http" not in html and "<script" not in html, "needs nothing but itself"
    data = json.loads(json.dumps(report.as_json()))
    assert {"fits", "memory", "flops", "collectives", "kernels", "bubble", "estimate"} <= set(data)
    assert data["memory"]["cache"] == report.memory.cache and data["estimate"]["floor"] == report.floor


DECODE = ("--step", "decode", "--num-devices", "8")
NO_STEP = "has no step that decodes with a cache; choose from gpt, t5, mamba, llava"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        *[(("--model", name, *DECODE), NO_STEP) for name in ("bert", "clip", "radio", "retro")],
        (("--model", "gpt", *DECODE, "--pp", "2"), "pipeline_model_parallel_size=2: generation has no such layout"),
        (("--model", "gpt", *DECODE, "--cp", "2"), "context_parallel_size=2: generation has no such layout"),
        (("--model", "gpt", *DECODE, "--tp", "2", "--sequence-parallel"), "cannot divide a step of one token"),
        (("--model", "gpt", *DECODE, "--inference-max-requests", "3"), "not divisible by the 8 replicas of 8 devices"),
        (
            ("--model", "gpt", *DECODE, "--inference-max-requests", "0"),
            "--inference-max-requests 0: must be at least 1",
        ),
        (("--model", "gpt", *DECODE, "--inference-max-seq-length", "0"), "max-seq-length 0: must be at least 1"),
        (("--model", "gpt", *DECODE, "--search"), "--search ranks meshes for training"),
        (("--model", "gpt", "--num-devices", "8", "--step", "eval", "--search"), "--search ranks meshes for training"),
        (
            ("--model", "gpt", "--num-devices", "8", "--search", "--tp", "2"),
            "tensor-model-parallel-size=2 has no effect",
        ),
        (("--model", "gpt", "--num-devices", "8", "--inference-max-requests", "8"), "has no effect with --step train"),
        (("--preset", "gpt3-125m", *DECODE), "--inference-max-seq-length 2560 exceeds max_sequence_length=2048"),
    ],
)
@needs_aot
def test_mistakes_are_one_line(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan.main([*argv])
    assert words in str(caught.value) and "\n" not in str(caught.value)
