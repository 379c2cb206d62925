"""Which rows of which stack of layers a pipeline stage holds."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from megajax.transformer.stack import Segment, Stack

PADDING = -1


@dataclasses.dataclass(frozen=True)
class StackPlacement:
    """Where the layers of one stack lie: p v n rows, those of stage 0 first, on each stage chunk after chunk.

    Attributes:
      source: int [p v n], the row of the stack in the order of layers, or `PADDING`.
      layer: int [p v n], the layer of each row; anything for padding.
    """

    source: np.ndarray
    layer: np.ndarray

    @property
    def is_order_of_layers(self) -> bool:
        """Whether nothing moves: one chunk a stage, even stages."""
        return bool(np.array_equal(self.source, np.arange(len(self.source))))

    @property
    def padding(self) -> float:
        """The share of rows that are none, since some stages hold fewer layers than others."""
        return float((self.source == PADDING).mean())

    @property
    def has_padding(self) -> bool:
        """Whether there is any."""
        return self.padding > 0

    def destination(self) -> np.ndarray:
        """int [L]: the row where each layer of the stack lies."""
        rows = np.flatnonzero(self.source != PADDING)
        found = np.empty(len(rows), np.int64)
        found[self.source[rows]] = rows
        return found


Placement = Mapping[str, StackPlacement]


def place_layers(segments: Sequence[Segment], layers: Sequence[int], *, stages: int, chunks: int) -> Placement:
    """Divides the layers of a model over pipeline stages.

    A stack gets as many rows on every stage as the fullest one needs; the rest is padding, which costs memory, and time
    as well where stages do not branch around it (`megajax.training.stages.Stages.rows`).

    Args:
      segments: how the layers are stacked.
      layers: how many of them each virtual stage runs; chunk c of stage s is virtual stage c p + s.
    """
    ends = np.cumsum(layers)
    spans = [(int(end - count), int(end)) for end, count in zip(ends, layers, strict=True)]
    order = [spans[chunk * stages + stage] for stage in range(stages) for chunk in range(chunks)]
    placement: dict[str, StackPlacement] = {}
    for segment in segments:
        periods = [_periods(segment, span) for span in order]
        rows = max(stop - start for start, stop in periods)
        for stack in segment.stacks:
            placement[stack.name] = _place(stack, order, [start for start, _ in periods], rows)
    return placement


def _periods(segment: Segment, span: tuple[int, int]) -> tuple[int, int]:
    """The repeats of the segment's pattern that layers [start, stop) touch."""
    first, period = segment.stacks[0].first, segment.stacks[0].period
    start, stop = max(span[0], first), min(span[1], first + period * segment.repeats)
    return ((start - first) // period, -(-(stop - first) // period)) if start < stop else (0, 0)


def _place(stack: Stack, order: Sequence[tuple[int, int]], starts: Sequence[int], rows: int) -> StackPlacement:
    source, layer = [], []
    for (start, stop), first_repeat in zip(order, starts, strict=True):
        for repeat in range(first_repeat, first_repeat + rows):
            index = stack.first + stack.period * repeat
            source.append(repeat if start <= index < stop and repeat < stack.repeats else PADDING)
            layer.append(index)
    return StackPlacement(np.array(source), np.array(layer))
