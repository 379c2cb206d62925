"""Model FLOPs of towers: matrix products, forward and twice backward, as `megajax.training.flops` counts them."""

# SPDX-License-Identifier: Apache-2.0
from megajax.config import TransformerConfig


def layer_weights(config: TransformerConfig) -> int:
    """Weights of one layer's matrices."""
    assert config.kv_channels is not None
    assert config.num_query_groups is not None
    assert config.ffn_hidden_size is not None
    hidden = config.hidden_size
    query, key = config.kv_channels * config.num_attention_heads, config.kv_channels * config.num_query_groups
    return hidden * (2 * query + 2 * key) + hidden * config.ffn_hidden_size * (3 if config.gated_linear_unit else 2)


def tower_flops(config: TransformerConfig, tokens: int, *, causal: bool = False, num_layers: int | None = None) -> int:
    """FLOPs of the layers of one sample of so many tokens in a training step. A causal mask halves attention's.

    num_layers: default: all of them.
    """
    assert config.kv_channels is not None
    attention = (1 if causal else 2) * tokens**2 * config.kv_channels * config.num_attention_heads
    layers = config.num_layers if num_layers is None else num_layers
    return 6 * layers * (tokens * layer_weights(config) + attention)
