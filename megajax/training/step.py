"""The training step: a pure function of (state, batch), compiled once for each batch size, with explicit shardings."""

# SPDX-License-Identifier: Apache-2.0
# M microbatches, B batch, S sequence
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from megajax.config import Config
from megajax.models.family import Family
from megajax.training import loss_scale as scaling
from megajax.training.optimizer import clip_by_global_norm
from megajax.training.schedules import Schedule
from megajax.training.state import TrainState

Array = jax.Array
Batch = Mapping[str, Array]

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


def loss_weights(loss_mask_MBS: Array, *, per_token: bool, data_parallel_size: int) -> Array:
    """What each token's loss is multiplied by; over a step the weights sum to 1.

    per_token weighs all tokens alike. Otherwise as Megatron does by default: each microbatch of each data-parallel
    shard counts the same, however many tokens of it are masked.
    """
    mask = loss_mask_MBS.astype(jnp.float32)
    if per_token:
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    M, B, S = mask.shape
    shards = mask.reshape(M, data_parallel_size, B // data_parallel_size, S)
    tokens = jnp.maximum(jnp.sum(shards, axis=(2, 3), keepdims=True), 1.0)
    return (shards / tokens / (M * data_parallel_size)).reshape(M, B, S)


def document_mask(batch: Batch) -> Array:
    """The loss mask, with the last token of each packed document left out: its label begins another document."""
    mask = batch["loss_mask"].astype(jnp.float32)
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        return mask
    same = segment_ids[..., 1:] == segment_ids[..., :-1]
    return mask * jnp.concatenate([same, jnp.ones_like(same[..., :1])], axis=-1)


def make_train_step(
    model: nn.Module,
    family: Family,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    *,
    data_parallel_size: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`(state, batch) -> (state, metrics)`; every array of the batch is [M, B, ...]."""
    gradients = _make_gradients(model, family, config, data_parallel_size=data_parallel_size)
    apply_gradients = _make_apply_gradients(config, optimizer, schedule)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mask = document_mask(batch)
        grads, loss_sum = gradients(state, batch, mask)
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


def _make_gradients(
    model: nn.Module, family: Family, config: Config, *, data_parallel_size: int
) -> Callable[[TrainState, Batch, Array], tuple[Any, Array]]:
    """`(state, batch, mask) -> (gradients of the scaled loss, sum of the masked token losses)`."""
    dropout = max(config.model.hidden_dropout, config.model.attention_dropout) > 0

    def microbatch_loss(params: Any, batch: Batch, weights: Array, key: Array | None) -> tuple[Array, Array]:
        losses = family.loss(model, params, batch, weights, dropout_key=key)
        return losses.weighted_sum, losses.per_token

    def microbatch_gradients(
        params: Any, step_key: Array, index: Array | int, batch: Batch, weights: Array, mask: Array
    ) -> tuple[Any, Array]:
        key = jax.random.fold_in(step_key, index) if dropout else None
        grads, per_token = jax.grad(microbatch_loss, has_aux=True)(params, batch, weights, key)
        return grads, jnp.sum(per_token * mask)

    def gradients(state: TrainState, batch: Batch, mask: Array) -> tuple[Any, Array]:
        weights = loss_weights(
            mask, per_token=config.train.calculate_per_token_loss, data_parallel_size=data_parallel_size
        )
        if state.loss_scale is not None:
            # Into the weights, so that the first gradient of all, that of the logits, is already scaled in fp16.
            weights = weights * state.loss_scale.scale
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        inputs = (dict(batch), weights, mask)
        M = mask.shape[0]
        if M == 1:  # no accumulator to hold beside the gradients
            only = jax.tree.map(lambda a: a[0], inputs)
            return microbatch_gradients(state.params, step_key, 0, *only)

        def accumulate(carry: tuple[Any, Array], indexed: tuple[Array, Any]) -> tuple[tuple[Any, Array], None]:
            index, microbatch = indexed
            grads, loss_sum = microbatch_gradients(state.params, step_key, index, *microbatch)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), carry[0], grads)
            return (total, carry[1] + loss_sum), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        (grads, loss_sum), _ = jax.lax.scan(accumulate, (zeros, jnp.float32(0)), (jnp.arange(M), inputs))
        return grads, loss_sum

    return gradients


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
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.lax.cond(good, update, lambda *unchanged: unchanged, state.params, state.opt_state)

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


def make_eval_step(model: nn.Module, family: Family) -> Callable[[Any, Batch], tuple[Array, Array]]:
    """`(params, batch) -> (sum of token losses, number of tokens)`; every array of the batch is [B, ...]."""

    def step(params: Any, batch: Batch) -> tuple[Array, Array]:
        mask = document_mask(batch)
        losses = family.loss(model, params, batch, mask, dropout_key=None)
        return losses.weighted_sum, jnp.sum(mask)

    return step
