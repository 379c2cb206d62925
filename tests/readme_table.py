"""Writes the README's table of families and parallelisms from what the tests cover: `python tests/readme_table.py`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- table: tests/readme_table.py -->", "<!-- end of table -->"

PLANNED = ("BERT", "T5", "Mamba and hybrids", "CLIP ViT, RADIO", "LLaVA", "RETRO")
ROWS = {"GPT, dense": ("tied", "untied"), "GPT with MoE": ("experts",), "GPT with MoE, MLA, MTP": ("latent",)}
"""Row of the table -> models of `test_layouts.py`."""


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parallelisms() -> dict[str, dict[str, list[str]]]:
    """Each row's models, each parallelism, and the layouts of `test_layouts.py` that use it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    layouts = _load(ROOT / "tests" / "training" / "test_layouts.py").LAYOUTS
    uses = {
        "DP": lambda row: row.dp > 1,
        "ZeRO-1": lambda row: row.zero == 1 and row.dp > 1,
        "ZeRO-2": lambda row: row.zero == 2 and row.dp > 1,
        "ZeRO-3": lambda row: row.zero == 3 and row.dp > 1,
        "TP": lambda row: row.tp > 1,
        "SP": lambda row: row.sp,
        "CP": lambda row: row.cp > 1,
        "PP": lambda row: row.pp > 1,
        "EP": lambda row: row.ep > 1,
    }
    return {
        title: {name: [str(row) for row in layouts if row.model in models and used(row)] for name, used in uses.items()}
        for title, models in ROWS.items()
    }


def _cell(title: str, name: str, rows: list[str]) -> str:
    if name == "EP" and title == "GPT, dense":
        return "no experts"
    return f"{len(rows)} layout{'s' * (len(rows) > 1)}" if rows else "not tested"


def table() -> str:
    """The table in Markdown."""
    covered = parallelisms()
    names = list(covered["GPT, dense"])
    lines = [f"| family | one device | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for title, uses in covered.items():
        cells = [_cell(title, name, rows) for name, rows in uses.items()]
        lines.append(f"| {title} | yes | {' | '.join(cells)} |")
    lines += [f"| {family} | {' | '.join(['not yet'] * (len(names) + 1))} |" for family in PLANNED]
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
