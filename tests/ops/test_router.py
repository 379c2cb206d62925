"""Routing and balancing losses against Megatron-Core 0.16.1 (tests/golden/mcore_router, mcore_moe_losses)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.attach import attach
from megajax.ops.router import Routing, load_balancing_loss, route, sinkhorn, z_loss

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = json.loads((GOLDEN / "mcore_router" / "settings.json").read_text())
LOSSES = [
    f"{kind}_{score}{mask}"
    for kind in ("aux", "seq_aux")
    for score in ("softmax", "sigmoid")
    for mask in ("", "_padmask")
]


def _rule(settings: dict[str, Any]) -> Routing:
    score = settings.get("score_function", "softmax")
    return Routing(
        top_k=settings["topk"],
        score="pre_softmax" if settings.get("use_pre_softmax") else score,
        groups=settings.get("num_groups"),
        group_top_k=settings.get("group_topk"),
        group_score_top_k=settings["topk"] // settings.get("group_topk", 1),
        scaling_factor=settings.get("scaling_factor"),
    )


@pytest.mark.parametrize("case", SETTINGS)
def test_route_is_megatrons(case: str) -> None:
    inputs, expected = (np.load(GOLDEN / "mcore_router" / name) for name in ("inputs.npz", "outputs.npz"))
    settings, E = SETTINGS[case], inputs["logits"].shape[1]
    bias = jnp.asarray(inputs["expert_bias"]) if settings.get("expert_bias") else None

    def dense(logits: jax.Array) -> tuple[jax.Array, Any]:
        ids, weights = route(logits, _rule(settings), bias)
        chosen = jax.nn.one_hot(ids, E)
        probs = jnp.einsum("nk,nke->ne", weights, chosen)
        return jnp.sum(probs * inputs["probs_cotangent"]), (probs, chosen.sum(1))

    grads, (probs, chosen) = jax.grad(dense, has_aux=True)(jnp.asarray(inputs["logits"]))
    np.testing.assert_array_equal(chosen, expected[f"{case}/map"])
    np.testing.assert_allclose(probs, expected[f"{case}/probs"], atol=1e-6)
    np.testing.assert_allclose(grads, expected[f"{case}/grad_logits"], atol=1e-6)


@pytest.mark.parametrize("case", [*LOSSES, "z_loss", "z_loss_padmask"])
def test_losses_are_megatrons(case: str) -> None:
    inputs, expected = (np.load(GOLDEN / "mcore_moe_losses" / name) for name in ("inputs.npz", "outputs.npz"))
    seq, batch, coefficient = 12, 3, 0.01
    keep = ~inputs["padding_mask"].astype(bool).T if case.endswith("padmask") else None

    def loss(logits: jax.Array) -> jax.Array:
        logits_BSE = logits.reshape(seq, batch, -1).swapaxes(0, 1)
        if case.startswith("z_loss"):
            return coefficient * z_loss(logits_BSE, keep)
        rule = Routing(top_k=2, score="sigmoid" if "sigmoid" in case else "softmax")
        per_sequence = case.startswith("seq")
        return coefficient * load_balancing_loss(logits_BSE, rule, per_sequence=per_sequence, keep_BS=keep)

    value, grads = jax.value_and_grad(loss)(jnp.asarray(inputs["logits"]))
    np.testing.assert_allclose(value, expected[case], rtol=1e-5)
    np.testing.assert_allclose(grads, expected[f"{case}/grad"], atol=1e-7, rtol=1e-4)


def test_sinkhorn_is_megatrons() -> None:
    inputs, expected = (np.load(GOLDEN / "mcore_moe_losses" / name) for name in ("inputs.npz", "outputs.npz"))
    np.testing.assert_allclose(sinkhorn(jnp.asarray(inputs["logits"])), expected["sinkhorn"], rtol=1e-4, atol=1e-7)


def test_attach_leaves_the_value_and_adds_the_gradient() -> None:
    def plain(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x)) + 0.3 * jnp.sum(x**2)

    def attached(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attach(x, jnp.sum(x**2), jnp.float32(0.3))))

    x = jnp.arange(4.0)
    np.testing.assert_allclose(attached(x), jnp.sum(jnp.sin(x)))
    np.testing.assert_allclose(jax.grad(attached)(x), jax.grad(plain)(x), rtol=1e-6)
