"""The loss curve of a run as a picture."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

from megajax.training.files import new_file

TRAIN, VALIDATION, BASELINE = "#9aa5b1", "#1f5fbf", "#c05621"


def plot_loss(rows: list[dict[str, Any]], path: Path, *, title: str, baseline: tuple[str, float] | None) -> None:
    """Draws training and validation loss over steps into `path` (PNG).

    Args:
      rows: of metrics.jsonl.
      baseline: (label, loss) of a horizontal line to compare with.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    val = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color=VALIDATION, linewidth=2, marker="o", markersize=4, label="validation")
        last_step, last = val[-1]
        axes.annotate(
            f"{last:.3f}", (last_step, last), (0, 8), textcoords="offset points", ha="right", color=VALIDATION
        )
    if baseline is not None:
        axes.axhline(
            baseline[1], color=BASELINE, linewidth=1.2, linestyle="--", label=f"{baseline[0]}: {baseline[1]:.3f}"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if train or val:
        axes.legend(frameon=False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
