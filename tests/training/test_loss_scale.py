"""Loss scaling against Megatron's rules, written again as a plain Python loop."""

# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megajax.config import ConfigError, OptimizerConfig
from megajax.training.loss_scale import all_finite, init_loss_scale, unscale, update

CONFIG = OptimizerConfig(initial_loss_scale=4.0, min_loss_scale=1.0, loss_scale_window=2, hysteresis=2)


@functools.partial(jax.jit, static_argnums=0)
def run(config, finite):
    """The scale, growth tracker and hysteresis after each step."""

    def step(state, finite):
        state = update(config, state, finite)
        return state, state

    return jax.lax.scan(step, init_loss_scale(config), finite)[1]


def test_published_vector():
    """Overflow uses hysteresis, the second halves, two good steps double."""
    states = run(CONFIG, jnp.array([False, False, True, True]))
    np.testing.assert_array_equal(states.scale, [4, 2, 2, 4])
    np.testing.assert_array_equal(states.hysteresis, [1, 0, 0, 2])
    np.testing.assert_array_equal(states.growth_tracker, [0, 0, 1, 0])


def megatron(finite, scale=4.0, window=2, hysteresis=2, minimum=1.0):
    tracker, left, trace = 0, hysteresis, []
    for ok in finite:
        if ok:
            tracker += 1
            if tracker == window:
                tracker, left, scale = 0, hysteresis, scale * 2
        else:
            tracker, left = 0, left - 1
            if left <= 0:
                scale = max(scale / 2, minimum)
        trace.append((scale, tracker, left))
    return trace


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=16, max_size=16))
def test_any_history_equals_the_plain_loop(finite):
    np.testing.assert_array_equal(np.stack(run(CONFIG, jnp.array(finite)), axis=1), megatron(finite))


def test_constant_scale_never_moves():
    config = OptimizerConfig(loss_scale=128.0, loss_scale_window=1)
    np.testing.assert_array_equal(run(config, jnp.array([True, False, False, True])).scale, [128.0] * 4)


def test_default_starts_at_two_to_the_32():
    assert float(init_loss_scale(OptimizerConfig()).scale) == 2.0**32


def test_unscale_divides_in_float32():
    state = init_loss_scale(OptimizerConfig(loss_scale=2.0**20))
    grads = unscale({"a": jnp.full((2,), 3.0, jnp.float16)}, state)
    assert grads["a"].dtype == jnp.float32
    np.testing.assert_array_equal(grads["a"], np.full((2,), 3.0 / 2**20, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_finds_one_bad_number(bad):
    tree = {"a": jnp.ones((3, 4)), "b": [jnp.zeros(5), jnp.ones(())]}
    assert all_finite(tree)
    tree["b"][0] = tree["b"][0].at[2].set(bad)
    assert not all_finite(tree)


def test_a_scale_below_its_minimum_is_refused():
    with pytest.raises(ConfigError, match=r"min_loss_scale=8\.0.*initial_loss_scale=4\.0"):
        init_loss_scale(OptimizerConfig(initial_loss_scale=4.0, min_loss_scale=8.0))
