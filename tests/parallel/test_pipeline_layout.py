"""Layout strings and layer splits against what Megatron makes of them."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megajax.config import ConfigError
from megajax.parallel.pipeline_layout import layout_of, parse_layout, split_layers


def megatron(golden: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((golden / "mcore_pipeline/tables.json").read_text())[part]


def or_none(function: Any, *arguments: Any, **options: Any) -> list[Any] | None:
    """The result as a list, or None where it is refused."""
    try:
        return list(function(*arguments, **options))
    except ConfigError:
        return None


def test_layouts_are_read_as_by_megatron(golden: Path) -> None:
    for row in megatron(golden, "layouts"):
        layout, stages, num_layers, mtp = row["case"]
        assert or_none(parse_layout, layout, stages, num_layers=num_layers, mtp_num_layers=mtp) == row["stages"], row


def test_layers_are_split_as_by_megatron(golden: Path) -> None:
    rows = megatron(golden, "splits")
    assert sum(row["layers"] is not None for row in rows) > 50
    for row in rows:
        assert or_none(split_layers, *row["case"]) == row["layers"], row


def test_layout_of_deepseek_v3() -> None:
    layout = parse_layout("Et*3|(tt|)*29,m|L", stages=16, chunks=2)
    assert len(layout) == 32 and layout == ("Ettt", *["tt"] * 29, "m", "L")
    assert "".join(layout).count("t") == 61
    assert layout[1 * 16 + 14] == "m" and layout[1 * 16 + 15] == "L"


def test_commas_and_spaces_decorate() -> None:
    assert parse_layout(" E , t*2 | t,tL ", 2) == parse_layout("Ett|ttL", 2)


def test_a_split_as_layout() -> None:
    assert layout_of(split_layers(6, 2, 2, account_for_embedding=True, account_for_loss=True), 1) == (
        *("Et", "tt", "tt", "tmL"),
    )


@pytest.mark.parametrize(
    ("layout", "stages", "chunks", "message"),
    [
        ("Ett|ttL", 2, 2, "has 2 stages; write 2 chunks on each of pipeline_model_parallel_size=2"),
        ("Ett|ttL", 0, None, "pipeline_model_parallel_size=0 must be at least 1"),
        ("EtL|", 2, None, "must end with its only L"),
        ("|EtL", 2, None, "must start with its only E"),
        ("E((t|)*2|)*2L", 7, None, "( ) cannot be read there"),
        ("Et*3*2|L", 2, None, "* 2 cannot be read there"),
        ("Et*|L", 2, None, "* cannot be read there"),
        ("Et*999999|L", 2, None, "unrolls to more than"),
        ("E((t*9999)*9999)*9999|L", 2, None, "unrolls to more than"),
        ("Et|t|m|ttL", 4, None, "has a t behind an m"),
        ("E|t|m||L|", 2, None, "must end with its only L"),
        ("Et|t|t|m||L", 2, None, "has m on virtual stage 3; put it on one of the last 2"),
        ("Et|t|t|t|m|L", 2, None, "has m on pipeline stage 0"),
    ],
)
def test_what_a_layout_cannot_be(layout: str, stages: int, chunks: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_layout(layout, stages, chunks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 2), "num_layers=7 is not divisible by pipeline_model_parallel_size=2"),
        ((6, 2, 2), "num_layers of stage 0=3 is not divisible by num_virtual_stages_per_pipeline_rank=2"),
        ((8, 4, 1, 3), "leave 5 layers for 3 stages"),
        ((8, 2, 1, 9), "leave -1 layers for 1 stages"),
        ((8, 2, 1, 0), "decoder_first_pipeline_num_layers=0 must be at least 1"),
        ((8, 1, 1, 4, 4), "leave 0 layers for -1 stages"),
        ((8, 2, 1, 4, None, True), "do not go together"),
        ((0, 2), "num_layers=0 must be at least 1"),
    ],
)
def test_what_cannot_be_split(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        split_layers(*arguments)
