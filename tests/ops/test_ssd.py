"""The chunked scan, the single step and the convolution against the recurrences they stand for, in float64."""

# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops import ssd

B, S, H, G, P, N, K = 2, 19, 4, 2, 3, 5, 4


@functools.cache
def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(B, S, H, P)),
        "dt": rng.gamma(1.0, 0.7, size=(B, S, H)),
        "A": -rng.uniform(0.2, 3, size=H),
        "b": rng.normal(size=(B, S, G, N)),
        "c": rng.normal(size=(B, S, G, N)),
        "state": rng.normal(size=(B, H, P, N)),
        "starts": rng.random((B, S)) < 0.15,
    }


def recurrence(x, dt, A, b, c, state=None, starts=None):
    """The definition, token by token."""
    state = np.zeros((B, H, P, N)) if state is None else state.copy()
    y = np.empty((*dt.shape, P))
    for t in range(x.shape[1]):
        for i in range(x.shape[0]):
            for h in range(H):
                g = h * G // H
                before = 0 if starts is not None and starts[i, t] else state[i, h]
                state[i, h] = np.exp(dt[i, t, h] * A[h]) * before + dt[i, t, h] * np.outer(x[i, t, h], b[i, t, g])
                y[i, t, h] = state[i, h] @ c[i, t, g]
    return y, state


CASES = [(), ("state",), ("starts",), ("state", "starts")]


@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, 19, 128])
def test_scan_is_the_recurrence(given, chunk_size):
    it = inputs()
    options = {name: it[name] for name in given}
    wanted = recurrence(*(it[name] for name in ("x", "dt", "A", "b", "c")), **options)
    options = {f"{name}_{'BHPN' if name == 'state' else 'BS'}": value for name, value in options.items()}
    scan = jax.jit(ssd.ssd_scan, static_argnames="chunk_size")
    found = scan(*(it[name] for name in ("x", "dt", "A", "b", "c")), **options, chunk_size=chunk_size)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


def test_steps_are_the_recurrence():
    it = inputs()
    wanted_y, wanted_state = recurrence(it["x"], it["dt"], it["A"], it["b"], it["c"], it["state"])
    state, step = jnp.asarray(it["state"], jnp.float32), jax.jit(ssd.ssd_step)
    for t in range(S):
        y, state = step(it["x"][:, t], it["dt"][:, t], it["A"], it["b"][:, t], it["c"][:, t], state)
        np.testing.assert_allclose(y, wanted_y[:, t], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(state, wanted_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
def test_a_state_before_can_be_added_afterwards(reset):
    it = inputs()
    x, dt, A, b, c = (jnp.asarray(it[name], jnp.float32) for name in ("x", "dt", "A", "b", "c"))
    starts = jnp.asarray(it["starts"]) if reset else None
    scan = jax.jit(ssd.ssd_scan, static_argnames="chunk_size")
    y, final = scan(x, dt, A, b, c, None, starts, chunk_size=8)
    y += ssd.ssd_of_state(dt, A, c, it["state"], starts)  # pyright: ignore
    final += ssd.ssd_kept(dt, A, starts)[..., None, None] * it["state"]
    wanted = scan(x, dt, A, b, c, it["state"], starts, chunk_size=8)
    np.testing.assert_allclose(y, wanted[0], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(final, wanted[1], atol=2e-5, rtol=2e-5)


def test_gradients_do_not_depend_on_chunks_and_are_finite_where_decays_underflow():
    it = inputs()
    names = ("x", "dt", "A", "b", "c", "state")
    values = {name: jnp.asarray(it[name], jnp.float32) for name in names}
    values["dt"] = values["dt"] * 40

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(values, chunk_size):
        def loss(values):
            y, state = ssd.ssd_scan(*(values[name] for name in names), it["starts"], chunk_size=chunk_size)  # pyright: ignore
            return jnp.sum(jnp.sin(y)) + jnp.sum(state**2) / 1e4

        return jax.grad(loss)(values)

    one, other = gradients(values, 1), gradients(values, 8)
    for name in names:
        assert np.isfinite(other[name]).all(), name
        np.testing.assert_allclose(other[name], one[name], atol=2e-3 * np.abs(one[name]).max(), err_msg=name)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(reset, bias):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(B, S + K - 1, 6)), rng.normal(size=(K, 1, 6))
    biases = rng.normal(size=6) if bias else None
    starts = rng.random((B, S + K - 1)) < 0.3 if reset else np.zeros((B, S + K - 1), bool)
    wanted = np.zeros((B, S, 6))
    for i in range(B):
        for t in range(S):
            for back in range(K):
                at = t + K - 1 - back
                if back and starts[i, at + 1]:
                    break
                wanted[i, t] += x[i, at] * kernel[K - 1 - back, 0]
    wanted += 0 if biases is None else biases
    wanted = wanted / (1 + np.exp(-wanted))
    found = jax.jit(ssd.causal_conv1d)(x, kernel, biases, starts if reset else None)
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_gated_norm():
    rng = np.random.default_rng(2)
    y, gate, scale = rng.normal(size=(B, 3, 12)), rng.normal(size=(B, 3, 12)), rng.normal(size=12)
    product = (y * gate / (1 + np.exp(-gate))).reshape(B, 3, G, 6)
    wanted = (product / np.sqrt((product**2).mean(-1, keepdims=True) + 1e-3)).reshape(y.shape) * scale
    found = ssd.gated_group_rms_norm(y, gate, scale, groups=G, epsilon=1e-3)  # pyright: ignore
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
