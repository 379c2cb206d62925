"""Muon against a float64 numpy loop, and the property it is named for."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megajax.config import ConfigError, OptimizerConfig
from megajax.training.muon import newton_schulz_coefficients, orthogonalize, update_scale
from megajax.training.optimizer import make_optimizer

# The polynomials once more, as factors of (X, X X^T X, X X^T X X^T X).
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
SIMPLE = [(3.4445, -4.7750, 2.0315)]
POLAR = [
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.8750, -1.2500, 0.3750),
]
STEPS = {("quintic", 5): QUINTIC, ("quintic", 10): QUINTIC * 2, ("simple", 3): SIMPLE * 3}
STEPS |= {("polar_express", 8): POLAR, ("polar_express", 10): POLAR + POLAR[-1:] * 2}


compiled_orthogonalize = jax.jit(orthogonalize, static_argnums=1)


def by_singular_values(matrix, steps):
    """The iteration acts on each singular value alone: s <- a s + b s^3 + c s^5."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("key", STEPS, ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 1), (2, 5, 7)])
def test_newton_schulz_equals_the_polynomial_of_the_singular_values(key, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = compiled_orthogonalize(jnp.asarray(x), newton_schulz_coefficients(*key))
    want = np.stack([by_singular_values(m, STEPS[key]) for m in x.reshape(-1, *shape[-2:])]).reshape(shape)
    np.testing.assert_allclose(got, want, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(8, 8), (5, 12), (12, 5)]), st.integers(0, 2**31), st.floats(-6, 6))
def test_the_update_is_nearly_orthogonal_at_any_scale(shape, seed, exponent):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 10.0**exponent, jnp.float32)
    y = np.asarray(compiled_orthogonalize(x, newton_schulz_coefficients("polar_express", 12)))
    rows = y if shape[0] <= shape[1] else y.T
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    if s[-1] > 1e-3 * s[0]:  # far smaller singular values need more steps
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=5e-2)
        np.testing.assert_allclose(y, u @ vt, atol=5e-2)


def test_a_zero_gradient_stays_zero():
    assert not jnp.any(orthogonalize(jnp.zeros((3, 4)), newton_schulz_coefficients("quintic", 5)))


def numpy_muon(p, grads, *, lr, wd, momentum, nesterov, steps, scale):
    """One matrix [in, out] after every step, float64."""
    m, trace = np.zeros_like(p), []
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g if nesterov else m
        p = p - lr * wd * p - lr * scale * by_singular_values(u, steps)
        trace.append(p)
    return trace


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("mode", "scale"), [("spectral", 3.0), ("unit_rms_norm", 0.5**0.5), ("shape_scaling", 1.0)])
def test_steps_on_stacked_layers_equal_one_matrix_at_a_time(nesterov, mode, scale):
    axes = {"kernel": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
    rng = np.random.default_rng(3)
    shapes = {"kernel": (2, 9, 4), "down": (2, 4, 9)}
    scales = {"kernel": {"unit_rms_norm": 2 / 3}.get(mode, scale), "down": {"spectral": 3.0}.get(mode, 1.5)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)]
    config = OptimizerConfig(
        optimizer="muon",
        muon_momentum=0.9,
        muon_use_nesterov=nesterov,
        muon_scale_mode=mode,
        muon_extra_scale_factor=0.2,
    )
    optimizer = make_optimizer(config, axes)
    to_jax = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got, update = (
        to_jax(params),
        jax.jit(lambda g, s, p: optimizer.update(g, s, p, learning_rate=0.1, weight_decay=0.3)),
    )
    state, trace = optimizer.init(got), []
    for g in grads:
        updates, state = update(to_jax(g), state, got)
        got = optax.apply_updates(got, updates)
        trace.append(got)
    options = {"lr": 0.1, "wd": 0.3, "momentum": 0.9, "nesterov": nesterov, "steps": QUINTIC}
    for name in shapes:
        for layer in range(2):
            history = [g[name][layer] for g in grads]
            want = numpy_muon(params[name][layer], history, scale=scales[name] * 0.2, **options)
            for step, value in enumerate(want):
                np.testing.assert_allclose(trace[step][name][layer], value, atol=2e-5)


def test_scales_use_input_and_output_sizes():
    assert update_scale(4, 16, "spectral") == update_scale(16, 4, "spectral") == 4
    assert update_scale(4, 16, "unit_rms_norm") == 2
    assert update_scale(16, 4, "unit_rms_norm") == 0.5
    assert update_scale(4, 16, "shape_scaling") == 2
    assert update_scale(16, 4, "shape_scaling") == 1


@pytest.mark.parametrize(("kind", "steps"), [("quintic", 6), ("polar_express", 5), ("simple", 0)])
def test_step_counts_that_do_not_fit_are_refused(kind, steps):
    config = OptimizerConfig(optimizer="muon", muon_coefficient_type=kind, muon_num_ns_steps=steps)
    with pytest.raises(ConfigError, match=f"muon_num_ns_steps={steps} .*{kind}"):
        make_optimizer(config, {"kernel": ("embed", "mlp")})
