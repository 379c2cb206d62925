"""Weak scaling by compilation: what a training step of Llama 3 8B sends on 8 to 1,024 devices that need not be there.

The batch grows with the devices, one sequence of 4,096 tokens for each. Every point compiles the step in a process of
its own and counts in the compiled program: bytes that a device sends, by the mesh axis they travel along (of rings, see
`Collective.bytes_sent`), collectives it runs, temporary memory, and how long tracing and compiling take. Nothing runs.

    python benchmarks/scaling.py                                        # simulated CPU devices, about 8 minutes
    python benchmarks/scaling.py --target h100                          # H100 programs, bf16; needs megajax[aot]
    python benchmarks/scaling.py --devices 8 64 --layouts zero3 tp8     # some points

It prints a table and writes `scaling-<target>.json` and `.png` to the folder `--out` (by default this one). Attention
is the plain one, whose scores are recomputed: a fused kernel would need less memory. The CPU's programs are in fp32 and
send more than a GPU's: XLA:CPU makes no reduce-scatter of an all-reduce, and adds up gradients after it reduces them.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SEQ, SAMPLES_PER_DEVICE = 4096, 1
DEVICES = (8, 64, 256, 1024)

Point = dict[str, Any]

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("data parallel, ZeRO-1", {"zero": 1}),
    "zero3": ("data parallel, ZeRO-3", {"zero": 3}),
    "tp8": ("tensor 8 (sequence parallel)", {"tensor_model_parallel_size": 8, "sequence_parallel": True}),
    "tp4-pp2": (
        "tensor 4 (sequence parallel), pipeline 2",
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "cp4-zero3": ("context 4 (ring), ZeRO-3", {"context_parallel_size": 4, "zero": 3}),
    "all": (
        "tensor 2 (SP), context 2 (ring), pipeline 2",
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "context_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
        },
    ),
}

# What something is sent for: the outermost of the axes it spans tells.
ROUTES = {"data": ("replica", "dp", "ep"), "context": ("cp", "ulysses"), "pipeline": ("pp",), "tensor": ("tp",)}
COLOURS = {"data": "#2b62ab", "context": "#c2601a", "pipeline": "#7d6bb3", "tensor": "#1c7a5b"}
INK, FAINT, GRID = "#1d2733", "#66727f", "#e4e8ec"


# --- one point, in a process of its own


def compile_point(name: str, devices: int, target: str) -> Point:
    """Compiles the step and counts. To be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target == "cpu":
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from megajax.models.registry import FAMILIES
    from megajax.parallel.aot import absent_gpus
    from megajax.parallel.census import census
    from megajax.parallel.hlo import dot_flops
    from megajax.parallel.sharding import spec_of
    from megajax.training.setup import build_program, on_mesh

    mesh_devices = jax.devices() if target == "cpu" else absent_gpus(devices, target)
    program = build_program(
        _config(LAYOUTS[name][1], devices, bf16=target != "cpu"), FAMILIES["gpt"], devices=mesh_devices
    )
    microbatches = program.batches.at(0).num_microbatches
    place = NamedSharding(program.mesh, spec_of((None, "batch", "seq"), program.rules.table))
    dtypes = {"tokens": jnp.int32, "labels": jnp.int32, "position_ids": jnp.int32, "loss_mask": jnp.float32}
    shape = (microbatches, devices * SAMPLES_PER_DEVICE // microbatches, SEQ)
    batch = {key: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for key, dtype in dtypes.items()}
    began = time.perf_counter()
    with on_mesh(program):
        lowered = program.train_step.lower(program.abstract_state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
    done = time.perf_counter()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "layout": name,
        "devices": devices,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "microbatches": microbatches,
        "collectives": _by_kind(census(text, program.mesh)),
        "flops": dot_flops(text),
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
    }


def _config(parallel: dict[str, Any], devices: int, *, bf16: bool) -> Any:
    from megajax.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
    from megajax.models.registry import FAMILIES

    model = FAMILIES["gpt"].presets["llama3-8b"]()
    return Config(
        model_family="gpt",
        model=model.replace(bf16=bf16, recompute_granularity="selective"),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(lr=3e-4),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(micro_batch_size=1, global_batch_size=devices * SAMPLES_PER_DEVICE),
    )


def _by_kind(collectives: Any) -> list[dict[str, Any]]:
    """Executions and bytes sent of each kind along each set of axes."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in collectives:
        axes = "?" if one.axes is None else "+".join(one.axes)
        row = rows.setdefault((one.kind, axes), {"kind": one.kind, "axes": axes, "times": 0, "bytes_sent": 0})
        row["times"] += one.times
        row["bytes_sent"] += one.times * one.bytes_sent
    return sorted(rows.values(), key=lambda row: -row["bytes_sent"])


# --- all points


def run_point(name: str, devices: int, target: str) -> Point | None:
    """A point from a child process, or None, with the end of what it said, if it failed."""
    command = [sys.executable, __file__, "--point", name, str(devices), "--target", target]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        print(f"{name} on {devices} failed:\n{child.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(child.stdout.splitlines()[-1])


def sent_by_route(point: Point) -> dict[str, float]:
    """Bytes that a device sends in a step, by route; what is reduced over context parallelism alone are gradients."""
    sent: dict[str, float] = defaultdict(float)
    for row in point["collectives"]:
        axes = set(row["axes"].split("+"))
        route = next((route for route, names in ROUTES.items() if axes & set(names)), "data")
        reduced = row["kind"] in ("all-reduce", "reduce-scatter")
        sent["data" if route == "context" and reduced else route] += row["bytes_sent"]
    return sent


HEADER = (
    f"{'layout':<12}{'devices':>8}{'micro-':>8}{'collec-':>9}"
    + "".join(f"{route:>10}" for route in ROUTES)
    + f"{'all sent':>10}{'state':>8}{'temp':>8}{'trace':>7}{'compile':>9}\n"
    + f"{'':<12}{'':>8}{'batches':>8}{'tives':>9}"
    + f"{'GB':>10}" * 5
    + f"{'GB':>8}{'GB':>8}{'s':>7}{'s':>9}"
)


def row_of(point: Point) -> str:
    """A line of the table."""
    sent = sent_by_route(point)
    times = sum(row["times"] for row in point["collectives"])
    return (
        f"{point['layout']:<12}{point['devices']:>8,}{point['microbatches']:>8}{times:>9,}"
        + "".join(f"{sent[route] / 1e9:>10.2f}" for route in ROUTES)
        + f"{sum(sent.values()) / 1e9:>10.2f}{point['state_bytes'] / 1e9:>8.1f}{point['temporary_bytes'] / 1e9:>8.1f}"
        + f"{point['trace_seconds']:>7.1f}{point['compile_seconds']:>9.1f}"
    )


# --- the picture


def draw(points: list[Point], target: str, path: Path) -> None:
    """Traffic of each layout in a panel of its own, and below them memory and compile time of all."""
    from matplotlib.figure import Figure

    names = [name for name in LAYOUTS if any(point["layout"] == name for point in points)]
    columns = 3
    rows = -(-len(names) // columns)
    height = 2.35 * rows + 4.1
    figure = Figure(figsize=(11, height), dpi=130, facecolor="white")
    edges = {"left": 0.06, "right": 0.975}
    panels = figure.add_gridspec(
        rows, columns, hspace=0.42, wspace=0.16, top=1 - 1.3 / height, bottom=3.55 / height, **edges
    )
    below = figure.add_gridspec(1, 2, wspace=0.16, top=2.75 / height, bottom=0.62 / height, **edges)
    top = max(sum(sent_by_route(point).values()) for point in points) / 1e9
    for index, name in enumerate(names):
        axes = figure.add_subplot(panels[divmod(index, columns)])
        _draw_traffic(axes, [point for point in points if point["layout"] == name], top)
        _title(axes, name, LAYOUTS[name][0])
        if index % columns == 0:
            axes.set_ylabel("GB sent", color=FAINT, size=9)
        if index // columns == rows - 1:
            axes.set_xlabel("devices", color=FAINT, size=9)
    _draw_memory(figure.add_subplot(below[0]), points, names)
    _draw_seconds(figure.add_subplot(below[1]), points, names)
    _draw_heading(figure, target)
    figure.savefig(path)


def _draw_traffic(axes: Any, points: list[Point], top: float) -> None:
    floor = [0.0] * len(points)
    for route, colour in COLOURS.items():
        heights = [sent_by_route(point)[route] / 1e9 for point in points]
        axes.bar(range(len(points)), heights, 0.66, bottom=floor, color=colour, linewidth=0)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    for x, total in enumerate(floor):
        axes.annotate(f"{total:,.0f}", (x, total), (0, 3), textcoords="offset points", ha="center", size=9, color=INK)
    axes.set_xticks(range(len(points)), [f"{point['devices']:,}" for point in points])
    axes.set_ylim(0, 1.12 * top)
    _bare(axes)


def _draw_memory(axes: Any, points: list[Point], names: list[str]) -> None:
    """State below, temporaries above, of each layout from the fewest devices to the most."""
    width = 0.8 / max(len({point["devices"] for point in points}), 1)
    highest = 0.0
    for place, name in enumerate(names):
        mine = [point for point in points if point["layout"] == name]
        for index, point in enumerate(mine):
            x = place + (index - (len(mine) - 1) / 2) * width
            state, temporary = point["state_bytes"] / 1e9, point["temporary_bytes"] / 1e9
            axes.bar(x, state, 0.86 * width, color="#9fb0c3", linewidth=0)
            axes.bar(x, temporary, 0.86 * width, bottom=state, color="#4a5f78", linewidth=0)
            highest = max(highest, state + temporary)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.1 * highest)
    _bare(axes)
    counts = ", ".join(f"{count:,}" for count in sorted({point["devices"] for point in points}))
    _title(axes, "memory of a device", "dark: temporaries, light: parameters and optimizer")
    axes.set_xlabel(f"each layout on {counts} devices, from left to right", color=FAINT, size=9)
    axes.set_ylabel("GB", color=FAINT, size=9)


def _draw_seconds(axes: Any, points: list[Point], names: list[str]) -> None:
    tones = ("#b3334c", "#0f8391", "#b08a1e", "#8b4f8f", "#7b8794", INK)  # none that the panels above use
    counts = sorted({point["devices"] for point in points})
    ends = []
    for name, tone in zip(names, tones, strict=False):
        mine = [point for point in points if point["layout"] == name]
        seconds = [point["trace_seconds"] + point["compile_seconds"] for point in mine]
        x = [counts.index(point["devices"]) for point in mine]
        axes.plot(x, seconds, color=tone, linewidth=1.8, marker="o", markersize=4)
        ends.append([seconds[-1], name, tone])
    highest = 1.12 * max(point["trace_seconds"] + point["compile_seconds"] for point in points)
    axes.set_ylim(0, highest)
    height = 0.085 * highest  # of a label
    ends.sort()
    labels = [end[0] for end in ends]
    for _ in range(50):  # push labels apart that would overlap
        for below in range(len(labels) - 1):
            overlap = height - (labels[below + 1] - labels[below])
            if overlap > 0:
                labels[below] -= overlap / 2
                labels[below + 1] += overlap / 2
    for y, (_, name, tone) in zip(labels, ends, strict=True):
        axes.text(len(counts) - 1 + 0.08, y, name, color=tone, size=9, va="center")
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlim(-0.2, len(counts) - 1 + 0.75)
    _bare(axes)
    _title(axes, "seconds to trace and compile", "")
    axes.set_xlabel("devices", color=FAINT, size=9)


def _title(axes: Any, name: str, about: str) -> None:
    bold = axes.annotate(
        name, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", size=10, color=INK, weight="bold"
    )
    across = (bold, "axes fraction")
    axes.annotate(about, (1, 1), (6, 9), xycoords=across, textcoords="offset points", size=9, color=FAINT)


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9, labelcolor=FAINT)


def _draw_heading(figure: Any, target: str) -> None:
    from matplotlib.patches import Patch

    height, left = figure.get_figheight(), 0.02
    dtype = {"cpu": "fp32, simulated CPU devices"}.get(target, f"bf16, {target.upper()}")
    figure.text(left, 1 - 0.32 / height, "What a device sends in a training step", size=14, weight="bold", color=INK)
    about = f"Llama 3 8B, {dtype}; devices and batch grow together, one sequence of {SEQ:,} tokens a device"
    figure.text(left, 1 - 0.56 / height, about, size=9.5, color=FAINT)
    words = {
        "data": "data parallel (gradients, parameters)",
        "context": "context parallel (keys, values)",
        "pipeline": "pipeline (and embedding, loss)",
        "tensor": "tensor parallel (activations)",
    }
    figure.legend(
        handles=[Patch(color=colour, label=words[route]) for route, colour in COLOURS.items()],
        loc="upper left",
        bbox_to_anchor=(left - 0.008, 1 - 0.62 / height),
        ncols=len(COLOURS),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.1,
        columnspacing=1.8,
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=("cpu", "h100"), default="cpu")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--point", nargs=2, metavar=("LAYOUT", "DEVICES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(compile_point(args.point[0], int(args.point[1]), args.target)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"scaling-{args.target}"
    print(HEADER, flush=True)
    points = []
    for name in args.layouts:
        for devices in sorted(args.devices):
            point = run_point(name, devices, args.target)
            if point is not None:
                points.append(point)
                print(row_of(point), flush=True)
                path.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n")
    if not points:
        raise SystemExit("no point could be compiled")
    draw(points, args.target, path.with_suffix(".png"))
    print(f"wrote {path}.json and {path}.png")


if __name__ == "__main__":
    main()
