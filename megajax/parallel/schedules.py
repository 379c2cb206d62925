"""Pipeline schedules as data: which stage runs which forward or backward at which tick, made and checked without JAX.

A stage s of p holds v chunks of the model; chunk c of stage s is virtual stage c * p + s, so that a microbatch goes
round the stages v times. A tick is one slot of a lock-step engine: every stage runs at most one operation, and what it
computes reaches the neighbours at the next tick. Ticks say nothing of time; `Schedule.timeline` does.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from megajax.config import ConfigError
from megajax.config_checks import require

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")
MAX_OPS = 4_000_000
"""Operations of the largest table that is made: beyond it something was mistyped."""


class Op(NamedTuple):
    """One operation of a stage. `B` is the whole backward, or where the schedule has `W`, which computes the gradients
    of the weights, the part that computes the gradient of the input."""

    kind: Kind
    chunk: int
    microbatch: int


class Span(NamedTuple):
    """When an operation runs, in the units of `Costs`."""

    op: Op
    start: float
    finish: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time of the operations of one chunk; only ratios matter."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    transfer: float = 0.0
    """From a stage to its neighbour; the sender goes on meanwhile."""
    work: tuple[float, ...] | None = None
    """What the operations of each virtual stage take relative to the others, such as its layers; None: the same."""

    def of(self, kind: Kind, splits_backward: bool) -> float:
        """Time of an operation; without operations `W`, `B` does their work too."""
        whole = self.input_gradient + self.weight_gradient
        times: dict[Kind, tuple[float, float]] = {
            "F": (self.forward, self.forward),
            "B": (whole, self.input_gradient),
            "W": (0.0, self.weight_gradient),
        }
        return times[kind][splits_backward]


class _Key(NamedTuple):
    kind: Kind
    virtual_stage: int
    microbatch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table of operations. `table[tick][stage]` is an Op or None; `validate` says whether it can run."""

    name: str
    stages: int
    chunks: int
    microbatches: int
    table: tuple[tuple[Op | None, ...], ...]

    @property
    def ticks(self) -> int:
        """Slots that every stage spends, idle ones included."""
        return len(self.table)

    @property
    def virtual_stages(self) -> int:
        """Pieces the model is cut into."""
        return self.stages * self.chunks

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are operations of their own."""
        return any(op is not None and op.kind == "W" for row in self.table for op in row)

    def order(self, stage: int) -> tuple[Op, ...]:
        """Operations of a stage, first to last."""
        return tuple(op for row in self.table if (op := row[stage]) is not None)

    def timeline(self, costs: Costs | None = None) -> tuple[tuple[Span, ...], ...]:
        """For each stage when its operations run if each begins once its stage is free and its inputs are there."""
        costs = costs or Costs()
        times = {kind: costs.of(kind, self.splits_backward) for kind in KINDS}
        work = costs.work or (1.0,) * self.virtual_stages
        finished: dict[_Key, float] = {}
        spans: list[list[Span]] = [[] for _ in range(self.stages)]

        def start(stage: int, op: Op) -> float | None:
            key = _key(op, stage, self.stages)
            at = spans[stage][-1].finish if spans[stage] else 0.0
            for need in _needs(key, self.virtual_stages):
                if need not in finished:
                    return None
                moves = need.virtual_stage % self.stages != stage
                at = max(at, finished[need] + (costs.transfer if moves else 0.0))
            return at

        left = [list(reversed(self.order(stage))) for stage in range(self.stages)]
        while any(left):
            before = len(finished)
            for stage, ops in enumerate(left):
                while ops and (at := start(stage, ops[-1])) is not None:
                    op = ops.pop()
                    key = _key(op, stage, self.stages)
                    finished[key] = at + times[op.kind] * work[key.virtual_stage]
                    spans[stage].append(Span(op, at, finished[key]))
            if len(finished) == before:
                raise ConfigError(f"schedule={self.name}: its stages wait for each other for ever; reorder them")
        return tuple(map(tuple, spans))

    def bubble(self, costs: Costs | None = None) -> float:
        """Idle time over useful time of all stages, as in the papers: (p - 1) / m for 1F1B with equal stages."""
        spans = self.timeline(costs)
        end = max(stage[-1].finish for stage in spans)
        useful = sum(span.finish - span.start for stage in spans for span in stage)
        return (self.stages * end - useful) / useful

    def peak_live(self) -> tuple[int, ...]:
        """For each stage the most (chunk, microbatch) pairs whose activations it holds at once.

        They live from F until the last operation that reads them: W where there is one, else B.
        """
        frees = "W" if self.splits_backward else "B"
        steps = ([(op.kind == "F") - (op.kind == frees) for op in self.order(stage)] for stage in range(self.stages))
        return tuple(max(itertools.accumulate(step), default=0) for step in steps)

    def bytes_in_flight(self, bytes_per_microbatch: float) -> tuple[int, ...]:
        """Peak memory of activations of each stage.

        Args:
          bytes_per_microbatch: what one microbatch leaves on one stage, all its chunks together.
        """
        return tuple(round(live * bytes_per_microbatch / self.chunks) for live in self.peak_live())


def _key(op: Op, stage: int, stages: int) -> _Key:
    return _Key(op.kind, op.chunk * stages + stage, op.microbatch)


def _needs(key: _Key, virtual_stages: int) -> list[_Key]:
    """What must have run before."""
    kind, here, microbatch = key
    if kind == "F":
        return [_Key("F", here - 1, microbatch)] if here else []
    if kind == "W":
        return [_Key("B", here, microbatch)]
    after = [_Key("B", here + 1, microbatch)] if here + 1 < virtual_stages else []
    return [_Key("F", here, microbatch), *after]


def validate(schedule: Schedule) -> None:
    """Checks that every operation stands in the table once and finds its inputs there when it runs.

    Raises:
      ConfigError: it does not; the first fault in one line.
    """
    name, stages, virtual_stages = schedule.name, schedule.stages, schedule.virtual_stages
    done: dict[_Key, int] = {}
    for tick, row in enumerate(schedule.table):
        where = f"schedule={name}: tick {tick}"
        if len(row) != stages:
            raise ConfigError(f"{where} has {len(row)} entries for {stages} stages; give one a stage")
        keys = [(stage, op, _key(op, stage, stages)) for stage, op in enumerate(row) if op is not None]
        for stage, op, key in keys:
            what = f"{where} runs {label(op)} on stage {stage}"
            known = op.kind in KINDS and 0 <= op.chunk < schedule.chunks
            if not (known and 0 <= op.microbatch < schedule.microbatches):
                raise ConfigError(
                    f"{what}, which is none of its {schedule.chunks} chunks and {schedule.microbatches} microbatches; "
                    "remove it"
                )
            if key in done:
                raise ConfigError(f"{what} again, after tick {done[key]}; remove one of them")
            for need in _needs(key, virtual_stages):
                if need not in done:
                    origin = Op(need.kind, need.virtual_stage // stages, need.microbatch)
                    raise ConfigError(
                        f"{what}, but {label(origin)} of stage {need.virtual_stage % stages}, which it needs, has not "
                        "run by then; move it to a later tick"
                    )
        # Only now: what runs at this tick is seen by others at the next.
        done |= {key: tick for _, _, key in keys}
    kinds: tuple[Kind, ...] = KINDS if schedule.splits_backward else ("F", "B")
    for kind, here, microbatch in itertools.product(kinds, range(virtual_stages), range(schedule.microbatches)):
        if _Key(kind, here, microbatch) not in done:
            missing = label(Op(kind, here // stages, microbatch))
            raise ConfigError(f"schedule={name}: {missing} of stage {here % stages} never runs; add it to the table")


def label(op: Op) -> str:
    """`F3.1`: forward of microbatch 3 through chunk 1."""
    return f"{op.kind}{op.microbatch}.{op.chunk}"


# Makers: an order of operations for every stage, put into ticks.


def gpipe(stages: int, microbatches: int, chunks: int = 1, group: int | None = None) -> Schedule:
    """All forwards, then all backwards in reverse, as autodiff does (arXiv:1811.06965). It holds every activation.

    Args:
      group: as in `one_f_one_b`.
    """
    group = _check("gpipe", stages, microbatches, chunks, group)
    forwards = _rounds(microbatches, chunks, group)
    backwards = [Op("B", chunk, i) for _, chunk, i in reversed(forwards)]
    return _in_ticks("gpipe", stages, microbatches, chunks, [_existing(forwards + backwards, microbatches)] * stages)


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1, group: int | None = None) -> Schedule:
    """1F1B (arXiv:2006.09503), interleaved for several chunks (arXiv:2104.04473): the order of Megatron's schedules.py.

    A stage starts with forwards, p - s - 1 of them, or 2 (p - s - 1) + (chunks - 1) group when interleaved; then a
    forward and a backward take turns; the rest is backwards. If `group` does not divide the microbatches, the order is
    that of the next multiple, with the microbatches that do not exist left out: it cannot deadlock, where the counts
    of Megatron, which refuses such numbers, would.

    Args:
      group: microbatches that pass one chunk before the next chunk's turn (microbatch_group_size_per_vp_stage), at
        least `stages`, the default.
    """
    group = _check("1f1b", stages, microbatches, chunks, group)
    forwards = _rounds(microbatches, chunks, group)
    backwards = [Op("B", chunks - 1 - chunk, i) for _, chunk, i in forwards]
    orders = []
    for stage in range(stages):
        later = stages - stage - 1
        warm_up = later if chunks == 1 else 2 * later + (chunks - 1) * group
        turns = itertools.chain.from_iterable(itertools.zip_longest(forwards[warm_up:], backwards))
        orders.append(_existing([*forwards[:warm_up], *(op for op in turns if op is not None)], microbatches))
    return _in_ticks("1f1b", stages, microbatches, chunks, orders)


def zb_h1(stages: int, microbatches: int, chunks: int = 1, group: int | None = None) -> Schedule:
    """ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241): 1F1B with the weight gradients split off.

    Stage s computes those of a microbatch s backwards late. Every stage then holds the activations of at most p
    microbatches, what 1F1B's first stage holds, and fills with weight gradients what was idle at the end: the bubble is
    (p - 1) (F + B - W) instead of (p - 1) (F + B + W).
    """
    _check("zb-h1", stages, microbatches, chunks, group)
    if chunks != 1:
        raise ConfigError(
            f"num_virtual_stages_per_pipeline_rank={chunks}: zb-h1 takes one chunk a stage; remove it, or use 1f1b"
        )
    orders = []
    for stage in range(stages):
        warm_up = stages - stage - 1
        order = [Op("F", 0, i) for i in range(warm_up)]
        for i in range(microbatches + stage):
            order += [Op("F", 0, i + warm_up), Op("B", 0, i), Op("W", 0, i - stage)]
        orders.append(_existing(order, microbatches))
    return _in_ticks("zb-h1", stages, microbatches, chunks, orders)


SCHEDULES: Mapping[str, Callable[[int, int, int, int | None], Schedule]] = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1}
)


def make_schedule(name: str, stages: int, microbatches: int, chunks: int = 1, *, group: int | None = None) -> Schedule:
    """The schedule called `name`, checked.

    Raises:
      ConfigError: there is none of that name, or the numbers do not suit it.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name}: is no schedule; use one of {', '.join(SCHEDULES)}")
    schedule = SCHEDULES[name](stages, microbatches, chunks, group)
    validate(schedule)
    return schedule


def _check(name: str, stages: int, microbatches: int, chunks: int, group: int | None) -> int:
    """The size of a group, once all numbers are known to be good."""
    fields = ("pipeline_model_parallel_size", "num_microbatches", "num_virtual_stages_per_pipeline_rank")
    numbers = dict(zip(fields, (stages, microbatches, chunks), strict=True))
    for field, value in numbers.items():
        require(value >= 1, f"{field}={value} must be at least 1")
    ops = stages * chunks * microbatches * len(KINDS)
    if ops > MAX_OPS:
        wanted = ", ".join(f"{field}={value}" for field, value in numbers.items())
        raise ConfigError(f"{wanted}: {name} would have up to {ops:,} operations, the limit is {MAX_OPS:,}; lower one")
    if group is None:
        return stages
    require(group >= stages, f"microbatch_group_size_per_vp_stage={group} must be at least the {stages} stages")
    return min(group, max(stages, microbatches))


def _rounds(microbatches: int, chunks: int, group: int) -> list[Op]:
    """Forwards of any stage: a group of microbatches through each chunk in turn, then the next group. The last group
    is filled up with microbatches that do not exist.
    """
    return [
        Op("F", chunk, i)
        for first in range(0, microbatches, group)
        for chunk in range(chunks)
        for i in range(first, first + group)
    ]


def _existing(order: Sequence[Op], microbatches: int) -> list[Op]:
    return [op for op in order if 0 <= op.microbatch < microbatches]


def _in_ticks(name: str, stages: int, microbatches: int, chunks: int, orders: Sequence[Sequence[Op]]) -> Schedule:
    """Gives every operation the first tick at which its stage is free and its inputs have arrived."""
    rows = _first_ticks(name, stages, chunks, orders, parts=1)
    table = tuple(tuple(None if cell is None else cell[0] for cell in row) for row in rows)
    return Schedule(name, stages, chunks, microbatches, table)


Cells = tuple[tuple[tuple[Op, int] | None, ...], ...]
"""Of each tick and stage (operation, which part of it), or None."""


def in_parts(schedule: Schedule, parts: int) -> Cells:
    """The operations in the same order, but a backward takes so many ticks, a part of its layers each.

    A backward takes twice the time of a forward, and with recomputation three times. Where every stage waits at the end
    of a tick, ticks of about the same length let 1F1B take the time that it takes without ticks.
    """
    orders = [schedule.order(stage) for stage in range(schedule.stages)]
    return _first_ticks(schedule.name, schedule.stages, schedule.chunks, orders, parts)


def _first_ticks(name: str, stages: int, chunks: int, orders: Sequence[Sequence[Op]], parts: int) -> Cells:
    left = [list(reversed(order)) for order in orders]
    under_way: list[list[tuple[Op, int]]] = [[] for _ in range(stages)]
    done: set[_Key] = set()
    rows = []
    while any(left) or any(under_way):
        for stage, (ops, mine) in enumerate(zip(left, under_way, strict=True)):
            if not mine and ops and done.issuperset(_needs(_key(ops[-1], stage, stages), stages * chunks)):
                op = ops.pop()
                mine += [(op, part) for part in reversed(range(parts if op.kind == "B" else 1))]
        row = tuple(mine.pop() if mine else None for mine in under_way)
        if not any(row):
            raise ConfigError(f"schedule={name}: its stages wait for each other for ever; reorder them")
        ended = [(stage, cell) for stage, cell in enumerate(row) if cell is not None and not under_way[stage]]
        done |= {_key(op, stage, stages) for stage, (op, _) in ended}
        rows.append(row)
    return tuple(rows)
