"""Model FLOPs of a training step and the peak of known devices: what throughput and MFU are computed from.

Model FLOPs count the matrix products a step needs, forward (x1) and backward (x2), whatever is recomputed; norms,
softmax, rotary embeddings and the embedding lookup are not counted (`megatron/training/training.py`,
`num_floating_point_operations`).
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from megajax.config import TransformerConfig

PER_PARAMETER = 6
"""A multiply and an add, forward and twice backward."""

_PEAK_BF16: tuple[tuple[str, float], ...] = (
    # Dense bf16 FLOP/s of the makers' data sheets, the longer of two matching names first.
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307e12),
    ("MI325X", 1307e12),
    ("TPU7X", 2307e12),
    ("TPU V6", 918e12),
    ("TPU V5 LITE", 197e12),
    ("TPU V5E", 197e12),
    ("TPU V5", 459e12),
    ("TPU V4", 275e12),
    ("TPU V3", 123e12),
)


def model_flops(config: TransformerConfig, *, batch_size: int, seq_length: int) -> int:
    """Floating-point operations of one training step of a decoder-only language model.

    With T = batch_size * seq_length tokens, h = hidden_size, q = kv_channels * heads, k = v = kv_channels * groups:

        6 T [ sum over layers( h (q + k + v [+ q, output gate]) + q h + h ffn (3 if gated else 2) ) + h V_padded ]
        + 6 batch_size seq_length^2 q (layers with attention)

    The last term is the two products of attention, halved because a causal mask needs half of each. Sliding windows
    are counted as full attention, as in Megatron. Of a layer with experts the router, the shared experts and the
    `moe_router_topk` chosen ones count, whatever a capacity drops or pads.

    Args:
      batch_size: samples in the step (the global batch).
      seq_length: tokens in a sample.
    """
    tokens = batch_size * seq_length
    layers = range(config.num_layers)
    per_token = sum(attention_weights(config, i) + mlp_weights(config, i) for i in layers)
    per_token += config.hidden_size * config.padded_vocab_size
    attention = sum(query_width(config) for i in layers if _kind(config, i, "attention") == "normal")
    if config.mtp_num_layers:  # each: a layer like the last, a map from two streams to one, the output layer again
        last = config.num_layers - 1
        further = attention_weights(config, last) + mlp_weights(config, last) + 2 * config.hidden_size**2
        per_token += config.mtp_num_layers * (further + config.hidden_size * config.padded_vocab_size)
        attention += config.mtp_num_layers * query_width(config)
    return PER_PARAMETER * (tokens * per_token + batch_size * seq_length**2 * attention)


def query_width(config: TransformerConfig) -> int:
    """Features of all query heads together."""
    if config.multi_latent_attention:  # the mean of the widths of the two products of attention
        return config.num_attention_heads * (config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim) // 2
    assert config.kv_channels is not None
    return config.kv_channels * config.num_attention_heads


def _kind(config: TransformerConfig, index: int, half: str) -> str:
    """`normal`, `linear` or `no_op`: layers differ only in heterogeneous models."""
    if config.heterogeneous_layers is None:
        return "normal"
    layer = config.heterogeneous_layers[index]
    return layer.attention if half == "attention" else layer.mlp


def attention_weights(config: TransformerConfig, index: int) -> int:
    """Weights of the projections of layer `index`, biases left out."""
    kind, hidden = _kind(config, index, "attention"), config.hidden_size
    if kind != "normal":
        return hidden * hidden if kind == "linear" else 0
    layer = config.for_layer(index)
    if layer.multi_latent_attention:
        return _latent_attention_weights(layer)
    assert layer.kv_channels is not None
    assert layer.num_query_groups is not None
    query, key = query_width(layer), layer.kv_channels * layer.num_query_groups
    gate = query if layer.attention_output_gate else 0
    return hidden * (query + 2 * key + gate) + query * hidden


def _latent_attention_weights(layer: TransformerConfig) -> int:
    hidden, heads, rotated = layer.hidden_size, layer.num_attention_heads, layer.qk_pos_emb_head_dim
    query = heads * (layer.qk_head_dim + rotated)
    queries = hidden * query if layer.q_lora_rank is None else layer.q_lora_rank * (hidden + query)
    keys = hidden * (layer.kv_lora_rank + rotated) + layer.kv_lora_rank * heads * (layer.qk_head_dim + layer.v_head_dim)
    return queries + keys + heads * layer.v_head_dim * hidden


def mlp_weights(config: TransformerConfig, index: int) -> int:
    """Weights of the MLP of layer `index`, biases left out."""
    kind, hidden = _kind(config, index, "mlp"), config.hidden_size
    if kind != "normal":
        return hidden * hidden if kind == "linear" else 0
    layer = config.for_layer(index)
    assert layer.ffn_hidden_size is not None
    maps = 3 if layer.gated_linear_unit else 2
    if layer.num_moe_experts is None:
        return hidden * layer.ffn_hidden_size * maps
    assert layer.moe_ffn_hidden_size is not None
    width = layer.moe_latent_size or hidden
    chosen = layer.moe_router_topk * width * layer.moe_ffn_hidden_size * maps
    latent = 0 if layer.moe_latent_size is None else 2 * hidden * layer.moe_latent_size
    shared = hidden * (layer.moe_shared_expert_intermediate_size or 0) * maps
    return chosen + latent + shared + hidden * layer.num_moe_experts


def peak_flops_per_second(device_kind: str) -> float | None:
    """Peak of dense bf16 matrix products of one device, or None if it is not known (a CPU, for one).

    Args:
      device_kind: `jax.devices()[0].device_kind`, such as `NVIDIA H100 80GB HBM3`.
    """
    words = f" {device_kind.upper().replace('-', ' ')} "
    for name, peak in _PEAK_BF16:
        if f" {name} " in words:
            return peak
    return None
