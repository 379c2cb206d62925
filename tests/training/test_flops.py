"""Model FLOPs against the numbers of Megatron's own formula."""

# SPDX-License-Identifier: Apache-2.0
import pytest

from megajax.config import HeterogeneousLayer, TransformerConfig
from megajax.training.flops import model_flops, peak_flops_per_second

GPT = TransformerConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096, vocab_size=50304)
LLAMA3_8B = TransformerConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    gated_linear_unit=True,
    vocab_size=128256,
)


def test_published_numbers():
    assert model_flops(GPT, batch_size=8, seq_length=1024) == 18_612_240_777_216
    assert model_flops(LLAMA3_8B, batch_size=1, seq_length=8192) == 421_645_529_382_912


def test_the_vocabulary_counts_padded():
    padded = GPT.replace(vocab_size=50257, make_vocab_size_divisible_by=128)
    assert model_flops(padded, batch_size=8, seq_length=1024) == 18_612_240_777_216


def test_output_gate_costs_one_more_query_projection():
    gated = LLAMA3_8B.replace(attention_output_gate=True)
    extra = model_flops(gated, batch_size=2, seq_length=64) - model_flops(LLAMA3_8B, batch_size=2, seq_length=64)
    assert extra == 6 * 2 * 64 * 32 * 4096 * 4096


def test_heads_need_not_fill_the_hidden_size():
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=3, num_query_groups=1, kv_channels=5, vocab_size=7
    )
    projections = 8 * (15 + 5 + 5) + 15 * 8
    want = 6 * (10 * (projections + 8 * 32 * 2 + 8 * 7) + 2 * 25 * 15)
    assert model_flops(config, batch_size=2, seq_length=5) == want


def test_heterogeneous_layers_count_what_they_have():
    layers = (
        HeterogeneousLayer(num_query_groups=2, ffn_hidden_size=24),
        HeterogeneousLayer(attention="no_op", mlp="linear"),
        HeterogeneousLayer(attention="linear", mlp="no_op"),
    )
    config = TransformerConfig(
        num_layers=3, hidden_size=8, num_attention_heads=4, vocab_size=16, heterogeneous_layers=layers
    )
    normal = 8 * (8 + 4 + 4) + 8 * 8 + 2 * 8 * 24
    assert model_flops(config, batch_size=1, seq_length=4) == 6 * (4 * (normal + 2 * 8 * 8 + 8 * 16) + 16 * 8)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_by_device_kind(kind, tera):
    assert peak_flops_per_second(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L400", "Some New Chip"])
def test_unknown_devices_have_no_peak(kind):
    assert peak_flops_per_second(kind) is None
