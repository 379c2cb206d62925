"""Pipeline schedules as pictures: a grid of ticks for the terminal, and boxes over time with the memory they hold."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megajax.parallel.pipeline_layout import Layout
from megajax.parallel.schedules import KINDS, Costs, Kind, Op, Schedule, Span, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEANINGS: dict[Kind, str] = {"F": "forward", "B": "backward: input gradients", "W": "backward: weight gradients"}
# Of each kind the first chunk's colour and the last one's; chunks between lie between.
COLOURS: dict[Kind, tuple[str, str]] = {
    "F": ("#2b62ab", "#a9c8ef"),
    "B": ("#1c7a5b", "#a5dcc4"),
    "W": ("#c2601a", "#f6cb9d"),
}
INK, FAINT, LANE, MEMORY = "#1d2733", "#66727f", "#eef1f4", "#7d6bb3"


def draw_text(schedule: Schedule, *, width: int = 120, max_lines: int = 60) -> str:
    """The table as text: a row a stage, a column a tick, a dot where a stage idles. `F3.1` is chunk 1's F3.

    Args:
      width: columns at most; wider tables continue below. max_lines: of a longer one the middle is left out.
    """
    names = [["." if op is None else _short(op, schedule) for op in row] for row in schedule.table]
    cell = max(len(name) for row in names for name in [*row, str(schedule.ticks - 1)]) + 1
    heads = ["tick", *(f"stage {stage}" for stage in range(schedule.stages))]
    margin = max(map(len, heads)) + 2
    columns = max(1, (width - margin) // cell)
    blocks = []
    for first in range(0, schedule.ticks, columns):
        ticks = range(first, min(first + columns, schedule.ticks))
        rows = [[str(tick) for tick in ticks], *([names[t][stage] for t in ticks] for stage in range(schedule.stages))]
        lines = [
            head.ljust(margin) + "".join(name.ljust(cell) for name in row)
            for head, row in zip(heads, rows, strict=True)
        ]
        blocks.append("\n".join(line.rstrip() for line in lines))
    shown = max(1, max_lines // (schedule.stages + 2) // 2)
    if len(blocks) > 2 * shown:
        hidden = range(shown * columns, (len(blocks) - shown) * columns)
        blocks[shown:-shown] = [f"... ticks {hidden[0]} to {hidden[-1]} ..."]
    return "\n\n".join(blocks)


def summary(schedule: Schedule, costs: Costs, bytes_per_microbatch: float | None = None) -> str:
    """What the schedule costs, in a few lines: idle time, and activations that each stage holds at its peak."""
    pieces = "microbatches" if schedule.chunks == 1 else "(chunk, microbatch) pairs"
    lines = [
        f"{schedule.ticks} ticks, bubble {schedule.bubble(costs):.1%} of the useful time ({_costs(schedule, costs)})",
        f"{pieces} alive at most, by stage: {_runs(schedule.peak_live())}",
    ]
    if bytes_per_microbatch is not None:
        sizes = [readable_bytes(size) for size in schedule.bytes_in_flight(bytes_per_microbatch)]
        lines.append(f"their activations, by stage: {_runs(sizes)}")
    return "\n".join(lines)


def draw_layout(layout: Layout, stages: int) -> str:
    """Which layers each stage holds, its chunks between bars; equal neighbours share a line."""
    rows = [" | ".join(part or "-" for part in layout[stage::stages]) for stage in range(stages)]
    lines, stage = [], 0
    for row, equal in itertools.groupby(rows):
        last = stage + len(list(equal)) - 1
        name = f"stage {stage}" if last == stage else f"stages {stage}-{last}"
        lines.append((name, row))
        stage = last + 1
    margin = max(len(name) for name, _ in lines) + 2
    return "\n".join(name.ljust(margin) + row for name, row in lines)


def readable_bytes(size: float) -> str:
    """`1536` -> `1.5 KiB`."""
    power = 0
    while size >= 1024 and power < 5:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}" if power else f"{size:.0f} B"


def draw_figure(schedule: Schedule, costs: Costs, bytes_per_microbatch: float | None = None) -> Figure:
    """Operations over time, a row a stage, and below what each stage holds meanwhile. Save it with `savefig`.

    Boxes are coloured by kind and shaded by chunk, and bear the number of their microbatch where it fits.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    spans = schedule.timeline(costs)
    end = max(stage[-1].finish for stage in spans)
    row = min(0.4, 11 / schedule.stages)  # inches, as all sizes here
    left, right, top, gap, bottom = 0.85, 1.0, 0.95, 0.55, 0.6
    boxes, strips = row * schedule.stages, 0.8 * row * schedule.stages
    inner = min(max(0.26 * end / min(costs.forward, costs.input_gradient), 7.5), 20.0)
    width, height = left + inner + right, top + boxes + gap + strips + bottom
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    above = figure.add_axes((left / width, 1 - (top + boxes) / height, inner / width, boxes / height))
    below = figure.add_axes((left / width, bottom / height, inner / width, strips / height), sharex=above)
    _draw_boxes(above, schedule, spans, points_per_unit=72 * inner / end, row_points=72 * row)
    _draw_memory(below, schedule, spans, bytes_per_microbatch)
    for axes in (above, below):
        _bare(axes, schedule.stages, min(9.0, 72 * row * 0.7))
    above.tick_params(labelbottom=False)
    below.set_xlim(0, end)
    below.set_xlabel(f"time (a forward of one {'stage' if schedule.chunks == 1 else 'chunk'} = {costs.forward:g})")
    below.xaxis.label.set(color=FAINT, size=9)
    below.set_title("activations held (each row from 0 to the highest peak)", loc="left", size=9, color=FAINT, pad=5)
    _draw_title(figure, schedule, costs, left / width, height)
    return figure


def _draw_boxes(
    axes: Axes, schedule: Schedule, spans: Sequence[Sequence[Span]], *, points_per_unit: float, row_points: float
) -> None:
    digits = len(str(schedule.microbatches - 1))
    for stage, row in enumerate(spans):
        ordered = sorted(row, key=lambda span: (span.op.kind, span.op.chunk))
        for (kind, chunk), group in itertools.groupby(ordered, key=lambda span: (span.op.kind, span.op.chunk)):
            same = list(group)
            colour = _shade(kind, chunk, schedule.chunks)
            bars = [(span.start, span.finish - span.start) for span in same if span.finish > span.start]
            edge = min(0.9, 0.12 * points_per_unit)
            axes.broken_barh(bars, (stage - 0.43, 0.86), facecolor=colour, edgecolor="white", linewidth=edge)
            for span in same:
                size = min(9.0, 0.6 * row_points, 1.25 * points_per_unit * (span.finish - span.start) / digits)
                if size >= 5.5:
                    middle = (span.start + span.finish) / 2
                    ink = "white" if _luminance(colour) < 0.5 else INK
                    text = str(span.op.microbatch)
                    axes.text(middle, stage, text, size=size, color=ink, ha="center", va="center_baseline")


def _draw_memory(
    axes: Axes, schedule: Schedule, spans: Sequence[Sequence[Span]], bytes_per_microbatch: float | None
) -> None:
    frees = "W" if schedule.splits_backward else "B"
    peaks = schedule.peak_live()
    notes = [str(peak) for peak in peaks]
    if bytes_per_microbatch is not None:
        notes = [readable_bytes(size) for size in schedule.bytes_in_flight(bytes_per_microbatch)]
    for stage, row in enumerate(spans):
        taken = [(span.start, 1) for span in row if span.op.kind == "F"]
        freed = [(span.finish, -1) for span in row if span.op.kind == frees]
        times, changes = zip(*sorted(taken + freed), strict=True)
        heights = [0.86 * live / max(peaks) for live in itertools.accumulate(changes)]
        floor = stage + 0.43
        axes.fill_between(
            times, floor, [floor - h for h in heights], step="post", color=MEMORY, alpha=0.75, linewidth=0
        )
        if stage % _label_step(schedule.stages) == 0:
            axes.text(1.01, stage, notes[stage], transform=axes.get_yaxis_transform(), size=9, color=INK, va="center")
    axes.annotate(
        "at most", (1.01, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", size=9, color=FAINT
    )


def _bare(axes: Axes, stages: int, size: float) -> None:
    """A pale lane for every stage, in which idle time shows; no frame."""
    for stage in range(stages):
        axes.axhspan(stage - 0.43, stage + 0.43, color=LANE, linewidth=0, zorder=0)
    axes.set_ylim(stages - 0.5, -0.5)
    step = _label_step(stages)
    axes.set_yticks(range(0, stages, step), [f"stage {stage}" for stage in range(0, stages, step)])
    axes.tick_params(length=0, labelsize=size, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=9, labelcolor=FAINT)
    axes.spines[:].set_visible(False)


def _draw_title(figure: Figure, schedule: Schedule, costs: Costs, left: float, height: float) -> None:
    from matplotlib.patches import Patch

    chunks = f" of {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    title = f"{schedule.name}: {schedule.stages} stages{chunks}, {schedule.microbatches} microbatches"
    figure.text(left, 1 - 0.3 / height, title, size=13, weight="bold", color=INK)
    bubble = f"bubble {schedule.bubble(costs):.1%} of the useful time  ({_costs(schedule, costs)})"
    figure.text(left, 1 - 0.52 / height, bubble, size=9.5, color=FAINT)
    kinds: tuple[Kind, ...] = KINDS if schedule.splits_backward else ("F", "B")
    meanings = MEANINGS if schedule.splits_backward else {**MEANINGS, "B": "backward"}
    swatches = [Patch(color=_shade(kind, 0, schedule.chunks), label=meanings[kind]) for kind in kinds]
    if schedule.chunks > 1:
        swatches[0].set_label("forward, chunk 0")
        last = schedule.chunks - 1
        swatches.insert(1, Patch(color=_shade("F", last, schedule.chunks), label=f"forward, chunk {last}"))
    figure.legend(
        handles=[*swatches, Patch(color=LANE, label="idle")],
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.58 / height),
        ncols=len(swatches) + 1,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
        handleheight=0.9,
        borderpad=0,
        borderaxespad=0.15,
        columnspacing=1.6,
    )


def _label_step(stages: int) -> int:
    """Every how many stages there is room for a label."""
    return -(-stages // 32)


def _short(op: Op, schedule: Schedule) -> str:
    return label(op) if schedule.chunks > 1 else f"{op.kind}{op.microbatch}"


def _costs(schedule: Schedule, costs: Costs) -> str:
    """`F=1, B=2`."""
    times = {kind: costs.of(kind, schedule.splits_backward) for kind in KINDS}
    shown = [f"{kind}={time:g}" for kind, time in times.items() if time]
    return ", ".join(shown) + (", stages weighted by their layers" if costs.work else "")


def _runs(values: Sequence[object]) -> str:
    """Values with repetitions counted, the middle of many left out: `4, 3, 2, 1`, `4 (8 times)`."""
    groups = [(value, len(list(group))) for value, group in itertools.groupby(values)]
    words = [f"{value} ({count} times)" if count > 1 else str(value) for value, count in groups]
    return ", ".join(words if len(words) <= 16 else [*words[:4], "...", *words[-4:]])


def _shade(kind: Kind, chunk: int, chunks: int) -> tuple[float, float, float]:
    share = chunk / (chunks - 1) if chunks > 1 else 0.0
    dark, light = (tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)) for colour in COLOURS[kind])
    r, g, b = ((1 - share) * x + share * y for x, y in zip(dark, light, strict=True))
    return r, g, b


def _luminance(colour: tuple[float, float, float]) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
