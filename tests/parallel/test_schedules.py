"""Pipeline schedules against published tables, the formulas of the papers, Megatron's own tables, and sabotage."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megajax.config import ConfigError
from megajax.parallel.schedule_ticks import plan_ticks
from megajax.parallel.schedules import (
    KINDS,
    SCHEDULES,
    Costs,
    Op,
    Schedule,
    make_schedule,
    one_f_one_b,
    validate,
)

GRID = [(p, v, m) for p in (2, 4, 8) for v in (1, 2, 4) for m in (1, p - 1, p, p + 1, 2 * p, 3 * p - 1, 4 * p)]


def read(name: str, text: str) -> Schedule:
    """A schedule from rows of stages: `F0`, or `F0.1` for chunk 1; `.` idles."""
    rows = [line.split() for line in text.strip().splitlines()]
    ops = [[None if word == "." else read_op(word) for word in row] for row in rows]
    present = [op for row in ops for op in row if op is not None]
    chunks, microbatches = 1 + max(op.chunk for op in present), 1 + max(op.microbatch for op in present)
    return Schedule(name, len(rows), chunks, microbatches, tuple(zip(*ops, strict=True)))


def read_op(word: str) -> Op:
    microbatch, _, chunk = word[1:].partition(".")
    return Op(next(kind for kind in KINDS if kind == word[0]), int(chunk or 0), int(microbatch))


# PipeDream-Flush, as in figure 3 of arXiv:2104.04473 with one tick for a backward, too.
ONE_F_ONE_B = """
F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 F6 B3 F7 B4 .  B5 .  B6 .  B7
.  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .
.  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 .  B7 .  .
.  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .
"""
# Figure 2 of arXiv:1811.06965, backwards in reverse.
GPIPE = """
F0 F1 F2 .  .  .  .  B2 B1 B0
.  F0 F1 F2 .  .  B2 B1 B0 .
.  .  F0 F1 F2 B2 B1 B0 .  .
"""
# Megatron's interleaved order: 4 and 2 forwards first, then turns.
INTERLEAVED = """
F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 .    B2.1 .    B3.1 B2.0 B3.0
.    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0 .
"""
# Figure 3 of arXiv:2401.10241, first rows and last: W of stage s is s backwards late.
ZB_H1 = """
F0 F1 F2 F3 .  .  .  B0 W0 F4 B1 W1 F5 B2 W2 B3 W3 B4 W4 B5 W5
.  F0 F1 F2 .  .  B0 F3 B1 W0 F4 B2 W1 F5 B3 W2 B4 W3 B5 W4 W5
.  .  F0 F1 .  B0 F2 B1 F3 B2 W0 F4 B3 W1 F5 B4 W2 B5 W3 W4 W5
.  .  .  F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 W3 W4 W5
"""


@pytest.mark.parametrize(
    ("name", "text"), [("1f1b", ONE_F_ONE_B), ("gpipe", GPIPE), ("1f1b", INTERLEAVED), ("zb-h1", ZB_H1)]
)
def test_published_tables(name: str, text: str) -> None:
    expected = read(name, text)
    validate(expected)
    assert make_schedule(name, expected.stages, expected.microbatches, expected.chunks) == expected


def test_orders_are_those_of_megatron(golden: Path) -> None:
    for row in json.loads((golden / "mcore_pipeline/tables.json").read_text())["orders"]:
        stages, chunks, microbatches, group = row["case"]
        if chunks > 1 and microbatches % group:
            continue  # here the order leaves gaps for the microbatches that are missing
        schedule = make_schedule("1f1b", stages, microbatches, chunks, group=group)
        for stage, warm_up in enumerate(row["warm_up"]):
            order = schedule.order(stage)
            forwards = [Op("F", chunk, i) for i, chunk in row["table"]]
            backwards = [Op("B", chunks - 1 - chunk, i) for i, chunk in row["table"]]
            steady = [op for pair in zip(forwards[warm_up:], backwards, strict=False) for op in pair]
            expected = [*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :]]
            assert list(order) == expected, (row["case"], stage)


@pytest.mark.parametrize(("p", "v", "m"), GRID)
def test_bubbles_of_the_papers(p: int, v: int, m: int) -> None:
    interleaved = one_f_one_b(p, m, v).bubble()
    if v == 1 or m % p == 0:
        assert interleaved == pytest.approx((p - 1) / (v * m))
    else:
        # What is missing of the last group leaves a gap of its size at most, forwards and backwards alike.
        full = -(-m // p) * p
        assert interleaved * m <= (p - 1) / v + full - m + 1e-9
    if v == 1:
        assert make_schedule("gpipe", p, m).bubble() == pytest.approx((p - 1) / m)
        split = make_schedule("zb-h1", p, m)
        assert split.bubble() < interleaved
        if m >= p:
            assert split.bubble() == pytest.approx((p - 1) / (3 * m))
            # (p - 1) (F + B - W) with times of its own
            assert split.bubble(Costs(1.0, 1.3, 0.8)) == pytest.approx((p - 1) * 1.5 / (3.1 * m))


@pytest.mark.parametrize(("p", "v", "m"), GRID)
def test_peak_memory(p: int, v: int, m: int) -> None:
    peaks = one_f_one_b(p, m, v).peak_live()
    if v == 1:
        assert peaks == tuple(min(p - stage, m) for stage in range(p))
        assert max(make_schedule("zb-h1", p, m).peak_live()) == max(peaks)
        assert make_schedule("gpipe", p, m).peak_live() == (m,) * p
    elif m % p == 0:
        # Megatron: 1 + (p - 1) / (p v) times the activations of 1F1B
        assert peaks[0] == min(p * v + p - 1, m * v)
        assert one_f_one_b(p, m, v).bytes_in_flight(100 * v)[0] == 100 * peaks[0]
    else:
        assert all(peak <= 2 * (p - stage - 1) + (v - 1) * p + 1 for stage, peak in enumerate(peaks))


def test_bytes_in_flight_are_those_of_a_stage() -> None:
    assert one_f_one_b(4, 8).bytes_in_flight(10) == (40, 30, 20, 10)
    assert one_f_one_b(4, 8, 2).bytes_in_flight(10) == (55, 45, 35, 25)


def test_time_of_transfers_and_of_unequal_stages() -> None:
    # F F> B B by hand: 1 + transfer + 1, then 2 + transfer + 2
    schedule = one_f_one_b(2, 1)
    spans = schedule.timeline(Costs(transfer=0.5))
    assert [(span.start, span.finish) for span in spans[0]] == [(0.0, 1.0), (5.0, 7.0)]
    assert [(span.start, span.finish) for span in spans[1]] == [(1.5, 2.5), (2.5, 4.5)]
    assert schedule.bubble(Costs(transfer=0.5)) == pytest.approx((2 * 7 - 6) / 6)
    # the second stage has three times the work of the first: 3 + 9 useful of 2 * 12
    assert schedule.bubble(Costs(work=(1.0, 3.0))) == pytest.approx(1.0)
    # one stage never waits for itself
    assert one_f_one_b(1, 3, 4).bubble(Costs(transfer=9.0)) == 0.0


def test_arrays_say_what_the_table_says() -> None:
    ticks = plan_ticks(read("x", INTERLEAVED)).stage_ticks
    kind, chunk, microbatch = ticks.kind, ticks.chunk, ticks.microbatch
    assert kind.shape == (18, 2) and kind.dtype == np.int32
    assert kind[:6, 1].tolist() == [0, 1, 1, 1, 2, 1]
    assert chunk[:6, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert microbatch[:6, 1].tolist() == [0, 0, 1, 0, 0, 1]
    assert plan_ticks(read("x", ZB_H1)).stage_ticks.kind.max() == 3


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 7), st.integers(1, 17), st.integers(1, 4), st.data())
def test_any_schedule_can_run(name: str, p: int, m: int, v: int, data: Any) -> None:
    v = 1 if name == "zb-h1" else v
    group = data.draw(st.none() | st.integers(p, p + 5))
    schedule = make_schedule(name, p, m, v, group=group)
    kinds = KINDS if name == "zb-h1" else KINDS[:2]
    for stage in range(p):
        wanted = {Op(kind, chunk, i) for kind, chunk, i in itertools.product(kinds, range(v), range(m))}
        assert set(schedule.order(stage)) == wanted and len(schedule.order(stage)) == len(wanted)
    ends = [row[-1].finish for row in schedule.timeline()]
    assert max(ends) >= 3 * m * v and schedule.bubble() >= 0
    assert schedule.ticks <= sum(len(schedule.order(stage)) for stage in range(p))


def changed(schedule: Schedule, cells: dict[tuple[int, int], Op | None]) -> Schedule:
    table = [list(row) for row in schedule.table]
    for (tick, stage), op in cells.items():
        table[tick][stage] = op
    return dataclasses.replace(schedule, table=tuple(map(tuple, table)))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            {(3, 3): None, (4, 3): Op("F", 0, 0), (5, 3): Op("B", 0, 0)},
            "tick 5 runs B0.0 on stage 2, but B0.0 of stage 3",
        ),
        ({(2, 3): Op("F", 0, 0), (3, 3): None}, "tick 2 runs F0.0 on stage 3, but F0.0 of stage 2"),
        ({(3, 3): Op("B", 0, 0), (4, 3): Op("F", 0, 0)}, "tick 3 runs B0.0 on stage 3, but F0.0 of stage 3"),
        ({(21, 0): None}, "B7.0 of stage 0 never runs"),
        ({(20, 0): Op("F", 0, 3)}, "tick 20 runs F3.0 on stage 0 again, after tick 3"),
        ({(20, 0): Op("F", 0, 8)}, "tick 20 runs F8.0 on stage 0, which is none of"),
        ({(20, 0): Op("F", 1, 7)}, "tick 20 runs F7.1 on stage 0, which is none of"),
        ({(4, 0): Op("W", 0, 0)}, "tick 4 runs W0.0 on stage 0, but B0.0 of stage 0"),
        ({(20, 0): Op("W", 0, 0)}, "never runs"),
    ],
)
def test_validate_catches(cells: dict[tuple[int, int], Op | None], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(changed(read("mine", ONE_F_ONE_B), cells))
    assert "\n" not in str(caught.value)


def test_validate_catches_a_torn_row() -> None:
    schedule = read("mine", ONE_F_ONE_B)
    with pytest.raises(ConfigError, match="tick 1 has 3 entries for 4 stages"):
        validate(dataclasses.replace(schedule, table=(schedule.table[0], schedule.table[1][:3])))


def test_an_order_that_waits_for_ever_is_found() -> None:
    stuck = Schedule("mine", 1, 1, 1, ((Op("B", 0, 0),), (Op("F", 0, 0),)))
    with pytest.raises(ConfigError, match="wait for each other for ever"):
        stuck.timeline()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "schedule=2f2b: is no schedule; use one of gpipe, 1f1b, zb-h1"),
        (("1f1b", 0, 2), "pipeline_model_parallel_size=0 must be at least 1"),
        (("1f1b", 2, -1), "num_microbatches=-1 must be at least 1"),
        (("gpipe", 2, 2, 0), "num_virtual_stages_per_pipeline_rank=0 must be at least 1"),
        (("zb-h1", 2, 2, 2), "zb-h1 takes one chunk a stage"),
        (("1f1b", 1000, 10**6), "operations, the limit is"),
    ],
)
def test_wrong_numbers(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_schedule(*arguments)


def test_a_group_smaller_than_the_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match="microbatch_group_size_per_vp_stage=3 must be at least the 4 stages"):
        make_schedule("1f1b", 4, 8, 2, group=3)


def test_needs_no_jax() -> None:
    code = "import sys, megajax.parallel.schedule_plot; assert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
