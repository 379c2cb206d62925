"""A plan of a small step for H100s that are not there, against arithmetic by hand."""

# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import json
from html.parser import HTMLParser

import pytest

from megajax import cli
from megajax.models.registry import FAMILIES
from megajax.planning.memory import megatron_activations
from megajax.planning.page import page
from megajax.planning.report import Report, plan_step
from megajax.planning.text import count, duration, format_report, size

needs_aot = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")

L, D, F, V, HEADS, SEQ, BATCH = 4, 256, 512, 1024, 8, 128, 16
SMALL = f"""--model gpt --bf16 --num-layers {L} --hidden-size {D} --ffn-hidden-size {F} --num-attention-heads {HEADS}
 --optimizer adam --seq-length {SEQ} --max-sequence-length {SEQ} --global-batch-size {BATCH} --micro-batch-size 1
 --swiglu --untie-embeddings-and-output-weights --normalization RMSNorm --disable-bias-linear
 --num-query-groups {HEADS} --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by {V}
 --position-embedding-type rope --recompute-granularity selective""".split()
LAYER = 4 * D * D + 3 * D * F
NORMS = L * (2 * D + 2 * D // HEADS) + D  # two a layer, those of queries and keys, the last
WHOLE = L * LAYER + 2 * V * D + NORMS


@functools.cache
def planned(*flags: str, devices: int = 8, step: str = "train") -> Report:
    config = cli.parse([*SMALL, *flags], prog="test", families=FAMILIES)
    return plan_step(config, FAMILIES["gpt"], "h100", devices, step)  # pyright: ignore[reportArgumentType]


TP = ("--tp", "2", "--sequence-parallel", "--zero", "1")
PP = ("--pp", "2", "--tp", "2", "--sequence-parallel")


@needs_aot
def test_bytes_are_those_of_arithmetic():
    report = planned(*TP)
    memory = report.memory
    assert report.parameters == WHOLE
    divided = L * LAYER + 2 * V * D
    # In fp32, and two moments of it, divided over four replicas but for the norms; the rest is a handful of numbers.
    assert memory.parameters == 4 * (divided // 2 // 4 + NORMS)
    assert 0 <= memory.optimizer - 8 * (divided // 2 // 4 + NORMS) < 256
    assert memory.gradient_sums == 4 * (divided // 2 + NORMS)
    # Matrices of layers in bf16, both tables in fp32, all of them whole on each replica.
    assert memory.copies == pytest.approx(2 * (L * LAYER // 2) + 4 * (2 * V * D // 2), rel=0.02)
    gathers = [row for row in report.traffic if row.kind == "all-gather" and row.axes == "dp"]
    assert sum(row.sent for row in gathers) == pytest.approx(3 / 4 * memory.copies, rel=0.02)
    assert memory.batch == 4 * (BATCH // 4) * SEQ * 4, "four arrays of int32 or fp32"
    assert memory.fits and 0 <= memory.gaps < 0.01 * memory.peak


@needs_aot
@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_gradients_are_found_however_zero_divides_them(zero: str):
    memory = planned("--tp", "2", "--sequence-parallel", "--zero", zero).memory
    assert memory.gradients >= memory.gradient_sums - 4 * NORMS, "the sums are alive at any peak of a backward pass"
    assert 0 <= memory.gaps < 0.05 * memory.peak, "of so small a program real ones are 2.5%"


@needs_aot
def test_flops_are_those_of_the_model_and_what_is_recomputed():
    report = planned(*TP)
    tokens = BATCH * SEQ
    scores = 6 * BATCH * SEQ * SEQ * D * L
    assert report.model_flops * 8 == 6 * tokens * (L * LAYER + V * D) + scores
    executed = report.model_flops + report.recomputed_flops
    assert report.executed_flops == pytest.approx(executed, rel=0.02)
    assert report.kernels["__cudnn$fmhaSoftmaxBackward"] == L * report.num_microbatches
    assert report.idle_flops == 0 and report.bubble == 0
    assert report.recompute == "core_attn" and report.recomputed_flops > 0


@needs_aot
def test_a_pipeline_idles_as_the_papers_say():
    for engine in ("lockstep", "table"):
        report = planned(*PP, "--pipeline-engine", engine)
        assert report.num_microbatches == 8
        assert 0 <= report.memory.gaps < 0.02 * report.memory.peak, "a program this small has holes of a buffer or two"
        assert report.bubble == pytest.approx((2 - 1) / 8)
        idle = report.executed_flops / 9 if engine == "lockstep" else 0  # one tick of nine
        assert report.idle_flops == pytest.approx(idle)
        useful = report.executed_flops - report.idle_flops - report.recomputed_flops
        assert useful == pytest.approx(report.model_flops, rel=0.1)
        assert report.engine == f"pipeline engine {engine}: as asked for"


@needs_aot
def test_stages_of_unequal_size_compute_no_padding():
    """One, two, one and no layers, so that half of the rows are padding; and a module that only the last stage runs."""
    uneven = ("--pp", "4", "--tp", "2", "--sequence-parallel", "--pipeline-model-parallel-layout", "Et|tt|t|mL")
    report = planned(*uneven, "--mtp-num-layers", "1")
    assert report.model_flops * 8 > 6 * BATCH * SEQ * ((L + 1) * LAYER + 2 * V * D)
    assert report.idle_flops == pytest.approx(report.executed_flops * 3 / (BATCH + 3))
    useful = report.executed_flops - report.idle_flops - report.recomputed_flops
    assert useful == pytest.approx(report.model_flops, rel=0.1)


@needs_aot
def test_collectives_of_layers_are_those_of_tensor_parallelism():
    report = planned(*TP)
    kinds = {(row.kind, row.axes): row for row in report.traffic if row.in_layers}
    microbatches, tp = 4, 2
    # arXiv:2205.05198: two gathers forward, two backward, and two of the inputs again for the gradients of weights.
    activations = SEQ * D * 2 * (tp - 1) / tp
    gathers = kinds["all-gather", "tp"]
    assert gathers.sent == 6 * L * microbatches * activations
    sums = kinds["reduce-scatter", "tp"]
    assert sums.sent == 4 * L * microbatches * activations
    assert sums.exposed < 0.3 * sums.seconds, "gradients of kernels hide those of the backward pass"
    assert {row.link for row in report.traffic} == {"NVLink"}


@needs_aot
def test_steps_that_only_look_need_less():
    train, evaluation = planned(*TP), planned(*TP, step="eval")
    assert evaluation.memory.peak < train.memory.peak
    assert evaluation.memory.optimizer == evaluation.memory.gradients == evaluation.memory.gradient_sums == 0
    assert 0 <= evaluation.memory.gaps < 0.01 * evaluation.memory.peak
    per_sample = evaluation.model_flops / evaluation.samples, train.model_flops / train.samples
    assert per_sample[0] == pytest.approx(per_sample[1] / 3)


@needs_aot
def test_text_and_page_and_json():
    report = planned(*PP, "--pipeline-engine", "lockstep")
    text = format_report(report)
    assert "MEMORY  fits: peak" in text and "pipeline bubble 12.5%" in text
    data = json.loads(json.dumps(report.as_json()))
    assert {"fits", "memory", "flops", "collectives", "kernels", "bubble", "estimate"} <= set(data)
    assert data["fits"] is True and data["memory"]["sum_of_parts"] == report.memory.total
    html = page(report)
    assert "http" not in html and "<script" not in html, "needs nothing but itself"
    checker = _Balanced()
    checker.feed(html)
    assert checker.open == [] and checker.rectangles == 2 * 2 * 8


class _Balanced(HTMLParser):
    """Every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rectangles = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.rectangles += tag == "rect"
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_megatron_formula():
    """Of Llama 3 70B on tp=8, pp=4: 20 layers a stage, four microbatches in flight, (18 + 4 * 3.5) bytes a feature."""
    flags = ["--preset", "llama3-70b", "--bf16", "--seq-length", "8192", "--tp", "8", "--pp", "4"]
    flags += ["--micro-batch-size", "1"]
    selective = ["--recompute-granularity", "selective"]

    def formula(*more: str, fused: bool = True) -> int | None:
        config = cli.parse([*flags, *more], prog="test", families=FAMILIES)
        return megatron_activations(config, 16, fused_attention=fused)

    assert formula("--sequence-parallel") == 8192 * 8192 * 32 // 8 * 80
    assert formula("--sequence-parallel", fused=False) is None, "scores are kept"
    assert formula("--sequence-parallel", *selective, fused=False) == formula("--sequence-parallel")
    assert formula() is None, "norms and residuals are whole on every device"
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    assert formula("--sequence-parallel", *full) is None


def test_numbers_in_words():
    assert [size(n) for n in (0, 999, 1234, 78.2e9, -5e6)] == ["0 B", "999 B", "1.23 kB", "78.2 GB", "-5 MB"]
    assert [duration(t) for t in (0, 1e-9, 2e-6, 0.0155, 12.3)] == ["0", "< 1 us", "2 us", "15.5 ms", "12.3 s"]
    assert [count(n) for n in (7, 8.95e9, 262e12, -3e3)] == ["7", "8.95 G", "262 T", "-3 k"]
