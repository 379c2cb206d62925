"""The training step against sums worked out in numpy, on a model that is one table of logits."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import Config, OptimizerConfig, TrainConfig, TransformerConfig
from megajax.models.family import Family
from megajax.models.registry import FAMILIES
from megajax.ops.cross_entropy import FusedLoss
from megajax.training.gradients import accumulated_gradients, loss_weights, make_eval_step
from megajax.training.optimizer import make_optimizer
from megajax.training.schedules import make_schedule
from megajax.training.state import TrainState
from megajax.training.step import make_train_step

VOCAB, LR = 5, 0.5
SGD = OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, lr=LR, lr_decay_style="constant", weight_decay=0, clip_grad=0)


def _table_loss(model: Any, params: Any, batch: Any, weights: Any, *, dropout_key: Any) -> FusedLoss:
    """Logits are the row of a table that the token names; `gain` lets a test make its gradient large."""
    log_probs = jax.nn.log_softmax(params["table"]["kernel"][batch["tokens"]])
    losses = -jnp.take_along_axis(log_probs, batch["labels"][..., None], axis=-1)[..., 0]
    return FusedLoss(jnp.sum(losses * weights * batch["gain"]), losses)


TABLE_FAMILY: Family = dataclasses.replace(FAMILIES["gpt"], name="table", loss=_table_loss)


def _numpy_losses(table: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = table[tokens].astype(np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def _numpy_gradient(table: np.ndarray, tokens: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Softmax minus the label, weighted, added to each token's row."""
    grad = np.zeros(table.shape)
    for token, label, weight in zip(tokens.ravel(), labels.ravel(), weights.ravel(), strict=True):
        p = np.exp(table[token].astype(np.float64))
        p /= p.sum()
        p[label] -= 1
        grad[token] += weight * p
    return grad


def _config(optimizer: OptimizerConfig = SGD, **train: Any) -> Config:
    model = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, hidden_dropout=0, attention_dropout=0, fp16=False
    )
    return Config(model_family="table", model=model, optimizer=optimizer, train=TrainConfig(**train))


def _state_and_step(config: Config, *, dp: int = 1) -> tuple[TrainState, Any]:
    optimizer = make_optimizer(config.optimizer, {"table": {"kernel": ("vocab", "embed")}})
    schedule = make_schedule(config.optimizer, global_batch_size=8, train_iters=10)
    table = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)
    params = {"table": {"kernel": jnp.asarray(table)}}
    zero = jnp.int32(0)
    state = TrainState(
        step=zero,
        samples=jnp.uint32(0),
        skipped=zero,
        skipped_in_a_row=zero,
        grad_norm_mean=jnp.float32(0),
        rng=jax.random.key_data(jax.random.key(0)),
        params=params,
        opt_state=optimizer.init(params),
        loss_scale=None,
    )
    gradients = accumulated_gradients(None, TABLE_FAMILY, config, data_parallel_size=dp)  # type: ignore[arg-type]
    return state, jax.jit(make_train_step(gradients, config, optimizer, schedule))


def _batch(microbatches: int = 1, *, gain: float = 1.0) -> dict[str, np.ndarray]:
    """Eight rows of six tokens, of which each row masks another number, one row all of them."""
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(VOCAB, size=(2, 8, 6))
    mask = (np.arange(6) < np.array([6, 1, 0, 3, 5, 5, 2, 4])[:, None]).astype(np.float32)
    rows = {"tokens": tokens, "labels": labels, "loss_mask": mask, "gain": np.full((8, 6), gain, np.float32)}
    return {name: a.reshape(microbatches, -1, 6) for name, a in rows.items()}


def _table(state: TrainState) -> np.ndarray:
    return np.asarray(state.params["table"]["kernel"])


@pytest.mark.parametrize(("microbatches", "dp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("per_token", [True, False])
def test_loss_and_gradient_are_the_weighted_means(microbatches, dp, per_token):
    state, step = _state_and_step(_config(calculate_per_token_loss=per_token), dp=dp)
    batch = _batch(microbatches)
    after, metrics = step(state, batch)

    tokens, labels, mask = (batch[name].reshape(8, 6) for name in ("tokens", "labels", "loss_mask"))
    groups = [range(8)] if per_token else np.split(np.arange(8), microbatches * dp)
    weights = np.zeros((8, 6))
    for rows in groups:
        weights[rows] = mask[rows] / max(mask[rows].sum(), 1) / len(groups)
    expected = _table(state) - LR * _numpy_gradient(_table(state), tokens, labels, weights)
    np.testing.assert_allclose(_table(after), expected, atol=1e-6)
    # What is reported is always the mean over tokens, so that losses of any layout can be compared.
    losses = _numpy_losses(_table(state), tokens, labels)
    np.testing.assert_allclose(metrics.loss, (losses * mask).sum() / mask.sum(), rtol=1e-6)
    assert metrics.tokens == mask.sum() == 26


def test_weights_sum_to_one_unless_a_shard_is_all_masked():
    mask = jnp.asarray(_batch(2)["loss_mask"])
    assert np.sum(loss_weights(mask, per_token=True, data_parallel_size=2)) == pytest.approx(1)
    assert np.sum(loss_weights(mask, per_token=False, data_parallel_size=2)) == pytest.approx(1)
    # row 2 alone in its shard: Megatron divides its zero by one and still counts the shard
    assert np.sum(loss_weights(mask, per_token=False, data_parallel_size=4)) == pytest.approx(7 / 8)
    assert np.sum(loss_weights(mask * 0, per_token=True, data_parallel_size=1)) == 0


def test_clipping():
    batch = _batch()
    tokens, labels, mask = (batch[name][0] for name in ("tokens", "labels", "loss_mask"))
    state, free = _state_and_step(_config())
    grad = _numpy_gradient(_table(state), tokens, labels, mask / mask.sum())
    norm = np.sqrt((grad**2).sum())
    after, metrics = free(state, batch)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)
    np.testing.assert_allclose(_table(after), _table(state) - LR * grad, atol=1e-6)

    _, clipped = _state_and_step(_config(dataclasses.replace(SGD, clip_grad=0.1)))
    after, metrics = clipped(state, batch)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)  # as it was before clipping
    np.testing.assert_allclose(_table(after), _table(state) - LR * grad * 0.1 / norm, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_changes_nothing_but_the_counters(poison, where):
    adam = OptimizerConfig(lr=LR, lr_warmup_iters=2)
    state, step = _state_and_step(_config(adam))
    state, metrics = step(state, _batch())
    assert (metrics.skipped, state.samples, metrics.learning_rate) == (0, 8, 0)
    bad = _batch()
    bad["loss_mask" if where == "loss" else "gain"][0, 3, 0] = poison
    for count in (1, 2):
        before = state
        state, metrics = step(state, bad)
        same = jax.tree.map(
            lambda a, b: a.tobytes() == b.tobytes(),
            (before.params, before.opt_state, before.samples, before.grad_norm_mean),
            (state.params, state.opt_state, state.samples, state.grad_norm_mean),
        )
        assert all(jax.tree.leaves(same))
        assert (metrics.skipped, metrics.skipped_in_a_row, state.step) == (count, count, 1 + count)
        assert metrics.learning_rate == LR / 2  # as it will be at the next good step
    state, metrics = step(state, _batch())
    assert (metrics.skipped, metrics.skipped_in_a_row, state.samples) == (2, 0, 16)
    assert metrics.learning_rate == LR / 2
    assert np.all(np.isfinite(_table(state)))


def test_a_spike_is_skipped():
    """A norm above three times the running mean (memory 0.95) is left out and not remembered."""
    still = dataclasses.replace(SGD, lr=0.0)
    state, step = _state_and_step(_config(still, spike_factor=3.0))
    state, metrics = step(state, _batch())
    norm = float(metrics.grad_norm)
    assert state.grad_norm_mean == pytest.approx(norm)
    state, metrics = step(state, _batch(gain=2.9))
    assert metrics.skipped == 0
    mean = 0.95 * norm + 0.05 * 2.9 * norm
    assert state.grad_norm_mean == pytest.approx(mean, rel=1e-5)
    state, metrics = step(state, _batch(gain=3.3))  # above 3 (0.95 + 0.05 2.9) = 3.285
    assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 1)
    assert state.grad_norm_mean == pytest.approx(mean, rel=1e-5)
    state, metrics = step(state, _batch(gain=3.2))
    assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 0)


def test_evaluation_sums_losses_and_tokens():
    state, _ = _state_and_step(_config())
    batch = _batch()
    total, count = make_eval_step(None, TABLE_FAMILY)(state.params, batch)  # type: ignore[arg-type]
    losses = _numpy_losses(_table(state), batch["tokens"], batch["labels"])
    np.testing.assert_allclose(total, (losses * batch["loss_mask"]).sum(), rtol=1e-6)
    assert count == 26
