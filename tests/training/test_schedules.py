"""Learning rate and weight decay against Megatron's own scheduler, on the host and inside jit."""

# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import ConfigError, OptimizerConfig
from megajax.training.schedules import Schedule, make_schedule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mcore_lr_schedule"
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["settings"]
TRACES = dict(np.load(GOLDEN / "outputs.npz"))


def schedule_of(settings: dict) -> Schedule:
    """The golden scheduler: its second parameter group overrides the ends with 2e-3 and 3e-4."""
    return Schedule(
        init_lr=settings["init_lr"],
        max_lr=settings["max_lr"],
        min_lr=settings["min_lr"],
        decoupled_max_lr=2e-3,
        decoupled_min_lr=3e-4,
        warmup=settings["lr_warmup_steps"],
        decay=settings["lr_decay_steps"],
        style=settings["lr_decay_style"],
        wsd_decay=settings.get("wsd_decay_steps"),
        wsd_style=settings.get("lr_wsd_decay_style", "exponential"),
        start_wd=settings["start_wd"],
        end_wd=settings["end_wd"],
        wd_steps=settings["wd_incr_steps"],
        wd_style=settings["wd_incr_style"],
    )


@pytest.mark.parametrize("tag", sorted(SETTINGS))
def test_host_equals_megatron(tag):
    schedule, want = schedule_of(SETTINGS[tag]), TRACES[tag]
    for n, (lr, decoupled, wd, _) in enumerate(want):
        assert schedule.learning_rate(n) == pytest.approx(lr, rel=1e-14, abs=0)
        assert schedule.decoupled_learning_rate(n) == pytest.approx(decoupled, rel=1e-14, abs=0)
        assert schedule.weight_decay(n) == pytest.approx(wd, rel=1e-14, abs=0)


@pytest.mark.parametrize("tag", sorted(SETTINGS))
def test_jit_equals_megatron(tag):
    schedule, want = schedule_of(SETTINGS[tag]), TRACES[tag]
    samples = jnp.arange(len(want), dtype=jnp.uint32)
    for function, column in (
        (schedule.learning_rate, 0),
        (schedule.decoupled_learning_rate, 1),
        (schedule.weight_decay, 2),
    ):
        got = jax.jit(jax.vmap(function))(samples)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want[:, column], rtol=1e-6, atol=1e-6 * want[:, column].max())


BASE = {"lr": 1.5e-4, "min_lr": 1e-5, "lr_warmup_samples": 3200, "lr_decay_samples": 320000}
WSD = {**BASE, "lr_decay_style": "WSD", "lr_wsd_decay_samples": 64000}
PUBLISHED = [  # worked by hand from Megatron's formulas, seven digits
    ({"lr_decay_style": "linear"}, {1600: 7.5e-5, 3200: 1.5e-4, 100000: 1.072222e-4, 160000: 8.070707e-5}),
    ({"lr_decay_style": "cosine"}, {100000: 1.201504e-4, 160000: 8.111062e-5, 288000: 1.349502e-5}),
    (
        {"lr_decay_style": "inverse-square-root"},
        {100000: 2.683282e-5, 160000: 2.121320e-5, 288000: 1.581139e-5, 320000: 1.5e-5, 320001: 1e-5},
    ),
    ({**WSD, "lr_wsd_decay_style": "exponential"}, {256000: 1.5e-4, 288000: 6.798990e-5}),
    ({**WSD, "lr_wsd_decay_style": "linear"}, {288000: 8e-5}),
    ({**WSD, "lr_wsd_decay_style": "cosine"}, {288000: 8e-5}),
    ({**WSD, "lr_wsd_decay_style": "minus_sqrt"}, {288000: 5.100505e-5}),
]


@pytest.mark.parametrize(("options", "want"), PUBLISHED)
def test_worked_values(options, want):
    schedule = make_schedule(OptimizerConfig(**{**BASE, **options}), global_batch_size=32, train_samples=400000)
    for n, lr in want.items():
        assert schedule.learning_rate(n) == pytest.approx(lr, rel=1e-6)  # the digits given
        assert float(jax.jit(schedule.learning_rate)(jnp.uint32(n))) == pytest.approx(lr, rel=2e-6)


def test_late_in_a_long_run_float32_stays_accurate():
    """Three thousand million samples: neither the counter nor the start of the decay fits a float32 exactly."""
    config = OptimizerConfig(
        lr=1.0,
        lr_decay_style="WSD",
        lr_wsd_decay_style="linear",
        lr_decay_samples=3_000_000_001,
        lr_wsd_decay_samples=1001,
    )
    schedule = make_schedule(config, global_batch_size=1, train_samples=3_000_000_001)
    for past in (0, 1, 500, 1001):
        n = 3_000_000_001 - 1001 + past
        got = float(jax.jit(schedule.learning_rate)(jnp.uint32(n)))
        assert got == pytest.approx(1 - past / 1001, abs=1e-6)
        assert schedule.learning_rate(n) == pytest.approx(1 - past / 1001, abs=1e-12)


def test_lengths_in_steps_count_final_batches():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_iters=80)
    schedule = make_schedule(config, global_batch_size=16, train_iters=100)
    assert (schedule.warmup, schedule.decay, schedule.wd_steps) == (160, 1280, 1600)
    assert make_schedule(OptimizerConfig(), global_batch_size=16, train_iters=100).decay == 1600


def test_warmup_fraction_is_of_the_decay_and_may_be_no_whole_number():
    config = OptimizerConfig(lr=1.0, lr_warmup_fraction=0.015, lr_decay_iters=10)
    schedule = make_schedule(config, global_batch_size=10, train_iters=20)
    assert schedule.warmup == 1.5
    assert schedule.learning_rate(1) == pytest.approx(1 / 1.5)
    assert schedule.learning_rate(2) == pytest.approx(1 - 0.5 / 98.5)
    assert float(schedule.learning_rate(jnp.uint32(2))) == pytest.approx(1 - 0.5 / 98.5, rel=1e-6)


def test_decoupled_learning_rate_defaults():
    same = make_schedule(OptimizerConfig(lr=1e-3), global_batch_size=1, train_iters=10)
    assert same.decoupled_learning_rate(3) == same.learning_rate(3)
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, decoupled_lr=5e-3)
    apart = make_schedule(config, global_batch_size=1, train_iters=10)
    assert apart.decoupled_learning_rate(0) == 5e-3
    assert apart.decoupled_learning_rate(10) == pytest.approx(1e-4)


def test_host_values_are_plain_numbers():
    schedule = make_schedule(OptimizerConfig(), global_batch_size=1, train_iters=10)
    assert isinstance(schedule.learning_rate(3), float)
    assert isinstance(schedule.weight_decay(3), float)
    assert schedule.learning_rate(np.arange(4)).shape == (4,)


@pytest.mark.parametrize(
    ("options", "length", "names"),
    [
        ({"lr_warmup_iters": 50}, {"train_iters": 50}, ["lr_warmup_iters", "200", "lr_decay_iters"]),
        ({"lr_decay_samples": 50}, {"train_iters": 50}, ["lr_decay_samples=50", "lr_decay_iters"]),
        ({"lr_warmup_iters": 5}, {"train_samples": 50}, ["lr_warmup_iters=5", "lr_warmup_samples"]),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_warmup_iters": 2},
            {"train_iters": 10},
            ["36", "32", "lr_wsd_decay_iters"],
        ),
        ({}, {"train_samples": 2**32}, ["4294967296", "2**32"]),
        ({}, {}, ["train_iters", "train_samples"]),
        ({"lr": 1e-3, "lr_warmup_init": 1e-2}, {"train_iters": 9}, ["lr_warmup_init=0.01", "lr=0.001"]),
        ({"decoupled_min_lr": 0.1}, {"train_iters": 9}, ["decoupled_min_lr=0.1", "decoupled_lr"]),
        ({"decoupled_lr": 0.1, "decoupled_min_lr": 0.2}, {"train_iters": 9}, ["decoupled_min_lr=0.2", "0.1"]),
        ({"start_weight_decay": 0.1}, {"train_iters": 9}, ["start_weight_decay=0.1", "weight_decay_incr_style"]),
        (
            {"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            {"train_iters": 9},
            ["start_weight_decay=0.2", "end_weight_decay=0.1"],
        ),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(options, length, names):
    with pytest.raises(ConfigError) as error:
        make_schedule(OptimizerConfig(**options), global_batch_size=4, **length)
    message = str(error.value)
    assert "\n" not in message
    assert [name for name in names if name not in message] == []
