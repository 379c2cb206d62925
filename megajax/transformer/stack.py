"""How a list of layers folds into stacks of equal ones, so that a scan over them compiles once whatever the depth."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Stack(NamedTuple):
    """Equal layers `first`, `first + period`, ...: `repeats` of them, their parameters stacked under `name`."""

    name: str
    first: int
    period: int
    repeats: int


class Segment(NamedTuple):
    """A pattern of layers, one of each stack, that repeats: what one scan runs over."""

    stacks: tuple[Stack, ...]
    repeats: int


def fold_layers(layers: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Folds layers into repeated patterns, each time taking the pattern that covers most of what is left.

    `[a, a, a, a]` is one stack `layers`. `[a, b, a, b]` is one segment of two stacks `layers_0` (layers 0 and 2) and
    `layers_1`. `[a, b, b, b]` is two segments, `layers_0` and `layers_1` (layers 1 to 3).
    """
    spans: list[tuple[int, int, int]] = []  # first layer, period, repeats
    start = 0
    while start < len(layers):
        period, repeats = _best_pattern(layers[start:])
        spans.append((start, period, repeats))
        start += period * repeats
    single = len(spans) == 1 and spans[0][1] == 1
    return tuple(
        Segment(
            tuple(
                Stack("layers" if single else f"layers_{first + j}", first + j, period, repeats) for j in range(period)
            ),
            repeats,
        )
        for first, period, repeats in spans
    )


def _best_pattern(layers: Sequence[Hashable]) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, len(layers) // 2 + 1):
        repeats = 1
        while list(layers[repeats * period : (repeats + 1) * period]) == list(layers[:period]):
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def locate(segments: Sequence[Segment], layer: int) -> tuple[str, int]:
    """Where layer `layer` lives: (name of its stack, row in it)."""
    for segment in segments:
        for stack in segment.stacks:
            row, rest = divmod(layer - stack.first, stack.period)
            if rest == 0 and 0 <= row < stack.repeats:
                return stack.name, row
    raise IndexError(f"there is no layer {layer}")
