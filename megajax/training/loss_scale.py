"""Loss scaling for fp16: constant, or dynamic with hysteresis (`megatron/core/optimizer/grad_scaler.py`).

scaled_loss = loss * state.scale
grads = unscale(jax.grad(scaled_loss), state)
finite = all_finite(grads)            # not finite: skip the update, and do not advance the schedules
state = update(config, state, finite)
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from megajax.config import ConfigError, OptimizerConfig

GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5


class LossScaleState(NamedTuple):
    """The loss scale and what decides its next change; all scalars."""

    scale: jax.Array
    """float32"""
    growth_tracker: jax.Array
    """int32: good steps since the last overflow or growth."""
    hysteresis: jax.Array
    """int32: overflows that are still tolerated before the scale falls."""


def init_loss_scale(config: OptimizerConfig) -> LossScaleState:
    """The state before the first step: `loss_scale` if that is set, else `initial_loss_scale`.

    Raises:
      ConfigError: a dynamic scale would start below its minimum.
    """
    if not 0 < config.min_loss_scale <= config.initial_loss_scale:
        raise ConfigError(
            f"min_loss_scale={config.min_loss_scale} must be above 0 and at most"
            f" initial_loss_scale={config.initial_loss_scale}"
        )
    scale = config.initial_loss_scale if config.loss_scale is None else config.loss_scale
    return LossScaleState(jnp.float32(scale), jnp.int32(0), jnp.int32(config.hysteresis))


def unscale(grads: Any, state: LossScaleState) -> Any:
    """Gradients of the scaled loss, in float32 and divided by the scale."""
    inverse = 1.0 / state.scale
    return jax.tree.map(lambda g: g.astype(jnp.float32) * inverse, grads)


def all_finite(tree: Any) -> jax.Array:
    """True (bool scalar) if no leaf holds a NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def update(config: OptimizerConfig, state: LossScaleState, finite: ArrayLike) -> LossScaleState:
    """The state after a step whose gradients were `finite` or not.

    An overflow restarts the count of good steps and uses up one unit of hysteresis; with none left, every overflow
    halves the scale, down to `min_loss_scale`. `loss_scale_window` good steps in a row double the scale, and only that
    refills the hysteresis. A constant scale never changes.
    """
    if config.loss_scale is not None:
        return state
    finite = jnp.asarray(finite)
    hysteresis = jnp.where(finite, state.hysteresis, state.hysteresis - 1)
    tracker = jnp.where(finite, state.growth_tracker + 1, 0)
    grows = tracker == config.loss_scale_window
    falls = ~finite & (hysteresis <= 0)
    lower = jnp.maximum(state.scale * BACKOFF_FACTOR, config.min_loss_scale)
    scale = jnp.where(falls, lower, jnp.where(grows, state.scale * GROWTH_FACTOR, state.scale))
    return LossScaleState(
        scale=scale,
        growth_tracker=jnp.where(grows, 0, tracker).astype(jnp.int32),
        hysteresis=jnp.where(grows, config.hysteresis, hysteresis).astype(jnp.int32),
    )
