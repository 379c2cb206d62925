"""The plan as text for a terminal."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megajax.planning.inference import InferenceMemory
from megajax.planning.memory import USABLE, Memory
from megajax.planning.report import FORMULA, Report, Traffic
from megajax.planning.search import Found

MEMORY_NOTE = (
    "Parameters, optimizer state and batch are arithmetic; the other parts are what XLA's buffer assignment has alive"
    " at the peak."
)


def size(count: float) -> str:
    """Bytes in words."""
    if count < 0:
        return f"-{size(-count)}"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count / 1000:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us" if seconds >= 1e-6 else "0" if seconds == 0 else "< 1 us"


def count(number: float) -> str:
    """A large number in words."""
    if number < 0:
        return f"-{count(-number)}"
    for unit in ("", " k", " M", " G", " T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g} P"


def memory_rows(report: Report) -> list[tuple[str, int]]:
    """The parts of the peak, in the order of a run."""
    memory = report.memory
    return [
        ("parameters", memory.parameters),
        ("copies that compute reads", memory.copies),
        ("optimizer state", memory.optimizer),
        ("gradients", memory.gradients),
        ("activations that wait", memory.activations),
        ("working space", memory.temporaries),
        ("batch", memory.batch),
        ("gaps between buffers", memory.gaps),
    ]


def verdict(memory: Memory | InferenceMemory, target: str) -> str:
    """Whether it fits, in one line."""
    room = memory.capacity - memory.peak
    usable = f"the {size(memory.capacity)} that are usable ({USABLE:.0%}) of one {target.upper()}"
    if memory.fits:
        return f"fits: peak {size(memory.peak)}, {size(room)} below {usable}"
    return f"does not fit: peak {size(memory.peak)}, {size(-room)} above {usable}"


def flops_rows(report: Report) -> list[tuple[str, float]]:
    """What the executed FLOPs are for. What is left over is work that the model's formula does not count, such as the
    masked half of attention scores."""
    rows = [
        ("model", report.model_flops),
        ("recomputed", report.recomputed_flops),
        ("idle ticks of the pipeline", report.idle_flops),
    ]
    rest = report.executed_flops - sum(count for _, count in rows)
    return [row for row in rows if row[1]] + [("other", rest)]


def format_report(report: Report) -> str:
    """The whole plan."""
    lines = [
        *heading(report),
        "",
        f"MEMORY  {verdict(report.memory, report.target)}",
        *bars(memory_rows(report), size, report.memory.card),
        *_formula(report),
        "",
        f"TIME    a step takes at least {duration(report.seconds)}: MFU at most {report.mfu:.1%},"
        f" {report.tokens_per_second:,.0f} tokens/s per GPU",
        *bars([("operations", report.compute), ("waiting for others", report.exposed)], duration, report.seconds),
        *([f"  pipeline bubble {report.bubble:.1%} of the useful time"] if report.bubble else []),
        "",
        f"FLOPS   {count(report.executed_flops)} executed on each GPU, {report.executed_flops / report.model_flops:.2f}"
        f" x the model's; recomputed: {report.recompute}",
        *bars(flops_rows(report), count, report.executed_flops),
        *collectives(
            f"COLLECTIVES of a GPU; in layers, {report.covered_share:.0%} of the bytes have operations beside them",
            report.traffic,
            report.uncovered,
        ),
        *kernels(report.kernels),
        "",
        FORMULA,
        compile_times(report.seconds_to_compile),
    ]
    return "\n".join(lines)


def kernels(executions: Mapping[str, int]) -> list[str]:
    """Hand-written kernels and library calls."""
    return ["", "KERNELS", *table([(f"{n:,}", name) for name, n in executions.items()])] if executions else []


def compile_times(seconds: tuple[float, float]) -> str:
    """How long planning took."""
    return f"Traced in {duration(seconds[0])}, compiled in {duration(seconds[1])}."


def heading(report: Report) -> list[str]:
    """What was planned, in two lines, and which engine a pipeline has."""
    lines = [
        f"{report.model}, {count(report.parameters)} parameters, on {report.devices:,} {report.target.upper()}"
        f" ({report.mesh})",
        f"a step of {report.samples:,} samples, {report.tokens:,} tokens, in {report.num_microbatches} microbatches;"
        f" optimizer {report.optimizer}",
    ]
    return lines if report.engine is None else [*lines, report.engine]


def formula_line(report: Report) -> str | None:
    """How activations compare with Megatron's formula."""
    memory = report.memory
    if memory.formula is None or memory.formula_ratio is None:
        return None
    line = (
        f"activations are {memory.formula_ratio:.2f} x the {size(memory.formula)} of Megatron's formula"
        " (first stage of 1F1B, selective recomputation)"
    )
    if report.in_flight is None:
        return line
    kept, assumed = report.in_flight
    return f"{line}; this engine keeps {kept} microbatches under way, the formula {assumed}"


def _formula(report: Report) -> list[str]:
    line = formula_line(report)
    return [] if line is None else [f"  {part}" for part in line.split("; ")]


def collectives(title: str, traffic: Sequence[Traffic], uncovered: Mapping[str, float]) -> list[str]:
    """The collectives, and which of them nothing hides."""
    lines = ["", title, *table([COLLECTIVE_HEAD, *collective_rows(traffic)])] if traffic else []
    if uncovered:
        lines += ["", "  with nothing beside them:"]
        lines += table([(size(sent), name) for name, sent in uncovered.items()])
    return lines


COLLECTIVE_HEAD = ("kind", "axes", "link", "where", "times", "sent", "takes", "waits", "covered")


def collective_rows(traffic: Sequence[Traffic]) -> list[tuple[str, ...]]:
    """A row for each kind of collective, the longest first."""
    return [
        (
            row.kind,
            row.axes,
            row.link,
            "layers" if row.in_layers else "around",
            f"{row.times:,.0f}",
            size(row.sent),
            duration(row.seconds),
            duration(row.exposed),
            f"{row.covered / row.sent:.0%}" if row.sent else "-",
        )
        for row in traffic
    ]


_BAR = 30


def bars(rows: Sequence[tuple[str, float]], unit: Callable[[float], str], whole: float) -> list[str]:
    """Rows with a bar each."""
    if not whole:
        return []
    width = max(len(name) for name, _ in rows)
    numbers = [unit(value) for _, value in rows]
    right = max(map(len, numbers))
    drawn = ["█" * max(0, round(_BAR * value / whole)) for _, value in rows]
    return [
        f"  {name:{width}}  {number:>{right}}  {value / whole:4.0%}  {bar}".rstrip()
        for (name, value), number, bar in zip(rows, numbers, drawn, strict=True)
    ]


def format_search(ranked: Sequence[Found]) -> list[str]:
    """The meshes, the best first, and how to ask for the first."""
    compiled = [one for one in ranked if one.report is not None]
    head = ("", "mesh", "step, at least", "MFU", "peak memory", "")
    rows: list[tuple[str, ...]] = [head]
    for place, one in enumerate(compiled, 1):
        assert one.report is not None
        found = one.report
        fits = "fits" if found.memory.fits else "does not fit"
        peak = size(found.memory.peak)
        rows.append((f"{place}", one.candidate.mesh, duration(found.seconds), f"{found.mfu:.1%}", peak, fits))
    refused = [f"  {one.candidate.mesh}: {one.reason}" for one in ranked if one.reason]
    return [
        f"SEARCH  {len(ranked)} meshes are possible; compiled, those that arithmetic liked best:",
        *table(rows),
        *refused,
        f"  the first: {' '.join(ranked[0].candidate.flags)}",
        "",
    ]


def ranked_json(ranked: Sequence[Found]) -> list[dict[str, Any]]:
    """Every mesh of a search, as plain types."""
    return [
        {
            "mesh": one.candidate.mesh,
            "flags": list(one.candidate.flags),
            "by_arithmetic": {"seconds": one.candidate.seconds, "memory": one.candidate.memory},
            "compiled": None
            if one.report is None
            else {
                "fits": one.report.memory.fits,
                "peak": one.report.memory.peak,
                "seconds": one.report.seconds,
                "mfu": one.report.mfu,
            },
            "reason": one.reason,
        }
        for one in ranked
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [any(row[i][:1].isdigit() for row in rows) for i in range(len(widths))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
