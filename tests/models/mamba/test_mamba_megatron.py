"""Mamba-2 and hybrids with Megatron's weights against numbers that Megatron-Core computed (tests/golden/mcore_*)."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError
from megajax.inference.generate import init_cache
from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.transformer.block import stack_layout
from megajax.transformer.stack import locate

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ["mcore_mamba", "mcore_mamba_hybrid"]


def settings_of(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    return settings["transformer_config"], settings["model_args"]


@functools.cache
def load(case: str) -> tuple[Pretrained, dict[str, np.ndarray]]:
    """(model, Megatron's state dict)."""
    state_dict = load_file(GOLDEN / case / "model.safetensors")
    return megatron.load(state_dict, "mamba", *settings_of(case)), state_dict


@pytest.mark.parametrize("case", CASES)
def test_forward_loss_and_gradients_equal_megatrons(case):
    pretrained, _ = load(case)
    inputs, expected = np.load(GOLDEN / case / "inputs.npz"), np.load(GOLDEN / case / "outputs.npz")

    def loss_of(params):
        variables = {"params": params}
        per_token = pretrained.model.apply(variables, inputs["tokens"], labels=inputs["labels"])
        logits, recorded = pretrained.model.apply(variables, inputs["tokens"], mutable=["intermediates"])
        loss = (per_token * inputs["loss_mask"]).sum() / inputs["loss_mask"].sum()
        return loss, (per_token, logits, recorded["intermediates"]["decoder"])

    (loss, (per_token, logits, recorded)), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        pretrained.params
    )
    segments = stack_layout(pretrained.config, pretrained.model.layer_specs)
    for i in range(pretrained.config.num_layers):
        stack, row = locate(segments, i)
        reference = expected[f"out/decoder.layers.{i}"].swapaxes(0, 1)
        np.testing.assert_allclose(recorded[stack][0][row], reference, atol=3e-5, rtol=1e-4, err_msg=f"layer {i}")
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(per_token, expected["per_token_loss"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    check_gradients(case, megatron.save(pretrained._replace(params=gradients)))


def check_gradients(case: str, gradients: dict[str, np.ndarray]) -> None:
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        scale = np.abs(reference).max()
        np.testing.assert_allclose(gradients[name], reference, atol=1e-4 * scale, rtol=0, err_msg=name)
    statistics = np.load(GOLDEN / case / "grad_stats.npz")
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, wanted in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64).ravel()
        measured = (np.linalg.norm(g), g.sum(), np.abs(g).max(), g @ np.sin(0.7 * np.arange(g.size) + 0.3))
        slack = 1e-4 * wanted[0] * np.array([1, g.size**0.5, 1, 1])
        assert np.all(np.abs(measured - wanted) <= slack), name


def test_decoding_and_its_states_equal_megatrons():
    case = "mcore_mamba_decode"
    pretrained, _ = load(case)
    tokens, expected = np.load(GOLDEN / case / "inputs.npz")["tokens"], np.load(GOLDEN / case / "outputs.npz")
    prefill = 9

    @jax.jit
    def step(cache, tokens, position):
        variables = {"params": pretrained.params, "cache": cache}
        logits, updated = pretrained.model.apply(variables, tokens, cache_position=position, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    # What another sequence has left in the cache is forgotten at position 0.
    cache = init_cache(pretrained.model, pretrained.params, {"tokens": tokens}, length=tokens.shape[1])
    cache = jax.tree.map(lambda leaf: leaf + 1, cache)
    logits, cache = step(cache, tokens[:, :prefill], 0)
    steps = [logits]
    for i in range(prefill, tokens.shape[1]):
        logits, cache = step(cache, tokens[:, i : i + 1], i)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, axis=1), expected["step_logits"], atol=3e-5, rtol=1e-4)
    held = cache["decoder"]["layers"]["mixer"]["mamba"]
    for layer in range(2):
        np.testing.assert_allclose(held.state[layer], expected[f"state/layer{layer + 1}/ssm"], atol=3e-5, rtol=1e-4)
        window = np.concatenate([part[layer] for part in held.window], axis=-1).swapaxes(1, 2)
        # Megatron keeps one input more than a step needs.
        np.testing.assert_allclose(window, expected[f"state/layer{layer + 1}/conv"][:, :, 1:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [*CASES, "mcore_mamba_decode"])
def test_save_inverts_load_bit_for_bit(case):
    pretrained, state_dict = load(case)
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(state_dict)
    for name, value in state_dict.items():
        assert saved[name].dtype == value.dtype
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_settings_survive(case, tmp_path):
    pretrained, _ = load(case)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, "mamba").config == pretrained.config


def test_transformer_engines_names():
    """There a norm lies in the linear after it; experts alone keep theirs."""
    pretrained, state_dict = load("mcore_mamba_hybrid")
    renamed = {
        name.replace(".norm.weight", ".mixer.in_proj.layer_norm_weight")
        .replace("mixer.mixer.in_proj.layer_norm_weight", "mixer.norm.weight")
        .replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        .replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): value
        for name, value in state_dict.items()
    }
    assert len(renamed.keys() - state_dict.keys()) == 6
    again = megatron.load(renamed, "mamba", *settings_of("mcore_mamba_hybrid"))
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)


def test_the_pattern_of_later_versions_and_ratios():
    _, state_dict = load("mcore_mamba_hybrid")
    fields, arguments = settings_of("mcore_mamba_hybrid")
    del arguments["hybrid_override_pattern"]
    staged = megatron.load(state_dict, "mamba", fields, arguments | {"hybrid_layer_pattern": "M-M|*M-"})
    assert staged.config.hybrid_override_pattern == "M-M*M-"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="begins multi-token prediction"):
        megatron.load(state_dict, "mamba", fields, arguments | {"hybrid_layer_pattern": "M-M*M-/M"})
    by_ratio = arguments | {"hybrid_attention_ratio": 1 / 6, "hybrid_mlp_ratio": 1 / 3}
    with pytest.raises(ConfigError, match="the Megatron state dict lacks"):  # M-M*-M: other layers
        megatron.load(state_dict, "mamba", fields, by_ratio)
