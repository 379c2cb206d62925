"""Schedules as the arrays an engine reads: no slot is written before it was read, and as few slots as can be."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megajax.parallel.schedule_ticks import NONE, Slots, plan_ticks
from megajax.parallel.schedules import SCHEDULES, make_schedule


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "chunks", "slots"),
    [
        # 1F1B: the first stage holds p, an input waits for one tick at most
        ("1f1b", 4, 8, 1, Slots(input=1, gradient=1, saved=(4,), saved_longer=(0,), aside=(0,))),
        ("gpipe", 2, 5, 1, Slots(input=1, gradient=5, saved=(5,), saved_longer=(0,), aside=(0,))),
        # ZB-H1: as many as 1F1B, however many microbatches
        ("zb-h1", 4, 32, 1, Slots(input=1, gradient=1, saved=(4,), saved_longer=(4,), aside=(4,))),
    ],
)
def test_slots(name, stages, microbatches, chunks, slots):
    assert plan_ticks(make_schedule(name, stages, microbatches, chunks)).slots == slots


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [(4, 8, 1), (8, 8, 1), (4, 8, 3)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_backward_in_parts_takes_the_ticks_of_its_parts_and_no_more_slots(stages, microbatches, chunks, parts):
    """Narayanan et al. 2021 (arXiv:2104.04473): the bubble of 1F1B is p - 1 forwards and backwards of a chunk."""
    schedule = make_schedule("1f1b", stages, microbatches, chunks)
    plan = plan_ticks(schedule, parts=parts)
    assert len(plan.stage_ticks.kind) == (microbatches * chunks + stages - 1) * (1 + parts)
    assert plan.slots.saved == (schedule.peak_live()[0],)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 7), st.integers(1, 17), st.integers(1, 4), st.data())
def test_what_is_read_is_what_was_written_for_it(name, stages, microbatches, chunks, data):
    """Plays the table with names in place of arrays."""
    chunks = 1 if name == "zb-h1" else chunks
    group = data.draw(st.none() | st.integers(stages, stages + 5))
    schedule = make_schedule(name, stages, microbatches, chunks, group=group)
    parts = 1 if name == "zb-h1" else data.draw(st.integers(1, 3))
    ticks, events, _ = plan_ticks(schedule, parts=parts)
    done: list[dict[tuple[int, int], int]] = [{} for _ in range(stages)]  # parts of each backward
    buffers: list[dict[tuple[str, int], tuple[int, int]]] = [{} for _ in range(stages)]
    sent: list[tuple[int, int, int] | None] = [None] * stages
    last = stages * chunks - 1
    for tick in range(len(ticks.kind)):
        at = [{field: int(array[tick, s]) for field, array in ticks._asdict().items()} for s in range(stages)]
        for stage, now in enumerate(at):
            for field, buffer, by in (("arriving_input", "input", -1), ("arriving_gradient", "gradient", 1)):
                if now[field] != NONE:
                    kind, virtual, microbatch = sent[(stage + by) % stages] or (0, 0, 0)
                    assert kind == (1 if buffer == "input" else 2)
                    buffers[stage][buffer, now[field]] = (virtual - by, microbatch)
        for stage, now in enumerate(at):
            mine = (now["chunk"] * stages + stage, now["microbatch"])
            held = buffers[stage]
            if now["kind"] == 1:
                assert mine[0] == 0 or held["input", now["input"]] == mine
                assert (mine[0] == 0) == (now["input"] == NONE)
                held["saved", now["saved"]] = held["saved_longer", now["saved_longer"]] = mine
                if mine[0] == last:
                    assert events.leaves[tick] == mine[1]
            if now["kind"] == 2:
                assert held["gradient", now["gradient"]] == held["saved", now["saved"]] == mine
                held["aside", now["aside"]] = mine
                assert now["part"] == done[stage].setdefault(mine, 0)
                done[stage][mine] += 1
                ended = done[stage][mine] == parts
                assert now["midway"] == (NONE if ended else now["gradient"]), "the next part goes on from there"
                assert (mine[0] == 0 and ended) <= (events.returns[tick] == mine[1])
            if now["kind"] == 3:
                assert held["aside", now["aside"]] == held["saved_longer", now["saved_longer"]] == mine
            ended = now["kind"] == 1 or (now["kind"] == 2 and done[stage][mine] == parts)
            sent[stage] = (now["kind"], *mine) if ended else None
        for stage, now in enumerate(at):  # the loss is worked out at the end of its tick
            if now["leaving"] != NONE:
                buffers[stage]["gradient", now["leaving"]] = (last, int(events.leaves[tick]))
    assert all(count == parts for each in done for count in each.values())
    assert [len(each) for each in done] == [chunks * microbatches] * stages
    assert np.count_nonzero(events.enters != NONE) == np.count_nonzero(events.returns != NONE) == microbatches
