"""Steps of the real model: precisions, optimizers, parameter groups, dropout on any layout; and its evaluation."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

from megajax.training.loop import Evaluator, _grouped
from megajax.training.setup import Program, on_mesh, place_batch
from megajax.training.state import TrainState
from megajax.training.step import Metrics


def _batch(rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences that count upwards, with four different steps."""
    rng = np.random.default_rng(seed)
    text = (rng.integers(23, size=(rows, 1)) + rng.integers(1, 5, size=(rows, 1)) * np.arange(17)) % 23
    return {
        "tokens": text[:, :-1].astype(np.int32),
        "labels": text[:, 1:].astype(np.int32),
        "loss_mask": np.ones((rows, 16), np.float32),
        "position_ids": np.broadcast_to(np.arange(16, dtype=np.int32), (rows, 16)),
    }


def _train(program: Program, steps: int, *, rows: int = 4, **changes: Any) -> tuple[TrainState, list[Metrics]]:
    """Steps on one and the same batch."""
    state, seen = program.create_state(), []
    microbatches = program.batches.at(0).num_microbatches
    with on_mesh(program):
        for _ in range(steps):
            batch = place_batch(program, {**_batch(rows), **changes}, num_microbatches=microbatches)
            state, metrics = program.train_step(state, batch)
            seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


def _flat(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


STEADY = "--lr-decay-style constant --lr-warmup-fraction 0 --train-iters 40 --global-batch-size 4"


def test_accumulated_gradients_are_those_of_one_batch(tiny):
    runs = [_train(tiny.program(f"{STEADY} --micro-batch-size {size}"), 3) for size in (4, 2, 1)]
    for state, metrics in runs[1:]:
        for name in ("loss", "grad_norm"):
            wanted = [getattr(m, name) for m in runs[0][1]]
            np.testing.assert_allclose([getattr(m, name) for m in metrics], wanted, rtol=2e-5)
        for name, value in _flat(runs[0][0].params).items():
            np.testing.assert_allclose(_flat(state.params)[name], value, atol=5e-5, err_msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adam --lr 0.02",
        "--optimizer sgd --lr 0.5",
        "--optimizer lion --lr 0.003",
        "--optimizer muon --lr 0.02 --num-layers 2",
    ],
)
def test_every_optimizer_learns(tiny, flags):
    _, metrics = _train(tiny.program(f"{STEADY} {flags} --micro-batch-size 4"), 40)
    assert metrics[0].loss == pytest.approx(np.log(24), abs=0.1)
    assert metrics[-1].loss < 0.75 * metrics[0].loss
    assert metrics[-1].skipped == 0


def test_bf16_computes_in_bf16_and_keeps_float32(tiny):
    exact_state, exact = _train(tiny.program(f"{STEADY} --micro-batch-size 4"), 10)
    state, metrics = _train(tiny.program(f"{STEADY} --micro-batch-size 4 --bf16"), 10)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {
        np.dtype("float32"),
        np.dtype("int32"),
    }
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in exact], rtol=0.02)
    assert metrics[0].loss != exact[0].loss
    assert jax.tree.structure(state.params) == jax.tree.structure(exact_state.params)


def test_fp16_finds_its_loss_scale(tiny):
    """From 2**32 the scale halves with every overflow once hysteresis is used up; schedules wait, nothing stops."""
    warm = f"{STEADY.replace('fraction 0', 'iters 10')} --micro-batch-size 4"
    _, exact = _train(tiny.program(warm), 30)
    state, metrics = _train(tiny.program(f"{warm} --fp16"), 40)
    scales = [float(m.loss_scale) for m in metrics]
    overflows = [i for i, m in enumerate(metrics) if m.skipped > (metrics[i - 1].skipped if i else 0)]
    first = len(overflows)
    assert overflows == list(range(first)), "the scale falls until it fits, and then it fits"
    assert 3 <= first <= 30
    assert scales[:first] == [2.0**32] + [2.0 ** (32 - i) for i in range(1, first)]
    assert scales[first:] == [scales[first - 1]] * (40 - first)
    assert {int(m.skipped_in_a_row) for m in metrics} == {0}
    rates = [float(m.learning_rate) for m in metrics]
    assert rates[:first] == [0.0] * first
    np.testing.assert_allclose(rates[first : first + 10], [0.002 * i for i in range(10)], rtol=1e-6)
    assert state.samples == 4 * (40 - first)
    good = min(10, 40 - first)
    losses = [float(m.loss) for m in metrics]
    np.testing.assert_allclose(losses[first : first + good], [float(m.loss) for m in exact[:good]], rtol=0.01)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


@pytest.mark.parametrize("flags", ["", "--apply-wd-to-qk-layernorm"])
def test_a_zero_gradient_leaves_only_weight_decay(tiny, flags):
    """What a step without tokens does to each parameter shows its group: decay, learning rate, or neither."""
    program = tiny.program(
        f"{STEADY} --micro-batch-size 4 --lr 0.1 --weight-decay 0.5 --decoupled-lr 0.3 --add-bias-linear"
        f" --no-share-embeddings-and-output-weights {flags}"
    )
    before = _flat(jax.device_get(program.create_state().params))
    state, [metrics] = _train(program, 1, loss_mask=np.zeros((4, 16), np.float32))
    assert (metrics.tokens, metrics.loss, metrics.grad_norm, metrics.skipped) == (0, 0, 0, 0)
    kinds = {"kept": 0, "decayed": 0, "decoupled": 0}
    for name, value in _flat(state.params).items():
        last = name.split("/")[-1]
        qk_norm = "q_layernorm" in name or "k_layernorm" in name
        if last == "bias" or (last == "scale" and not (qk_norm and flags)):
            kind, factor = "kept", 1.0
        elif "embedding" in name or "output_layer" in name:
            kind, factor = "decoupled", 1 - 0.3 * 0.5
        else:
            kind, factor = "decayed", 1 - 0.1 * 0.5
        kinds[kind] += 1
        np.testing.assert_allclose(value, before[name] * factor, rtol=1e-6, err_msg=name)
    assert kinds == {"kept": 12, "decayed": 7, "decoupled": 2} if not flags else kinds["decayed"] == 9


def test_dropout_is_the_same_on_every_layout(tiny):
    flags = f"{STEADY} --hidden-dropout 0.3 --attention-dropout 0.2"
    layouts = {
        "dp1": (1, "--micro-batch-size 4"),
        "dp2": (2, "--micro-batch-size 2 --zero 1"),
        "tp2": (2, "--micro-batch-size 4 --tp 2 --sequence-parallel"),
    }
    runs = {
        name: _train(tiny.program(f"{flags} {layout}", devices=devices), 3)[1]
        for name, (devices, layout) in layouts.items()
    }
    _, without = _train(tiny.program(f"{STEADY} --micro-batch-size 4"), 1)
    assert abs(float(runs["dp1"][0].loss) - float(without[0].loss)) > 1e-4
    for name, metrics in runs.items():
        np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in runs["dp1"]], rtol=2e-5, err_msg=name)


def test_validation_loss_is_the_mean_over_its_tokens(tiny):
    """Against log-softmax in float64 over the model's logits, sample by sample; document ends are masked."""
    program = tiny.program("--eval-iters 3 --eod-mask-loss --reset-attention-mask")
    datasets = tiny.datasets(program)
    params = program.create_state().params
    found = Evaluator(program, datasets)(params, "validation")

    total, tokens = 0.0, 0
    for index in range(3 * 2):
        sample = datasets.validation[index]
        segments = sample["segment_ids"]
        logits = program.model.apply(
            {"params": params},
            sample["tokens"][None],
            position_ids=sample["position_ids"][None],
            segment_ids=segments[None],
        )
        logits = np.asarray(logits, np.float64)[0]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), sample["labels"]]
        counted = sample["loss_mask"] * np.append(segments[1:] == segments[:-1], True)
        total, tokens = total + float((losses * counted).sum()), tokens + int(counted.sum())
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_evaluation_does_not_disturb_training(tiny, read_saved):
    often = tiny.train("often", "--train-iters 4 --eval-interval 1 --hidden-dropout 0.1")
    never = tiny.train("never", "--train-iters 4 --eval-interval 1000 --hidden-dropout 0.1 --split 969,0,31")
    # another split gives the same training documents, and no validation at all
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (often, never)]
    assert [row["step"] for row in rows[0] if "val_loss" in row] == [1, 2, 3, 4]
    assert not [row for row in rows[1] if "val_loss" in row]
    (_, state), (_, other) = read_saved(often), read_saved(never)
    for name, value in state.items():
        assert value.tobytes() == other[name].tobytes(), name


def test_evaluation_batches_are_filled_up_with_rows_that_count_nothing():
    batches = [{"tokens": np.full((2, 3), i), "loss_mask": np.ones((2, 3))} for i in range(3)]
    first, second = _grouped(batches, 2)
    assert first["tokens"][:, 0].tolist() == [0, 0, 1, 1]
    assert second["tokens"].shape == (4, 3)
    assert second["loss_mask"].sum(axis=1).tolist() == [3, 3, 0, 0]
