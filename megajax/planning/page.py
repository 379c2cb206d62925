"""The plan as one page of HTML that needs nothing else."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

from megajax.parallel.schedules import Schedule
from megajax.planning.memory import Holder
from megajax.planning.report import FORMULA, Report, Traffic
from megajax.planning.text import (
    COLLECTIVE_HEAD,
    MEMORY_NOTE,
    collective_rows,
    count,
    duration,
    flops_rows,
    formula_line,
    heading,
    memory_rows,
    size,
    verdict,
)

_COLOURS = ("#4269d0", "#6cc5b0", "#efb118", "#ff725c", "#a463f2", "#9c6b4e", "#97bbf5", "#ff8ab7")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.lead { color: var(--soft); margin-top: .2rem; }
.verdict { padding: .7rem 1rem; border-radius: .4rem; border-left: .4rem solid; background: #8881; }
.yes { border-color: #3ca951; } .no { border-color: #d62728; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.tile { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.4rem; }
.bar { display: flex; height: 2.2rem; border-radius: .3rem; overflow: hidden; background: #8882; position: relative; }
.bar > span { display: block; height: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin-top: .5rem; font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .4em; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
.words { text-align: left; }
.bar > em { position: absolute; top: 0; bottom: 0; border-left: 2px dashed currentColor; }
.legend u { border-left: 2px dashed currentColor; margin-right: .5em; }
svg { width: 100%; height: auto; max-height: 22rem; } summary { cursor: pointer; margin-top: 1rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""


def page(report: Report) -> str:
    """The page's text. Pictures are HTML and SVG, so it prints, zooms and follows a dark theme."""
    memory = report.memory
    title, *leads = heading(report)
    tiles = [
        ("peak memory", size(memory.peak)),
        ("a step, at least", duration(report.seconds)),
        ("MFU, at most", f"{report.mfu:.1%}"),
        ("tokens/s per GPU", f"{report.tokens_per_second:,.0f}"),
        ("executed / model FLOPs", f"{report.executed_flops / report.model_flops:.2f}x"),
        ("pipeline bubble", f"{report.bubble:.1%}"),
    ]
    free = max(0, memory.card - memory.peak)
    waits = [
        (f"waits: {row.kind} over {row.axes}, {'in layers' if row.in_layers else 'around them'}", row.exposed)
        for row in report.traffic
        if row.exposed > report.seconds / 1000
    ]
    waits.append(("waits: the rest", report.exposed - sum(seconds for _, seconds in waits)))
    ratio = formula_line(report)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="lead">{html.escape(lead)}</p>' for lead in leads),
        f'<p class="verdict {"yes" if memory.fits else "no"}">{html.escape(verdict(memory, report.target))}</p>',
        tile_row(tiles),
        "<h2>Memory of a GPU at the peak</h2>",
        bar([*memory_rows(report), ("free", free)], size, max(memory.card, memory.peak), mark=memory.capacity),
        *([f"<p>{html.escape(ratio)}</p>"] if ratio else []),
        largest(memory.largest),
        "<h2>Time of a step</h2>",
        bar([("operations", report.compute), *waits], duration, report.seconds),
        "<h2>What a GPU computes</h2>",
        bar(flops_rows(report), count, report.executed_flops),
        f"<p>Recomputed in the backward pass: {html.escape(report.recompute)}.</p>",
    ]
    if report.schedule is not None:
        parts += ["<h2>Pipeline</h2>", _pipeline(report.schedule)]
    share = f"Of the bytes that layers send, {report.covered_share:.0%} have operations beside them."
    parts += [*collective_parts(share, report.traffic, report.uncovered), *kernel_parts(report.kernels)]
    return document(title, parts, f"{FORMULA} {MEMORY_NOTE}")


def largest(holders: Sequence[Holder]) -> str:
    """What is alive at the peak, folded away."""
    rows = [(held.name, held.shape, f"{held.arrays}", size(held.size)) for held in holders]
    shown = grid(("from", "shape", "arrays", "bytes"), rows, words=2)
    return f"<details><summary>The largest arrays alive then</summary>{shown}</details>"


def collective_parts(lead: str, traffic: Sequence[Traffic], uncovered: Mapping[str, float]) -> list[str]:
    """The collectives, and which of them nothing hides."""
    parts = []
    if traffic:
        rows = collective_rows(traffic)
        parts += ["<h2>Collectives of a GPU</h2>", f"<p>{lead}</p>", grid(COLLECTIVE_HEAD, rows, words=4)]
    if uncovered:
        named = [(name, size(sent)) for name, sent in uncovered.items()]
        parts += ["<h2>Collectives with no operation beside them</h2>", grid(("collective", "sent"), named)]
    return parts


def kernel_parts(executions: Mapping[str, int]) -> list[str]:
    """Hand-written kernels and library calls."""
    rows = [(name, f"{times:,}") for name, times in executions.items()]
    return ["<h2>Kernels</h2>", grid(("kernel", "executions"), rows)] if rows else []


def tile_row(tiles: Sequence[tuple[str, str]]) -> str:
    """The numbers that matter most."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile">{name}<b>{value}</b></div>' for name, value in tiles)
        + "</div>"
    )


def document(title: str, parts: Sequence[str], notes: str) -> str:
    """A page of these parts, with notes at its foot."""
    parts = [*parts, f"<footer>{html.escape(notes)}</footer>"]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n' + "\n".join(parts) + "</html>\n"
    )


def bar(
    parts: Sequence[tuple[str, float]], unit: Callable[[float], str], whole: float, mark: float | None = None
) -> str:
    """One bar of parts, and what they are. mark: where a line is drawn."""
    shown = [(name, value) for name, value in parts if value > 0]
    names = [name for name, _ in shown if name != "free"]
    colours = [_COLOURS[names.index(name) % len(_COLOURS)] if name != "free" else "#8883" for name, _ in shown]
    spans = "".join(
        f'<span style="width:{100 * value / whole:.3f}%;background:{colour}"'
        f' title="{html.escape(name)}: {unit(value)}"></span>'
        for (name, value), colour in zip(shown, colours, strict=True)
    )
    legend = ""
    if mark is not None:
        spans += f'<em style="left:{min(100, 100 * mark / whole):.3f}%"></em>'
        legend = f"<span><u></u>usable <b>{unit(mark)}</b></span>"
    legend = legend + "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)} <b>{unit(value)}</b></span>'
        for (name, value), colour in zip(shown, colours, strict=True)
    )
    return f'<div class="bar">{spans}</div><div class="legend">{legend}</div>'


_TICKS = 64
_OPERATIONS = {"F": ("forward", "#4269d0"), "B": ("backward", "#3ca951"), "W": ("gradients of weights", "#efb118")}


def _pipeline(schedule: Schedule) -> str:
    """Who does what when, for the first ticks."""
    ticks, side = min(schedule.ticks, _TICKS), 14
    cells = [
        f'<rect x="{side * tick}" y="{side * stage}" width="{side - 2}" height="{side - 2}" rx="2"'
        f' fill="{_OPERATIONS[op.kind][1]}" opacity="{1 - 0.5 * op.chunk / schedule.chunks:.2f}">'
        f"<title>stage {stage}, tick {tick}: {_OPERATIONS[op.kind][0]} of microbatch {op.microbatch}"
        f"{f', chunk {op.chunk}' if schedule.chunks > 1 else ''}</title></rect>"
        for tick, row in enumerate(schedule.table[:ticks])
        for stage, op in enumerate(row)
        if op is not None
    ]
    kinds = [kind for kind in _OPERATIONS if kind != "W" or schedule.splits_backward]
    legend = "".join(
        f'<span><i style="background:{_OPERATIONS[kind][1]}"></i>{_OPERATIONS[kind][0]}</span>' for kind in kinds
    )
    more = f", the first {ticks} of {schedule.ticks:,} ticks" if ticks < schedule.ticks else ""
    caption = f"{schedule.name}: a row is a stage, a column a tick{more}"
    return (
        f'<svg viewBox="0 0 {side * ticks} {side * schedule.stages}" role="img">{"".join(cells)}</svg>'
        f'<div class="legend">{legend}<span>{html.escape(caption)}</span></div>'
    )


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table. words: columns of words, which stand to the left."""

    def line(cells: Sequence[str], tag: str) -> str:
        left = ' class="words"'
        return (
            "<tr>"
            + "".join(f"<{tag}{left if i < words else ''}>{html.escape(c)}</{tag}>" for i, c in enumerate(cells))
            + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
