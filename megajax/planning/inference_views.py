"""The plan of a step of generation as text for a terminal, and as a page of HTML."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import html

from megajax.planning import page
from megajax.planning.inference import FLOOR, InferenceReport
from megajax.planning.report import FORMULA
from megajax.planning.text import bars, collectives, compile_times, count, duration, kernels, size, verdict

_MEMORY_NOTE = "Parameters, cache and inputs are arithmetic; working space is what XLA has assigned."


def heading(report: InferenceReport) -> list[str]:
    """What was planned, in two lines."""
    first = (
        f"{report.model}, {count(report.parameters)} parameters in {report.params_dtype}, on {report.devices:,}"
        f" {report.target.upper()} ({report.mesh})"
    )
    room = f"{report.requests:,} request{'s' * (report.requests > 1)} of up to {report.length:,} tokens"
    if report.phase == "decode":
        return [first, f"a step of decoding: one token more for each of {room}"]
    return [first, f"a prefill: the prompts of {room}, which fill the cache"]


def memory_rows(report: InferenceReport) -> list[tuple[str, int]]:
    """The parts of the peak; what no part accounts for is rounding."""
    memory = report.memory
    return [
        ("parameters", memory.parameters),
        ("cache", memory.cache),
        ("working space", memory.temporaries),
        ("inputs", memory.inputs),
    ]


def time_rows(report: InferenceReport) -> list[tuple[str, float]]:
    """What a step's time is for."""
    floor = min(report.floor, report.compute)
    return [
        ("floor", floor),
        ("other operations", report.compute - floor),
        ("waiting for others", report.exposed),
    ]


def format_inference(report: InferenceReport) -> str:
    """The whole plan."""
    per = "token" if report.phase == "decode" else "prefill"
    lines = [
        *heading(report),
        "",
        f"MEMORY  {verdict(report.memory, report.target)}",
        *bars(memory_rows(report), size, report.memory.card),
        "",
        f"TIME    a step takes at least {duration(report.seconds)}: {report.tokens_per_second:,.0f} tokens/s per GPU at"
        f" most; the floor is {duration(report.floor)}",
        *bars(time_rows(report), duration, report.seconds),
        "",
        f"FLOPS   {count(report.executed_flops)} executed on each GPU",
        *collectives(f"COLLECTIVES of a GPU, for each {per}", report.traffic, report.uncovered),
        *kernels(report.kernels),
        "",
        FORMULA,
        FLOOR,
        compile_times(report.seconds_to_compile),
    ]
    return "\n".join(lines)


def inference_page(report: InferenceReport) -> str:
    """The page's text; see `megajax.planning.page.page`."""
    memory = report.memory
    title, lead = heading(report)
    tiles = [
        ("peak memory", size(memory.peak)),
        ("cache", size(memory.cache)),
        ("a step, at least", duration(report.seconds)),
        ("tokens/s per GPU, at most", f"{report.tokens_per_second:,.0f}"),
        ("the floor of a step", duration(report.floor)),
    ]
    free = max(0, memory.card - memory.peak)
    per = "token" if report.phase == "decode" else "prefill"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(lead)}</p>',
        f'<p class="verdict {"yes" if memory.fits else "no"}">{html.escape(verdict(memory, report.target))}</p>',
        page.tile_row(tiles),
        "<h2>Memory of a GPU at the peak</h2>",
        page.bar([*memory_rows(report), ("free", free)], size, max(memory.card, memory.peak), mark=memory.capacity),
        page.largest(memory.largest),
        "<h2>Time of a step</h2>",
        page.bar(time_rows(report), duration, report.seconds),
        *page.collective_parts(f"For each {per}.", report.traffic, report.uncovered),
        *page.kernel_parts(report.kernels),
    ]
    return page.document(title, parts, f"{FORMULA} {FLOOR} {_MEMORY_NOTE}")
