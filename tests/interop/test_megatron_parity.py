"""GPT with Megatron's weights against numbers that Megatron-Core 0.16.1 computed (tests/golden/mcore_*)."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.transformer.block import stack_layout
from megajax.transformer.stack import locate

GOLDEN = Path(__file__).parents[1] / "golden"
EXPERTS = ["mcore_gpt_mtp", "mcore_mixtral", "mcore_deepseek_v3", "mcore_moe_capacity_drop", "mcore_moe_sinkhorn"]
CASES = ["mcore_gpt3", "mcore_llama", "mcore_llama_yarn", "mcore_mrope", "mcore_swa", *EXPERTS]
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 512,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
"""What was set on the config object of mcore_llama_yarn, whose config.json holds declared fields only."""


class Run(NamedTuple):
    loss: Any
    per_token_loss: Any
    logits: Any
    layers: list[Any]
    gradients: dict[str, np.ndarray]


def load(case: str) -> tuple[Pretrained, dict[str, np.ndarray]]:
    """(model, Megatron's state dict)."""
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    state_dict = load_file(GOLDEN / case / "model.safetensors")
    fields = settings["transformer_config"] | (YARN if case == "mcore_llama_yarn" else {})
    return megatron.load(state_dict, "gpt", fields, settings["model_args"]), state_dict


@functools.cache
def run(case: str) -> Run:
    """One forward and backward pass with everything that the oracle recorded."""
    pretrained, _ = load(case)
    inputs = np.load(GOLDEN / case / "inputs.npz")
    batch = {"position_ids": inputs["position_ids"]}

    def loss_of(params: Any) -> Any:
        variables = {"params": params}
        per_token = pretrained.model.apply(
            variables, inputs["tokens"], labels=inputs["labels"], loss_mask=inputs["loss_mask"], **batch
        )
        logits, recorded = pretrained.model.apply(variables, inputs["tokens"], **batch, mutable=["intermediates"])
        loss = (per_token * inputs["loss_mask"]).sum() / inputs["loss_mask"].sum()
        return loss, (per_token, logits, recorded["intermediates"]["decoder"])

    (loss, (per_token, logits, recorded)), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        pretrained.params
    )
    segments = stack_layout(pretrained.config, pretrained.model.layer_specs)
    layers = []
    for layer in range(pretrained.config.num_layers):
        stack, row = locate(segments, layer)
        layers.append(recorded[stack][0][row])
    return Run(loss, per_token, logits, layers, megatron.save(pretrained._replace(params=gradients)))


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_layer_equal_megatrons(case: str) -> None:
    expected, got = np.load(GOLDEN / case / "outputs.npz"), run(case)
    for i, layer in enumerate(got.layers):
        reference = expected[f"out/decoder.layers.{i}"].swapaxes(0, 1)
        np.testing.assert_allclose(layer, reference, atol=2e-5, rtol=1e-4, err_msg=f"layer {i}")
    if "logits" in expected:
        np.testing.assert_allclose(got.logits, expected["logits"], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(got.per_token_loss, expected["per_token_loss"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got.loss, expected["loss"], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_every_parameter_equals_megatrons(case: str) -> None:
    gradients = run(case).gradients
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        scale = np.abs(reference).max()
        np.testing.assert_allclose(gradients[name], reference, atol=1e-4 * scale, rtol=0, err_msg=name)
    statistics = np.load(GOLDEN / case / "grad_stats.npz")
    gradients = {name: g for name, g in gradients.items() if not name.endswith("expert_bias")}
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, total, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64)
        weights = np.sin(0.7 * np.arange(g.size) + 0.3)
        measured = (np.linalg.norm(g), g.sum(), np.abs(g).max(), (g.ravel() * weights).sum())
        tolerance = 1e-4 * norm
        np.testing.assert_allclose(measured[0], norm, atol=tolerance, err_msg=str(name))
        np.testing.assert_allclose(measured[1], total, atol=tolerance * np.sqrt(g.size), err_msg=str(name))
        np.testing.assert_allclose(measured[2], top, atol=tolerance, err_msg=str(name))
        np.testing.assert_allclose(measured[3], projection, atol=tolerance, err_msg=str(name))


@pytest.mark.parametrize("case", [*CASES, "mcore_llama_decode"])
def test_save_inverts_load_bit_for_bit(case: str) -> None:
    pretrained, state_dict = load(case)
    saved = megatron.save(pretrained)
    assert list(saved) == list(dict.fromkeys(saved))
    assert sorted(saved) == sorted(state_dict)
    for name, value in state_dict.items():
        assert saved[name].dtype == value.dtype
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
