"""MambaModel by its properties: what a token may depend on, what its parameters number, what is refused."""

# SPDX-License-Identifier: Apache-2.0
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.inference.generate import init_cache
from megajax.interop.hf_architecture import abstract_leaves
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.mamba.mamba_family import HYBRIDS
from megajax.models.mamba.mamba_layer_specs import get_mamba_layer_spec
from megajax.models.mamba.mamba_model import MambaModel
from megajax.ssm.mamba_config import MambaConfig

TINY = MambaConfig(
    num_layers=4,
    hybrid_override_pattern="M*ME",
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=30,
    normalization="RMSNorm",
    position_embedding_type="rope",
    init_method_std=0.3,
    num_moe_experts=4,
    moe_ffn_hidden_size=8,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    mamba_state_dim=6,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_chunk_size=4,
)
TOKENS = np.random.default_rng(0).integers(30, size=(2, 11))


@functools.cache
def model_and_params() -> tuple[Any, Any]:
    model = MambaModel(TINY)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["params"]


def logits_of(tokens=TOKENS, **inputs):
    model, params = model_and_params()
    return np.asarray(jax.jit(functools.partial(model.apply, **inputs))({"params": params}, tokens))


def test_a_token_sees_none_after_it():
    changed = TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 30
    before, after = logits_of(), logits_of(changed)
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-6)
    assert np.abs(after[:, 6:] - before[:, 6:]).max() > 0.1


def test_packed_documents_are_separate():
    ids = np.array([[0] * 4 + [1] * 5 + [2] * 2] * 2)
    packed = logits_of(segment_ids=ids)
    for document in range(3):
        rows = ids[0] == document
        np.testing.assert_allclose(packed[:, rows], logits_of(TOKENS[:, rows]), atol=2e-5)


def test_padding_on_the_left_changes_nothing():
    padded = np.concatenate([np.full((2, 3), 7), TOKENS], axis=1)
    kept = np.arange(14)[None] >= np.array([[3], [3]])
    positions = np.maximum(np.arange(14) - 3, 0)[None]
    logits = logits_of(padded, attention_mask=jnp.asarray(kept), position_ids=jnp.asarray(positions))
    np.testing.assert_allclose(logits[:, 3:], logits_of(), atol=2e-5)


def test_chunks_of_a_cached_sequence():
    model, params = model_and_params()
    cache = init_cache(model, params, {"tokens": TOKENS}, length=11)
    parts, position = [], 0
    for length in (5, 1, 3, 2):
        tokens = TOKENS[:, position : position + length]
        logits, updated = model.apply(
            {"params": params, "cache": cache}, tokens, cache_position=position, mutable=["cache"]
        )
        cache, position = updated["cache"], position + length
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits_of(), atol=2e-5)


def test_options_of_the_mixer_take_part():
    changes = {
        "mamba_d_has_hdim": True,
        "mamba_rmsnorm": False,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "mamba_d_conv": 2,
        "mamba_dt_clamp_max": 0.01,
    }
    config = TINY.replace(**changes)
    model: Any = MambaModel(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["params"]
    mixer = params["decoder"]["layers_0"]["mixer"]
    assert mixer["D"].shape == (1, config.mamba_inner_size)
    assert "norm" not in mixer
    assert set(mixer["conv1d_x"]) == {"kernel"}
    assert mixer["in_proj_z"]["bias"].shape == (1, config.mamba_inner_size)
    assert np.isfinite(model.apply({"params": params}, TOKENS)).all()


def test_first_weights():
    """Steps between dt_min and dt_max, decay rates in their range, output weights smaller by the root of the layers."""
    config = MambaConfig(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=64, mamba_num_groups=1)
    params = nn.unbox(jax.jit(MambaModel(config).init)(jax.random.key(1), TOKENS))["params"]
    mixer = params["decoder"]["layers"]["mixer"]
    steps = np.logaddexp(mixer["dt_bias"], 0)
    assert 0.999e-3 < steps.min() < 2e-3
    assert 0.08 < steps.max() < 0.1001
    rates = np.exp(mixer["A_log"])
    assert 1 <= rates.min() < 2 < 15 < rates.max() <= 16
    assert np.std(mixer["out_proj"]["kernel"]) == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert 0.49 < np.abs(mixer["conv1d_x"]["kernel"]).max() < 0.5


def test_a_gpt_is_a_hybrid_of_its_halves():
    hybrid: Any = MambaModel(
        TINY.replace(hybrid_override_pattern="*-*-", num_moe_experts=None, moe_ffn_hidden_size=None)
    )
    params = nn.unbox(jax.jit(hybrid.init)(jax.random.key(0), TOKENS))["params"]
    attention, mlp = params["decoder"]["layers_0"], params["decoder"]["layers_1"]
    as_gpt = params | {"decoder": params["decoder"] | {"layers": attention | mlp}}
    del as_gpt["decoder"]["layers_0"], as_gpt["decoder"]["layers_1"]
    shared = {name: getattr(hybrid.config, name) for name in ("hidden_size", "num_attention_heads", "vocab_size")}
    gpt = GPTModel(TransformerConfig(num_layers=2, position_embedding_type="rope", normalization="RMSNorm", **shared))
    wanted: Any = gpt.apply({"params": as_gpt}, TOKENS)
    np.testing.assert_allclose(hybrid.apply({"params": params}, TOKENS), wanted, atol=1e-5)


def test_another_core_can_be_plugged_in():
    class Silence(nn.Module):
        sizes: object

        def __call__(self, projected, dynamics, segment_ids):
            return jnp.zeros((*projected.dt.shape, TINY.mamba_head_dim))

    spec = get_mamba_layer_spec(TINY, LocalSpecProvider()).replace(**{"mixer.core": Silence})
    config = TINY.replace(num_moe_experts=None, moe_ffn_hidden_size=None, hybrid_override_pattern="MMMM")
    model: Any = MambaModel(config)
    silent = model.clone(transformer_layer_spec=(spec,) * 4)
    params = model.init(jax.random.key(0), TOKENS)
    embedded = silent.apply(params, TOKENS, method="hidden_states")
    assert np.abs(embedded - model.apply(params, TOKENS, method="hidden_states")).max() > 0.1


# Numbers of parameters as the checkpoints on Hugging Face state them; the experts' balancing biases are left out.
COUNTS = {
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-47b": 46_791_554_816,
    "nemotron-h-56b": 56_324_350_464,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "bamba-9b": 9_780_235_392,
}


@pytest.mark.parametrize("name", HYBRIDS.presets)
def test_presets_have_the_published_number_of_parameters(name):
    config: Any = HYBRIDS.presets[name]()
    leaves = abstract_leaves(MambaModel(config), HYBRIDS.example_inputs(config, 1, 8))
    assert sum(math.prod(leaf.shape) for path, leaf in leaves.items() if "expert_bias" not in path) == COUNTS[name]


def test_megatrons_number_of_parameters():
    """M*- with 256 features and 100 words has 1,774,872 (Megatron's tests/unit_tests/models/test_hybrid_model.py)."""
    config = MambaConfig(num_layers=3, hidden_size=256, num_attention_heads=4, vocab_size=100)
    model = MambaModel(config, hybrid_override_pattern="M*-", share_embeddings_and_output_weights=False)
    leaves = abstract_leaves(model, HYBRIDS.example_inputs(config, 1, 8))
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == 1_774_872


def test_model_flops():
    """Of one layer of each kind, written out."""
    config = TINY.replace(hybrid_override_pattern="M*-M", num_moe_experts=None, moe_ffn_hidden_size=None)
    T, h, d, GN, H = 2 * 64, 16, 32, 12, 4
    mixer = 6 * T * (h * (2 * d + 2 * GN + H) + d * h) + 21 * T * d * 6
    attention = 6 * T * 4 * h * h + 6 * 2 * 64**2 * h
    mlp = 6 * T * 2 * h * 64
    assert HYBRIDS.flops(config, batch_size=2, seq_length=64) == 2 * mixer + attention + mlp + 6 * T * h * 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "M*MX"}, "'X' is no symbol of a layer; known: M "),
        ({"hybrid_override_pattern": "M*|M"}, "pipeline_model_parallel_layout"),
        ({"hybrid_override_pattern": "M*GM"}, "Gated DeltaNet, which is not supported"),
        ({"hybrid_override_pattern": "M*M"}, "has 3 layers for num_layers=4; make them equal"),
        ({"hybrid_override_pattern": "MMMM"}, "num_moe_experts=4 and hybrid_override_pattern='MMMM'"),
        ({"num_moe_experts": None, "moe_ffn_hidden_size": None}, "num_moe_experts=None and hybrid_override_pattern"),
        ({"hybrid_attention_ratio": 0.5}, "has 1 layers of attention where"),
        ({"hybrid_attention_ratio": 0.8, "hybrid_mlp_ratio": 0.3}, "together at most 1"),
        ({"mamba_num_heads": 3}, "mamba_num_heads=3 is not divisible by mamba_num_groups=2"),
        ({"mamba_head_dim": 7}, "mamba_expand times hidden_size=32 is not divisible by mamba_head_dim=7"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is not possible in a hybrid model"),
        ({"moe_layer_freq": 2}, "hybrid_override_pattern says which layers have experts"),
        ({"mamba_dt_min": 0.2}, "mamba_dt_min=0.2 exceeds mamba_dt_max=0.1"),
        ({"mamba_state_dim": 0}, "mamba_state_dim=0 must be greater than 0"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        TINY.replace(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mask_between_tokens_is_refused():
    with pytest.raises(ConfigError, match="a Mamba layer cannot"):
        logits_of(attention_mask=jnp.ones((2, 1, 11, 11), bool))
