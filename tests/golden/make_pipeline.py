"""Prints tests/golden/mcore_pipeline/tables.json. Run by hand where megatron-core is installed.

Warm-ups and orders of 1F1B, layers of every virtual stage, and layout strings, all from Megatron's own functions.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from types import SimpleNamespace
from typing import Any

from megatron.core import __version__
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
LAYOUTS = [
    *[("Et*3|(tt|)*29,m|L", 16, 61, 1), ("Et*2|(tt|)*5t|tmL", 4, 14, 1), ("Et*7|t*7mL", 2, 14, 1), ("E||t|L", 4, 1, 0)],
    *[("E,t|t|tL", 3, 3, 0), ("E|t*3|t*3|L", 4, 6, 0), ("E|(t|)*6L", 4, 6, 0), ("E(t|)*2t|t*0L", 3, 3, 0)],
    *[("E|*3tL", 4, 1, 0), ("E(t*2|)*3L", 2, 6, 0), ("Ett|tt", 2, 4, 0), ("tEt|tL", 2, 3, 0)],
    *[
        ("Et|tLL", 2, 2, 0),
        ("Etm|tL", 2, 2, 1),
        ("Et|m|m|tL", 4, 2, 2),
        ("Et|t|m|mL", 4, 2, 2),
        ("Et|t|m|L|t|t", 3, 2, 1),
    ],
    *[("Et|tL", 3, 2, 0), ("Et|xL", 2, 2, 0), ("Et(t|L", 2, 2, 0), ("Et|tL", 2, 3, 0), ("EttmL", 1, 2, 1)],
    *[("Et|tm|t|tL", 2, 4, 1), ("Et|t|mmL", 3, 2, 2), ("Et|t|mmL", 3, 2, 1), ("", 1, 0, 0)],
]


def communicator(stages: int, rank: int, chunks: int | None) -> Any:
    group = SimpleNamespace(size=lambda: stages, rank=lambda: rank)
    return SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)


def warm_ups(stages: int, chunks: int, microbatches: int, group: int) -> list[int]:
    virtual = chunks if chunks > 1 else None
    return [
        get_pp_rank_microbatches(microbatches, chunks, group, p2p_communicator=communicator(stages, rank, virtual))[2]
        for rank in range(stages)
    ]


def layers(num_layers: int, stages: int, chunks: int, **options: Any) -> list[int] | None:
    """Layers of each virtual stage, or None where Megatron refuses."""
    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            pipeline_dtype="float32",
            **options,
        )
        return [
            get_num_layers_to_build(config, vp_stage=chunk if chunks > 1 else None, pp_rank=rank)
            for chunk in range(chunks)
            for rank in range(stages)
        ]
    except (AssertionError, ValueError, ZeroDivisionError):
        return None


def layout(text: str, stages: int, num_layers: int, mtp: int) -> list[str] | None:
    """Kinds of layers of each virtual stage, or None where Megatron refuses."""
    try:
        PipelineParallelLayerLayout(text, stages).validate_layer_layout(num_layers, mtp)
    except (AssertionError, IndexError):
        return None
    parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
    return ["".join(LETTERS[kind.name] for kind in stage) for stage in parsed]


def splits() -> list[dict[str, Any]]:
    rows = []
    for num_layers, stages, chunks in itertools.product((6, 7, 8, 12), (1, 2, 3, 4), (1, 2)):
        for first, last, embedding, loss in (
            *[
                (None, None, False, False),
                (None, None, True, False),
                (None, None, False, True),
                (None, None, True, True),
            ],
            *[(2, None, False, False), (None, 2, False, False), (4, 2, False, False), (1, 3, False, False)],
            *[(2, None, True, False), (0, None, False, False)],
        ):
            options = {
                "num_layers_in_first_pipeline_stage": first,
                "num_layers_in_last_pipeline_stage": last,
                "account_for_embedding_in_pipeline_split": embedding,
                "account_for_loss_in_pipeline_split": loss,
            }
            if stages > 1:
                case = [num_layers, stages, chunks, first, last, embedding, loss]
                rows.append({"case": case, "layers": layers(num_layers, stages, chunks, **options)})
    return rows


def orders() -> list[dict[str, Any]]:
    rows = []
    for stages, chunks, microbatches, group in [
        *[(2, 1, 4, 2), (4, 1, 8, 4), (4, 1, 2, 4), (8, 1, 12, 8), (2, 2, 4, 2), (4, 2, 8, 4), (4, 3, 8, 4)],
        *[(2, 2, 5, 3), (2, 4, 4, 4), (4, 2, 9, 5), (4, 2, 4, 4), (8, 2, 16, 8)],
    ]:
        table = get_schedule_table(microbatches, chunks, group)
        warm_up = warm_ups(stages, chunks, microbatches, group)
        rows.append({"case": [stages, chunks, microbatches, group], "table": table, "warm_up": warm_up})
    return rows


if __name__ == "__main__":
    layouts = [{"case": case, "stages": layout(*case)} for case in LAYOUTS]
    parts = {"orders": orders(), "splits": splits(), "layouts": layouts}
    lines = [f'"{name}": [\n ' + ",\n ".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items()]
    print(f'{{"megatron_core": "{__version__}",\n' + ",\n".join(lines) + "}")
