"""Image towers with Megatron's weights against numbers that Megatron-Core 0.16.1 computed."""

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

from megajax.interop import megatron
from megajax.ops.images import pixel_shuffle

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [("mcore_clip_vit", "clip"), ("mcore_radio", "radio")]


def load(case: str, family: str) -> Any:
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    tensors = load_file(GOLDEN / case / "model.safetensors")
    return megatron.load(tensors, family, settings["transformer_config"], settings["model_args"])


@functools.cache
def run(case: str, family: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    pretrained, inputs = load(case, family), np.load(GOLDEN / case / "inputs.npz")

    def loss(params: Any) -> Any:
        output = pretrained.model.apply({"params": params}, inputs["images"])
        return jnp.mean(output * inputs["cotangent"]), output

    (value, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    return value, output, megatron.save(pretrained._replace(params=gradients))


@pytest.mark.parametrize(("case", "family"), CASES)
def test_output_and_gradients_equal_megatrons(case: str, family: str) -> None:
    expected = np.load(GOLDEN / case / "outputs.npz")
    loss, output, gradients = run(case, family)
    np.testing.assert_allclose(output, expected["output"], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        scale = np.abs(reference).max()
        np.testing.assert_allclose(gradients[name], reference, atol=1e-4 * scale, rtol=0, err_msg=name)
    statistics = np.load(GOLDEN / case / "grad_stats.npz")
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, _, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64)
        measured = (np.linalg.norm(g), np.abs(g).max(), g.ravel() @ np.sin(0.7 * np.arange(g.size) + 0.3))
        np.testing.assert_allclose(measured, (norm, top, projection), atol=1e-4 * norm, err_msg=str(name))


@pytest.mark.parametrize(("case", "family"), CASES)
def test_save_inverts_load(case: str, family: str) -> None:
    pretrained, tensors = load(case, family), load_file(GOLDEN / case / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


@pytest.mark.parametrize(("case", "family"), CASES)
def test_folder_round_trip(case: str, family: str, tmp_path: Path) -> None:
    pretrained = load(case, family)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, family).config == pretrained.config


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (32, 32), (48, 16)])
def test_positions_of_other_sizes_equal_megatrons(size: tuple[int, int]) -> None:
    pretrained = load("mcore_radio", "radio")
    grid = [side // 8 for side in size]
    positions = pretrained.model.apply({"params": pretrained.params}, 1, *grid, method="positions")
    expected = np.load(GOLDEN / "mcore_radio" / "outputs.npz")[f"pos_enc_{size[0]}x{size[1]}"]
    np.testing.assert_allclose(positions, expected, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_pixel_shuffle_equals_megatrons(version: int) -> None:
    folder = GOLDEN / "mcore_pixel_shuffle"
    shuffled = pixel_shuffle(jnp.asarray(np.load(folder / "inputs.npz")["x"]), version=version)
    np.testing.assert_array_equal(shuffled, np.load(folder / "outputs.npz")[f"v{version}"])
