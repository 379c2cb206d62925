"""LLaVA with Megatron's and Hugging Face's weights against what those computed."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.interop import hf, megatron

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ["mcore_llava", "mcore_llava_pixelshuffle"]


def load(case: str) -> Any:
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    tensors = load_file(GOLDEN / case / "model.safetensors")
    return megatron.load(tensors, "llava", settings["transformer_config"], settings["model_args"])


@functools.cache
def run(case: str) -> tuple[Any, dict[str, np.ndarray]]:
    pretrained, inputs = load(case), np.load(GOLDEN / case / "inputs.npz")
    given = {name: inputs[name] for name in ("position_ids", "num_image_tiles")}

    def loss(params: Any) -> Any:
        call = functools.partial(pretrained.model.apply, {"params": params}, inputs["images"], inputs["input_ids"])
        losses, mask = call(labels=inputs["labels"], loss_mask=inputs["loss_mask"], **given)
        return (losses * mask).sum() / mask.sum(), (losses, mask, call(**given))

    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    return (value, *outputs), megatron.save(pretrained._replace(params=gradients))


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_megatrons(case: str) -> None:
    expected = np.load(GOLDEN / case / "outputs.npz")
    loss, losses, mask, logits = run(case)[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(mask, expected["new_loss_mask"])
    np.testing.assert_allclose(losses, expected["per_token_loss"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)


def check_gradients(folder: Path, gradients: dict[str, np.ndarray]) -> None:
    for name, reference in load_file(folder / "grads.safetensors").items():
        scale = np.abs(reference).max()
        np.testing.assert_allclose(gradients[name], reference, atol=1e-4 * scale + 1e-8, rtol=0, err_msg=name)
    statistics = np.load(folder / "grad_stats.npz")
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, _, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64)
        measured = (np.linalg.norm(g), np.abs(g).max(), g.ravel() @ np.sin(0.7 * np.arange(g.size) + 0.3))
        np.testing.assert_allclose(measured, (norm, top, projection), atol=1e-4 * norm + 1e-7, err_msg=str(name))


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_megatrons(case: str) -> None:
    check_gradients(GOLDEN / case, run(case)[1])


@pytest.mark.parametrize("case", CASES)
def test_save_inverts_load(case: str, tmp_path: Path) -> None:
    pretrained, tensors = load(case), load_file(GOLDEN / case / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, "llava").config == pretrained.config


def test_hugging_face(tmp_path: Path) -> None:
    folder = GOLDEN / "hf_llava"
    pretrained, inputs, expected = hf.load(folder), np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    labels = np.roll(inputs["labels"], -1, axis=1)
    kept = (labels >= 0) & (np.arange(labels.shape[1]) < labels.shape[1] - 1)

    def loss(params: Any) -> Any:
        call = functools.partial(pretrained.model.apply, {"params": params})
        losses, _ = call(inputs["pixel_values"], inputs["input_ids"], labels=np.maximum(labels, 0))
        return jnp.sum(losses * kept) / kept.sum(), call(inputs["pixel_values"], inputs["input_ids"])

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    hf.save(pretrained._replace(params=gradients), tmp_path / "gradients")
    check_gradients(folder, load_file(tmp_path / "gradients" / "model.safetensors"))
    hf.save(pretrained, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(saved.pop(name), value, err_msg=name)
    assert not saved
    assert hf.load(tmp_path / "saved").config == pretrained.config
