"""Decoding with a cache: equal to Megatron's static inference context, and to the model's own full forward pass."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from megajax.config import TransformerConfig
from megajax.inference.generate import init_cache
from megajax.interop import megatron
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.transformer.linear import ColumnParallelLinear

OPTIONS: tuple[dict[str, Any], ...] = (
    {"window_size": (3, 0), "window_attn_skip_freq": 2, "position_embedding_type": "rope", "no_rope_freq": 2},
    {"softmax_type": "learnable", "position_embedding_type": "learned_absolute"},
    {
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
        "position_embedding_type": "rope",
        "sandwich_norm": True,
        "embedding_multiplier": 4.0,
    },
)


def decode(model: Any, params: Any, tokens: Any, prefill: int, length: int) -> tuple[Any, Any]:
    """(logits of the last prompt token and of every later one [B, steps, V], cache)."""
    cache = init_cache(model, params, {"tokens": tokens}, length=length)

    @jax.jit
    def step(cache: Any, tokens: Any, position: Any) -> Any:
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens, cache_position=position, mutable=["cache"])

    logits, updated = step(cache, tokens[:, :prefill], 0)
    rows = [logits[:, -1]]
    for i in range(prefill, tokens.shape[1]):
        logits, updated = step(updated["cache"], tokens[:, i : i + 1], i)
        rows.append(logits[:, 0])
    return np.stack(rows, axis=1), updated["cache"]


def rotated(k_BTGK: Any) -> Any:
    half = k_BTGK.shape[-1] // 2
    angle = np.arange(k_BTGK.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    first, second = k_BTGK[..., :half], k_BTGK[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def test_prefill_and_single_steps_equal_megatrons_and_so_does_the_cache(golden: Path) -> None:
    case = golden / "mcore_llama_decode"
    settings = json.loads((case / "config.json").read_text())
    pretrained = megatron.load(
        load_file(case / "model.safetensors"), "gpt", settings["transformer_config"], settings["model_args"]
    )
    tokens, expected = np.load(case / "inputs.npz")["tokens"], np.load(case / "outputs.npz")
    logits, cache = decode(pretrained.model, pretrained.params, tokens, settings["model_args"]["prefill"], length=20)
    np.testing.assert_allclose(logits, expected["step_logits"], atol=2e-5, rtol=1e-4)
    full: Any = pretrained.model.apply({"params": pretrained.params}, tokens)
    np.testing.assert_allclose(full, expected["full_logits"], atol=2e-5, rtol=1e-4)
    key, value = (leaf for leaf in jax.tree.leaves(cache))
    for layer in range(2):
        for got, name in ((key, "k"), (value, "v")):
            reference = expected[f"kv/layer{layer + 1}/{name}"].swapaxes(0, 1)
            # Megatron's static cache keeps keys as they are before the rotation, and rotates all of them at each step.
            reference = rotated(reference) if name == "k" else reference
            np.testing.assert_allclose(got[layer, :, :17], reference, atol=2e-5, rtol=1e-4)
            np.testing.assert_array_equal(got[layer, :, 17:], 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_cached_steps_equal_the_full_pass_with_windows_learned_positions_and_layers_without_rope(
    options: dict[str, Any],
) -> None:
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=31,
        max_sequence_length=12, init_method_std=0.3, **options,
    )  # fmt: skip
    model: Any = GPTModel(config)
    tokens = np.random.default_rng(0).integers(0, 31, size=(2, 11))
    params = model.init(jax.random.key(0), tokens)["params"]
    logits, _ = decode(model, params, tokens, prefill=4, length=12)
    full = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(logits, full[:, 3:], atol=1e-5, rtol=1e-4)


class DoubledLinear(ColumnParallelLinear):
    """A linear that is not the product with its kernel."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return 2 * ColumnParallelLinear.__call__(self, x)


LATENT: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 16, "num_attention_heads": 16, "vocab_size": 31, "init_method_std": 0.3,
    "multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 16, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "position_embedding_type": "rope",
}  # fmt: skip


@pytest.mark.parametrize("linear", [ColumnParallelLinear, DoubledLinear])
def test_few_queries_attend_to_latents_and_project_none_of_them(linear: Any) -> None:
    """Equal to the full pass; the FLOPs are too few for a projection of the cache, unless that is no plain product."""
    config = TransformerConfig(**LATENT)
    spec = get_gpt_layer_local_spec(config).replace(**{"self_attention.linear_kv_up_proj": linear})
    model: Any = GPTModel(config, spec)
    tokens, T, S = np.random.default_rng(0).integers(0, 31, size=(2, 9)), 256, 3
    params = nn.unbox(model.init(jax.random.key(0), tokens)["params"])
    full = model.apply({"params": params}, tokens)
    cache = init_cache(model, params, {"tokens": tokens}, length=T)

    def step(cache: Any, tokens: Any, position: Any) -> Any:
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens, cache_position=position, mutable=["cache"])

    compiled: Any = jax.jit(step).lower(cache, tokens[:, :S], 0).compile()
    for i in range(0, 9, S):
        logits, updated = compiled(cache, tokens[:, i : i + S], i)
        cache = updated["cache"]
        np.testing.assert_allclose(logits, full[:, i : i + S], atol=1e-5, rtol=1e-4)
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    projection = 2 * 2 * T * config.kv_lora_rank * heads
    assert (compiled.cost_analysis()["flops"] < projection) == (linear is ColumnParallelLinear)
