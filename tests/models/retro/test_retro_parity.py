"""RETRO with Megatron's weights against numbers that Megatron-Core 0.15.3 computed."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError
from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained

GOLDEN = Path(__file__).parents[2] / "golden"
CASE = GOLDEN / "mcore_retro"
OPTIONS = GOLDEN / "mcore_retro_options"
NAMES = sorted(path.stem for path in OPTIONS.glob("*.json"))
NOISE = 5e-7
"""What is left of gradients that are zero, such as that of the bias of keys."""


def from_megatron() -> Pretrained:
    settings = json.loads((CASE / "config.json").read_text())
    tensors = load_file(CASE / "model.safetensors")
    return megatron.load(tensors, "retro", settings["transformer_config"], settings["model_args"])


def _measured(gradient: np.ndarray) -> tuple[float, float, float]:
    """(norm, largest, a projection that tells a transpose)."""
    g = gradient.astype(np.float64).ravel()
    return float(np.linalg.norm(g)), float(np.abs(g).max()), float(g @ np.sin(0.7 * np.arange(g.size) + 0.3))


@functools.cache
def run() -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
    """(loss, loss of each token, logits and hidden states, gradients by Megatron's names)."""
    inputs, pretrained = np.load(CASE / "inputs.npz"), from_megatron()
    given = {name: inputs[name] for name in ("position_ids", "context_position_ids")}
    kept = inputs["loss_mask"]
    texts = inputs["tokens"], inputs["context_input_ids"]

    def loss(params: Any) -> Any:
        variables, weights = {"params": params}, jnp.asarray(kept / kept.sum(), jnp.float32)
        logits, recorded = pretrained.model.apply(variables, *texts, **given, mutable=["intermediates"])
        per_token = pretrained.model.apply(variables, *texts, **given, labels=inputs["labels"])
        losses: Any = pretrained.model.apply(variables, *texts, inputs["labels"], weights, **given, method="loss_sum")
        return losses.weighted_sum, (per_token, logits, recorded)

    (value, (per_token, logits, recorded)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        pretrained.params
    )
    return value, per_token, (logits, recorded), megatron.save(pretrained._replace(params=gradients))


def test_output_and_loss_equal_megatrons() -> None:
    value, per_token, (logits, recorded), _ = run()
    expected = np.load(CASE / "outputs.npz")
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(per_token, expected["per_token_loss"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    stacks = recorded["intermediates"]["decoder"]
    for name, (stack, row) in {"4": ("layers_0", 4), "5": ("layers_5", 0)}.items():
        reference = expected[f"out/decoder.layers.{name}"].swapaxes(0, 1)
        np.testing.assert_allclose(stacks[stack][0][row], reference, atol=1e-4, rtol=1e-4, err_msg=name)


def test_gradients_equal_megatrons() -> None:
    gradients = run()[3]
    for name, reference in load_file(CASE / "grads.safetensors").items():
        tolerance = max(1e-4 * np.abs(reference).max(), NOISE)
        np.testing.assert_allclose(gradients[name], reference, atol=tolerance, rtol=0, err_msg=name)
    statistics = np.load(CASE / "grad_stats.npz")
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, _, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        tolerance = max(1e-4 * norm, NOISE)
        wanted = (norm, top, projection)
        np.testing.assert_allclose(_measured(gradients[str(name)]), wanted, atol=tolerance, err_msg=str(name))


def test_megatron_weights_round_trip(tmp_path: Path) -> None:
    pretrained, tensors = from_megatron(), load_file(CASE / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, "retro").config == pretrained.config


def test_what_megatron_has_no_name_for_is_not_written(tmp_path: Path) -> None:
    pretrained: Any = from_megatron()
    config = pretrained.config.replace(position_embedding_type="rope", retro_encoder_rotary=True)
    with pytest.raises(ConfigError, match="retro_encoder_rotary=True cannot be expressed"):
        megatron.save_folder(pretrained._replace(config=config), tmp_path)


def _te_name(name: str) -> str:
    """What Transformer Engine's layers call a tensor: norms lie inside of the linear behind them, but where there is
    cross-attention between, or where RETRO has its own."""
    name = re.sub(r"\.input_layernorm\.", ".self_attention.linear_qkv.layer_norm_", name)
    return re.sub(r"\.pre_mlp_layernorm\.(weight|bias)$", r".mlp.linear_fc1.layer_norm_\1", name)


def test_names_of_transformer_engines_layers_are_read() -> None:
    settings = json.loads((CASE / "config.json").read_text())
    tensors = {_te_name(name): value for name, value in load_file(CASE / "model.safetensors").items()}
    encoder = "decoder.layers.5.cross_attention.encoder.layers"
    assert f"{encoder}.0.pre_mlp_layernorm.norm.weight" in tensors
    assert f"{encoder}.1.mlp.linear_fc1.layer_norm_weight" in tensors
    loaded = megatron.load(tensors, "retro", settings["transformer_config"], settings["model_args"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params, from_megatron().params)


@pytest.mark.parametrize("name", NAMES)
def test_other_options_equal_megatrons(name: str) -> None:
    settings, arrays = json.loads((OPTIONS / f"{name}.json").read_text()), np.load(OPTIONS / f"{name}.npz")
    tensors = {key.removeprefix("model/"): arrays[key] for key in arrays.files if key.startswith("model/")}
    pretrained = megatron.load(tensors, "retro", settings["transformer_config"], settings["model_args"])
    assert pretrained.config.post_layer_norm == ("decoder.final_layernorm.weight" in tensors)  # type: ignore[attr-defined]

    def loss(params: Any) -> Any:
        variables, texts = {"params": params}, (arrays["tokens"], arrays["context_tokens"])
        losses = pretrained.model.apply(variables, *texts, labels=arrays["labels"])
        return jnp.mean(losses), pretrained.model.apply(variables, *texts)  # type: ignore[arg-type]

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(value, arrays["loss"], atol=1e-5)
    named = megatron.save(pretrained._replace(params=gradients))
    assert sorted(named) == sorted(arrays["gradient_names"])
    for key, (norm, projection) in zip(arrays["gradient_names"], arrays["gradient_stats"], strict=True):
        found, _, projected = _measured(named[str(key)])
        tolerance = max(1e-4 * norm, NOISE)
        np.testing.assert_allclose((found, projected), (norm, projection), atol=tolerance, err_msg=str(key))
    saved = megatron.save(pretrained)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(saved[key], tensor, err_msg=key)
