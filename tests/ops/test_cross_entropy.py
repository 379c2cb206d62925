"""Cross entropy against Megatron's (tests/golden/mcore_cross_entropy); the fused loss against the plain one."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops import cross_entropy as module
from megajax.ops.cross_entropy import (
    CrossEntropyOptions,
    LinearCrossEntropy,
    cross_entropy,
    fused_linear_cross_entropy,
)


@pytest.mark.parametrize(("name", "smoothing"), [("ce_ls0.0", 0.0), ("ce_ls0.1", 0.1), ("fused_ce", 0.0)])
def test_loss_and_gradient_equal_megatrons(golden: Path, name: str, smoothing: float) -> None:
    inputs, expected = (np.load(golden / "mcore_cross_entropy" / f"{file}.npz") for file in ("inputs", "outputs"))
    options = CrossEntropyOptions(vocab_size=33, label_smoothing=smoothing)
    loss, pullback = jax.vjp(
        lambda z: cross_entropy(z, jnp.asarray(inputs["target"]), options), jnp.asarray(inputs["logits"])
    )
    np.testing.assert_allclose(loss, expected[name], atol=1e-6, rtol=1e-5)
    rtol = 2**-8 if name == "fused_ce" else 1e-5  # Megatron's fused kernel rounds its gradient to bf16
    gradient = pullback(jnp.asarray(inputs["cotangent"]))[0]
    np.testing.assert_allclose(gradient, expected[f"{name}/grad"], atol=1e-6, rtol=rtol)


def test_label_outside_the_vocabulary_is_finite_as_in_megatron(golden: Path) -> None:
    inputs, expected = (np.load(golden / "mcore_cross_entropy" / f"{file}.npz") for file in ("inputs", "outputs"))
    target = inputs["target"].copy()
    target[0, 0] = -100
    loss = cross_entropy(jnp.asarray(inputs["logits"]), jnp.asarray(target), CrossEntropyOptions(33))
    np.testing.assert_allclose(loss, expected["ce_with_-100"], atol=1e-6, rtol=1e-5)


def test_padding_ids_get_no_probability_and_no_gradient() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(3, 12)).astype(np.float32), jnp.array([0, 5, 9])
    options = CrossEntropyOptions(vocab_size=10, label_smoothing=0.2, z_loss_coeff=0.1)
    padded, gradient = jax.value_and_grad(lambda z: cross_entropy(z, labels, options).sum())(logits)
    plain = cross_entropy(jnp.asarray(logits[:, :10]), labels, options).sum()
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 10:], 0)


def test_z_loss_in_float64() -> None:
    logits = np.random.default_rng(2).normal(size=(4, 7))
    labels = np.array([1, 2, 3, 4])
    log_sum = np.log(np.exp(logits).sum(-1))
    expected = log_sum - logits[np.arange(4), labels] + 0.01 * log_sum**2
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), CrossEntropyOptions(7, z_loss_coeff=0.01))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


OPTIONS = {
    "plain": CrossEntropyOptions(24),
    "padded vocabulary": CrossEntropyOptions(21),
    "label smoothing": CrossEntropyOptions(24, label_smoothing=0.1),
    "z-loss": CrossEntropyOptions(24, z_loss_coeff=0.01),
    "all": CrossEntropyOptions(21, label_smoothing=0.1, z_loss_coeff=0.01),
}


@pytest.mark.parametrize(
    ("options", "softcap"),
    [*((options, None) for options in OPTIONS.values()), (OPTIONS["all"], 2.0)],
    ids=[*OPTIONS, "soft cap"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_loss_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, options: CrossEntropyOptions, softcap: float | None, dtype: Any
) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 2 * 24 * 2)  # three chunks of two positions
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), dtype)
    kernel = jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 21, size=(2, 6))).at[0, 0].set(-100)
    weights = jnp.asarray(rng.uniform(size=(2, 6)), jnp.float32)
    assert module.num_chunks(2, 6, 24) == 3

    def plain(x: Any, kernel: Any, weights: Any) -> Any:
        logits = jnp.einsum("BSD,DV->BSV", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jnp.sum(weights * cross_entropy(logits, labels, options))

    def fused(x: Any, kernel: Any, weights: Any) -> Any:
        computation = LinearCrossEntropy(options, softcap=softcap)
        return fused_linear_cross_entropy(x, kernel, labels, weights, computation).weighted_sum

    arguments = (x, kernel, weights)
    expected, expected_gradients = jax.value_and_grad(lambda a: 3 * plain(*a))(arguments)
    got, gradients = jax.value_and_grad(lambda a: 3 * fused(*a))(arguments)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == reference.dtype
        scale = float(jnp.abs(reference.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(reference, np.float32), atol=tolerance * scale, rtol=0
        )


def test_fused_loss_reports_every_token() -> None:
    rng = np.random.default_rng(4)
    x, kernel = jnp.asarray(rng.normal(size=(1, 5, 4)), jnp.float32), jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 9, size=(1, 5)))
    fused = fused_linear_cross_entropy(x, kernel, labels, jnp.ones((1, 5)), LinearCrossEntropy(CrossEntropyOptions(9)))
    np.testing.assert_allclose(fused.per_token, cross_entropy(x @ kernel, labels, CrossEntropyOptions(9)), rtol=1e-5)
    np.testing.assert_allclose(fused.weighted_sum, fused.per_token.sum(), rtol=1e-6)


def test_bias_of_the_fused_loss_equals_the_plain_one() -> None:
    key = jax.random.split(jax.random.key(3), 4)
    x, kernel = jax.random.normal(key[0], (2, 6, 8)), jax.random.normal(key[1], (8, 12))
    bias, weights = jax.random.normal(key[2], (12,)), jax.random.uniform(key[3], (2, 6))
    labels, options = jnp.arange(12).reshape(2, 6) % 11, CrossEntropyOptions(11)

    def plain(x: Any, kernel: Any, bias: Any) -> Any:
        return jnp.sum(weights * cross_entropy(x @ kernel + bias, labels, options))

    def fused(x: Any, kernel: Any, bias: Any) -> Any:
        computation = LinearCrossEntropy(options)
        return fused_linear_cross_entropy(x, kernel, labels, weights, computation, bias_V=bias).weighted_sum

    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(x, kernel, bias)
    got = jax.value_and_grad(fused, argnums=(0, 1, 2))(x, kernel, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, expected)
