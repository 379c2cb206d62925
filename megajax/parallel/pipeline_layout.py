"""Which layers lie on which pipeline stage: Megatron's layout strings and its rules for splitting a stack of layers.

A layout is one string for every virtual stage, in the order in which a microbatch meets them (chunk c of stage s is
virtual stage c * p + s). Its letters: E embedding, t decoder layer, m layer of multi-token prediction, L loss.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Sequence

from megajax.config import ConfigError
from megajax.config_checks import require, require_divides

EMBEDDING, DECODER, MTP, LOSS = "E", "t", "m", "L"
MAX_LETTERS = 100_000

Layout = tuple[str, ...]


def parse_layout(
    layout: str,
    stages: int,
    chunks: int | None = None,
    *,
    num_layers: int | None = None,
    mtp_num_layers: int | None = None,
) -> Layout:
    """Layers of every virtual stage, `("Ettt", "tt", ..., "L")`, from Megatron's pipeline_model_parallel_layout.

    `|` ends a stage, which may be empty; `x*n` repeats a letter or a `|`, `(...)*n` a sequence without parentheses;
    commas and spaces only decorate. `Et*3|(tt|)*29,m|L` is DeepSeek-V3 on 16 stages of 2 chunks.

    Args:
      chunks: of a stage; None: as many as the string has.
      num_layers: decoder layers that the model has; None: not checked. mtp_num_layers: likewise.

    Raises:
      ConfigError: the string cannot be read, or its stages cannot be run.
    """
    where = f"pipeline_model_parallel_layout={layout!r}"
    text = _unrolled(layout, where)
    strange = sorted(set(text) - set("EtmL|"))
    if strange:
        known = "E, t, m, L, |, x*n, (...)*n"
        raise ConfigError(f"{where}: {' '.join(strange)} cannot be read there; it is made of {known}")
    parsed = tuple(text.split("|"))
    require(stages >= 1, f"pipeline_model_parallel_size={stages} must be at least 1")
    if len(parsed) % stages or chunks not in (None, len(parsed) // stages):
        each = f"{chunks} chunks on each of " if chunks is not None else "a multiple of "
        raise ConfigError(f"{where}: has {len(parsed)} stages; write {each}pipeline_model_parallel_size={stages}")
    _check_ends(parsed, where)
    _check_mtp(parsed, stages, where)
    for kind, field, wanted in ((DECODER, "num_layers", num_layers), (MTP, "mtp_num_layers", mtp_num_layers)):
        found = text.count(kind)
        if wanted not in (None, found):
            raise ConfigError(f"{where}: has {found} {kind} for {field}={wanted}; make them equal")
    return parsed


def split_layers(
    num_layers: int,
    stages: int,
    chunks: int = 1,
    first: int | None = None,
    last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
) -> tuple[int, ...]:
    """Number of layers on every virtual stage, as Megatron's get_num_layers_to_build says.

    Args:
      first: layers of stage 0, all its chunks together (decoder_first_pipeline_num_layers); the other stages share
        what is left. last: likewise of the last stage.
      account_for_embedding: the embedding counts as a layer, so the first virtual stage has one less.
      account_for_loss: the loss counts as a layer, so the last virtual stage has one less.

    Raises:
      ConfigError: the layers do not divide evenly.
    """
    sizes = {"pipeline_model_parallel_size": stages, "num_virtual_stages_per_pipeline_rank": chunks}
    for field, value in {"num_layers": num_layers, **sizes}.items():
        require(value >= 1, f"{field}={value} must be at least 1")
    if first is not None or last is not None:
        require(
            not (account_for_embedding or account_for_loss),
            "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split do not go together with "
            "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers; remove one kind",
        )
        per_stage = _uneven(num_layers, stages, chunks, first, last)
    else:
        counted = num_layers + account_for_embedding + account_for_loss
        extra = " (embedding and loss counted as asked)" if counted > num_layers else ""
        require_divides(f"num_layers{extra}", counted, "pipeline_model_parallel_size", stages)
        per_stage = [counted // stages] * stages
    for stage, count in enumerate(per_stage):
        require_divides(f"num_layers of stage {stage}", count, "num_virtual_stages_per_pipeline_rank", chunks)
    layers = [count // chunks for count in per_stage] * chunks
    layers[0] -= account_for_embedding
    layers[-1] -= account_for_loss
    return tuple(layers)


def layout_of(layers: Sequence[int], mtp_num_layers: int = 0) -> Layout:
    """The layout with so many decoder layers on each virtual stage; E is on the first, m and L are on the last."""
    parts = [DECODER * count for count in layers]
    parts[0] = EMBEDDING + parts[0]
    parts[-1] += MTP * mtp_num_layers + LOSS
    return tuple(parts)


def _unrolled(layout: str, where: str) -> str:
    """The string without commas, spaces and repetitions. Parentheses first, then letters: `(t*2|)*3` has both."""
    text = re.sub(r"[,\s]", "", layout)
    for pattern in (r"\(([^()]+)\)\*(\d{1,6})", r"([^*])\*(\d{1,6})"):
        length = len(text) + sum(len(part) * int(count) for part, count in re.findall(pattern, text))
        require(length <= MAX_LETTERS, f"{where}: unrolls to more than {MAX_LETTERS:,} letters; lower a number")
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text


def _check_ends(stages: Layout, where: str) -> None:
    text = "".join(stages)
    require(text.count(EMBEDDING) == 1 and stages[0].startswith(EMBEDDING), f"{where}: must start with its only E")
    require(text.count(LOSS) == 1 and stages[-1].endswith(LOSS), f"{where}: must end with its only L")


def _check_mtp(layout: Layout, stages: int, where: str) -> None:
    """All MTP layers follow all decoder layers, on one virtual stage that is the last chunk of its stage."""
    homes = [index for index, part in enumerate(layout) if MTP in part]
    if not homes:
        return
    text = "".join(layout)
    require(text.index(MTP) > text.rfind(DECODER), f"{where}: has a t behind an m; put m behind all t")
    require(len(homes) == 1, f"{where}: has m on {len(homes)} stages; put all m on one")
    last_chunk = homes[0] >= len(layout) - stages
    require(last_chunk, f"{where}: has m on virtual stage {homes[0]}; put it on one of the last {stages}")
    require(stages == 1 or homes[0] % stages > 0, f"{where}: has m on pipeline stage 0; put it on a later one")


def _uneven(num_layers: int, stages: int, chunks: int, first: int | None, last: int | None) -> list[int]:
    """Layers of each stage where the first or the last has a number of its own."""
    left, middle = num_layers, stages
    for field, count in (("decoder_first_pipeline_num_layers", first), ("decoder_last_pipeline_num_layers", last)):
        if count is not None:
            require(count > 0, f"{field}={count} must be at least 1")
            require_divides(field, count, "num_virtual_stages_per_pipeline_rank", chunks)
            left, middle = left - count, middle - 1
    fits = middle >= 0 and left >= 0 and bool(left) == bool(middle) and (middle == 0 or left % middle == 0)
    require(
        fits,
        f"num_layers={num_layers}: decoder_first_pipeline_num_layers={first} and decoder_last_pipeline_num_layers="
        f"{last} leave {left} layers for {middle} stages; change them so that these share evenly",
    )
    share = left // middle if middle else 0
    per_stage = [share] * stages
    per_stage[0] = share if first is None else first
    per_stage[-1] = per_stage[-1] if last is None else last
    return per_stage
