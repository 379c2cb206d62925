"""Layers that share a transformer block: what is shared and what is not, decoding, and what is refused."""

# SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from megajax.config import ConfigError
from megajax.inference.generate import init_cache
from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.models.mamba import mamba_family
from megajax.models.mamba.mamba_model import MambaModel
from megajax.ssm.mamba_config import MambaConfig

TINY = MambaConfig(
    num_layers=6,
    hybrid_override_pattern="SMSSMS",
    hidden_size=16,
    num_attention_heads=2,
    kv_channels=16,
    ffn_hidden_size=24,
    gated_linear_unit=True,
    vocab_size=30,
    normalization="RMSNorm",
    position_embedding_type="rope",
    add_bias_linear=False,
    init_method_std=0.15,  # with 0.3 an error in the last bit of a weight moves a logit by 1e-4
    hidden_dropout=0.0,
    attention_dropout=0.0,
    mamba_state_dim=6,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_chunk_size=4,
    num_shared_blocks=2,
    shared_adapter_rank=3,
    shared_attention_adapter=True,
)
TOKENS = np.random.default_rng(0).integers(30, size=(2, 11))


@functools.cache
def model_and_params() -> tuple[Any, Any]:
    model = MambaModel(TINY)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["params"]


def test_blocks_are_shared_and_adapters_are_not():
    _, params = model_and_params()
    assert params["shared_block_0"]["weights"]["input_layernorm"]["scale"].shape == (32,)
    assert params["shared_block_1"]["weights"]["self_attention"]["linear_q"]["linear"]["kernel"].shape == (32, 32)
    per_layer = params["decoder"]["layers_0"]["adapters"]["self_attention"]["linear_q"]["adapter_down"]["kernel"]
    assert per_layer.shape == (2, 32, 3)  # layers 0 and 3, which run block 0
    assert set(params["decoder"]["layers_0"]["adapters"]) == {"self_attention", "mlp"}


def test_chunks_of_a_cached_sequence():
    model, params = model_and_params()
    whole = model.apply({"params": params}, TOKENS)
    cache = init_cache(model, params, {"tokens": TOKENS}, length=11)
    parts, position = [], 0
    for length in (5, 1, 5):
        tokens = TOKENS[:, position : position + length]
        logits, updated = model.apply(
            {"params": params, "cache": cache}, tokens, cache_position=position, mutable=["cache"]
        )
        cache, position = updated["cache"], position + length
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=5e-6)


def test_flops_count_each_layer():
    T, h, d, GN, H, K, F, r = 2 * 8, 16, 32, 12, 4, 32, 24, 3
    mixer = 6 * T * (h * (2 * d + 2 * GN + H) + d * h) + 21 * T * d * 6
    attention = 2 * h * 3 * K + K * h + r * (3 * 2 * h + 3 * K)
    mlp = 3 * h * F + r * (h + 2 * F)
    block = 6 * T * (attention + mlp + h * h) + 6 * 2 * 8**2 * K
    expected = 6 * mixer + 4 * block + 6 * T * h * 30
    assert mamba_family.flops(TINY, batch_size=2, seq_length=8) == expected


def test_what_is_not_possible_is_refused():
    with pytest.raises(ConfigError, match="layers S, which need shared_adapter_rank"):
        TINY.replace(shared_adapter_rank=None)
    with pytest.raises(ConfigError, match="Megatron config, which has no S"):
        megatron.save_folder(Pretrained("mamba", TINY, *model_and_params()), "nowhere")
