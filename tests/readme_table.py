"""Writes the README's table of families and parallelisms from what the tests cover: `python tests/readme_table.py`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- table: tests/readme_table.py -->", "<!-- end of table -->"
TESTS = ("training/test_layouts", "models/mamba/test_mamba_layouts", "models/test_encoder_layouts",
         "models/vision/test_vision_layouts", "models/retro/test_retro_layouts")  # fmt: skip
"""Files whose `CASES` are pairs (model, layout), or whose `LAYOUTS` name their model."""

NO_EXPERTS, SHORT, NOT_THERE = "no experts", "short sequences", "nor in Megatron"
SMALL, BIASED = "small towers", "relative bias"
ROWS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "GPT, dense": (("tied", "untied", "gemma"), {"EP": NO_EXPERTS}),
    "GPT with MoE": (("experts",), {}),
    "GPT with MoE, MLA, MTP": (("latent",), {}),
    "BERT": (("bert", "bert_untied"), {"EP": NO_EXPERTS}),
    "T5": (("t5", "t5_untied"), {"CP": BIASED, "EP": NO_EXPERTS}),
    "Mamba and hybrids": (("hybrid", "one_group"), {"EP": NO_EXPERTS}),
    "Hybrids with MoE": (("hybrid_experts",), {}),
    "Hybrids with shared blocks": (("shared_block", "shared_blocks"), {"EP": NO_EXPERTS}),
    "CLIP, SigLIP": (("clip", "siglip"), {"CP": SHORT, "PP": SMALL, "EP": NO_EXPERTS}),
    "RADIO": (("radio",), {"CP": SHORT, "PP": SMALL, "EP": NO_EXPERTS}),
    "LLaVA": (("llava", "llava_experts"), {}),
    "RETRO": (("retro", "retro_odd", "retro_relative"), {"CP": NOT_THERE, "PP": NOT_THERE, "EP": NO_EXPERTS}),
}
"""Row of the table -> models of the tests, and why a parallelism has no layout."""


class Use(NamedTuple):
    """A layout that a test holds to one device."""

    model: str
    devices: int
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    ep: int = 1
    zero: int = 1

    @property
    def dp(self) -> int:
        """Data-parallel shards."""
        return self.devices // (self.tp * self.cp * self.pp)


USES = {
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


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _use(layout: Any, model: str) -> Use:
    fields: dict[str, Any] = {name: value for name, value in vars(layout).items() if name in Use._fields}
    return Use(**{**fields, "model": model})


def uses() -> list[Use]:
    """Every layout of the tests."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = []
    for name in TESTS:
        module = vars(_load((ROOT / "tests" / name).with_suffix(".py")))
        if "CASES" in module:
            found += [_use(layout, model) for model, layout in (case.values for case in module["CASES"])]
        else:
            found += [_use(layout, layout.model) for layout in (*module["LAYOUTS"], *module.get("RARE", ()))]
    return found


def table() -> str:
    """The table in Markdown."""
    found = uses()
    unknown = {use.model for use in found} - {model for models, _ in ROWS.values() for model in models}
    assert not unknown, f"models in no row of the table: {unknown}"
    lines = [f"| family | one device | {' | '.join(USES)} |", "|---" * (len(USES) + 2) + "|"]
    for title, (models, reasons) in ROWS.items():
        cells = []
        for name, used in USES.items():
            count = sum(use.model in models and used(use) for use in found)
            if reasons.get(name) == NO_EXPERTS:
                count = 0  # the axis is data parallel
            assert (count > 0) != (name in reasons), f"{title}: {name} needs a layout or a reason why it has none"
            cells.append(f"{count} layout{'s' * (count > 1)}" if count else reasons[name])
        lines.append(f"| {title} | yes | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
