"""Batch sizes against Megatron's calculators, and the length of a run in steps against a plain walk."""

# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megajax.config import ConfigError, TrainConfig
from megajax.training.microbatches import BatchSchedule, make_batch_schedule

TABLE = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mcore_num_microbatches" / "table.json").read_text())


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case['global_batch_size']}-{case['rampup']}")
def test_trace_equals_megatron(case):
    schedule = BatchSchedule(
        global_batch_size=case["global_batch_size"],
        micro_batch_size=case["micro_batch_size"],
        data_parallel_size=case["data_parallel_size"],
        rampup=tuple(case["rampup"]) if case["rampup"] else None,
        decrease_batch_size_if_needed=case["decrease_batch_size_if_needed"],
    )
    for consumed, *want in case["trace"]:
        got = schedule.at(consumed)
        assert list(got) == want
        assert got in schedule.sizes


def test_global_batch_defaults_to_one_microbatch_per_shard():
    schedule = make_batch_schedule(TrainConfig(micro_batch_size=3), data_parallel_size=4)
    assert schedule.at(0) == (1, 12, 12)
    assert schedule.sizes == (schedule.at(0),)


def test_train_iters_of_a_constant_batch_drops_the_incomplete_one():
    schedule = make_batch_schedule(TrainConfig(micro_batch_size=2, global_batch_size=8), data_parallel_size=2)
    assert schedule.train_iters(8) == 1
    assert schedule.train_iters(79) == 9


def test_train_iters_of_a_ramp():
    config = TrainConfig(micro_batch_size=2, global_batch_size=64, rampup_batch_size=(16, 16, 1000))
    schedule = make_batch_schedule(config, data_parallel_size=4)
    # 21 steps of 16 reach 336, 11 of 32 reach 688, 7 of 48 reach 1024, then 64 each.
    assert schedule.train_iters(1024) == 39
    assert schedule.train_iters(1024 + 64 * 5 + 63) == 44


@given(
    unit=st.integers(1, 4),
    shards=st.integers(1, 3),
    start=st.integers(1, 4),
    increment=st.integers(1, 3),
    increments=st.integers(0, 5),
    ramp=st.integers(0, 300),
    samples=st.integers(50, 1000),
)
def test_train_iters_fit_and_leave_less_than_a_batch(unit, shards, start, increment, increments, ramp, samples):
    size = unit * shards
    schedule = BatchSchedule(
        global_batch_size=(start + increment * increments) * size,
        micro_batch_size=unit,
        data_parallel_size=shards,
        rampup=(start * size, increment * size, ramp),
    )
    consumed, before = 0, 0
    if schedule.at(0).global_batch_size > samples:
        with pytest.raises(ConfigError, match=f"train_samples={samples}"):
            schedule.train_iters(samples)
        return
    for _ in range(schedule.train_iters(samples)):
        batch = schedule.at(consumed)
        assert batch.num_microbatches >= before
        consumed, before = consumed + batch.running_global_batch_size, batch.num_microbatches
    assert consumed <= samples < consumed + schedule.at(consumed).running_global_batch_size


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"global_batch_size": 65}, ["global_batch_size=65", "2 * 4 = 8", "64 or 72"]),
        ({"global_batch_size": 4}, ["global_batch_size=4", "use 8"]),
        ({"global_batch_size": 64, "rampup_batch_size": (72, 8, 10)}, ["72", "global_batch_size=64"]),
        ({"global_batch_size": 64, "rampup_batch_size": (16, 32, 10)}, ["16", "64", "32", "48"]),
        ({"global_batch_size": 64, "rampup_batch_size": (16, 12, 10)}, ["batch of 28", "24 or 32"]),
    ],
)
def test_impossible_batches_are_refused_in_one_line(options, names):
    with pytest.raises(ConfigError) as error:
        make_batch_schedule(TrainConfig(micro_batch_size=2, **options), data_parallel_size=4)
    message = str(error.value)
    assert "\n" not in message
    assert [name for name in names if name not in message] == []


def test_rounding_down_needs_at_least_one_microbatch():
    with pytest.raises(ConfigError, match="global_batch_size=5"):
        BatchSchedule(global_batch_size=5, micro_batch_size=2, data_parallel_size=3, decrease_batch_size_if_needed=True)
