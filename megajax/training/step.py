"""The training step: a pure function of (state, batch), compiled once for each batch size, with explicit shardings."""

# SPDX-License-Identifier: Apache-2.0
# M microbatches, B batch, S sequence
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from megajax.config import Config
from megajax.training import loss_scale as scaling
from megajax.training.gradients import Batch, GradientsFn
from megajax.training.optimizer import clip_by_global_norm
from megajax.training.schedules import Schedule
from megajax.training.state import TrainState
from megajax.transformer.fp8 import with_next_meta

Array = jax.Array

GRAD_NORM_MEMORY = 0.95
"""How slowly the mean gradient norm that spikes are measured against forgets."""


class Metrics(NamedTuple):
    """Scalars of one step, fp32 or int32. loss is the mean over the tokens that count, before the update; skipped is
    the number of updates left out so far."""

    loss: Array
    grad_norm: Array
    learning_rate: Array
    weight_decay: Array
    tokens: Array
    skipped: Array
    skipped_in_a_row: Array
    loss_scale: Array


def make_train_step(
    gradients: GradientsFn, config: Config, optimizer: optax.GradientTransformationExtraArgs, schedule: Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`(state, batch) -> (state, metrics)`; every array of the batch is [M, B, ...]."""
    apply_gradients = _make_apply_gradients(config, optimizer, schedule)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mask = batch["loss_mask"].astype(jnp.float32)
        grads, loss_sum = gradients(state, batch)
        tokens = jnp.sum(mask)
        loss = loss_sum / jnp.maximum(tokens, 1.0)
        state, norm, lr, wd = apply_gradients(state, grads, loss, mask.shape[0] * mask.shape[1])
        metrics = Metrics(
            loss=loss,
            grad_norm=norm,
            learning_rate=jnp.float32(lr),
            weight_decay=jnp.float32(wd),
            tokens=tokens.astype(jnp.int32),
            skipped=state.skipped,
            skipped_in_a_row=state.skipped_in_a_row,
            loss_scale=jnp.float32(1.0) if state.loss_scale is None else state.loss_scale.scale,
        )
        return state, metrics

    return step


def _make_apply_gradients(
    config: Config, optimizer: optax.GradientTransformationExtraArgs, schedule: Schedule
) -> Callable[[TrainState, Any, Array, int], tuple[TrainState, Array, Array, Array]]:
    """`(state, gradients, loss, samples) -> (state, gradient norm, learning rate, weight decay)`.

    An update that would do harm is skipped: parameters, optimizer state and schedules stay as they are.
    """

    def apply_gradients(
        state: TrainState, grads: Any, loss: Array, samples: int
    ) -> tuple[TrainState, Array, Array, Array]:
        new_scale, calibrating = state.loss_scale, jnp.bool_(False)
        if state.loss_scale is not None:
            grads = scaling.unscale(grads, state.loss_scale)
            finite = scaling.all_finite(grads)
            new_scale = scaling.update(config.optimizer, state.loss_scale, finite)
            # An overflow that a smaller scale may cure is part of finding the scale, not a run gone wrong.
            may_fall = config.optimizer.loss_scale is None
            calibrating = may_fall & ~finite & jnp.isfinite(loss)
            calibrating &= state.loss_scale.scale > config.optimizer.min_loss_scale
        grads, norm = clip_by_global_norm(grads, config.optimizer.clip_grad)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)  # a NaN or infinity in any gradient shows in the norm
        if config.train.spike_factor:
            spike = norm > config.train.spike_factor * state.grad_norm_mean
            good &= ~(spike & (state.grad_norm_mean > 0))
        lr, wd = schedule.learning_rate(state.samples), schedule.weight_decay(state.samples)
        extra = {"learning_rate": lr, "weight_decay": wd}
        if config.optimizer.decoupled_lr is not None:
            extra["decoupled_learning_rate"] = schedule.decoupled_learning_rate(state.samples)

        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
            return with_next_meta(config.kernels.fp8, optax.apply_updates(params, updates), grads), opt_state

        # No `cond`: it would be a wall between the gradients' last sums and the update, and return copies of the state.
        old = state.params, state.opt_state
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), update(*old), old)

        mean = jnp.where(
            state.grad_norm_mean > 0,
            GRAD_NORM_MEMORY * state.grad_norm_mean + (1 - GRAD_NORM_MEMORY) * norm,
            norm,
        )
        in_a_row = state.skipped_in_a_row + jnp.where(calibrating, 0, 1)
        state = state.replace(
            step=state.step + 1,
            samples=state.samples + jnp.where(good, samples, 0).astype(jnp.uint32),
            skipped=state.skipped + jnp.where(good, 0, 1),
            skipped_in_a_row=jnp.where(good, 0, in_a_row),
            grad_norm_mean=jnp.where(good, mean, state.grad_norm_mean),
            params=params,
            opt_state=opt_state,
            loss_scale=new_scale,
        )
        return state, norm, lr, wd

    return apply_gradients
