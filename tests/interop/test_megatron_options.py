"""Every option of dense GPT that changes numbers, against Megatron-Core itself (tests/golden/make_megatron_options)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.interop import megatron

FOLDER = Path(__file__).parents[1] / "golden" / "megatron_options"
CASES = json.loads((FOLDER / "cases.json").read_text())


def random_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """What `make_megatron_options.py` gave to Megatron: RandomState's stream is frozen by NumPy's promise."""
    rng, weights = np.random.RandomState(7), {}
    for name in sorted(shapes):
        value = rng.standard_normal(shapes[name])
        if len(shapes[name]) == 2:
            value = value * (0.5 if "embedding" in name else shapes[name][1] ** -0.5)
        elif name.endswith("bias"):
            value = 0.2 * value
        elif "norm" in name:
            value = 1 + 0.2 * value
        weights[name] = value.astype(np.float32)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_option_computes_what_megatron_computes(name: str) -> None:
    case, expected = CASES[name], np.load(FOLDER / "outputs.npz")
    weights = random_weights(case["shapes"])
    pretrained = megatron.load(weights, "gpt", case["config"], case["model_kwargs"])

    def loss_of(params: Any) -> Any:
        logits: Any = pretrained.model.apply({"params": params}, expected["tokens"])
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, expected["labels"][..., None], axis=-1).mean(), logits

    # Tiny and run once: the compiler's time is all that counts.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), compiler_options=quick)
    (loss, logits), gradients = step(pretrained.params)
    np.testing.assert_allclose(logits, expected[f"{name}/logits"], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(loss, expected[f"{name}/loss"], atol=1e-5)
    got = megatron.save(pretrained._replace(params=gradients))
    assert sorted(got) == sorted(case["shapes"])
    for key, (norm, projection) in zip(sorted(got), expected[f"{name}/gradients"], strict=True):
        g = got[key].astype(np.float64)
        assert np.linalg.norm(g) == pytest.approx(norm, abs=1e-4 * norm + 1e-7), key
        measured = (g.ravel() * np.sin(0.7 * np.arange(g.size) + 0.3)).sum()
        assert measured == pytest.approx(projection, abs=1e-4 * norm + 1e-7), key
    for key, value in megatron.save(pretrained).items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)
