"""How many microbatches a step has: constant, or growing with the samples consumed so far.

The rules are those of `megatron/core/num_microbatches_calculator.py`, checked for the whole ramp before the run starts.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megajax.config import ConfigError, TrainConfig


class BatchSize(NamedTuple):
    """Size of one step's batch."""

    num_microbatches: int
    global_batch_size: int
    """The size that was asked for."""
    running_global_batch_size: int
    """The samples really used: num_microbatches * micro_batch_size * data_parallel_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Batch size as a function of the samples consumed so far. Plain Python integers; never traced.

    Without a ramp the batch is `global_batch_size`. With `rampup = (start, increment, samples)` the range from start to
    global_batch_size is walked in k = (global_batch_size - start) / increment equal steps:
    `start + increment * floor(consumed / (samples / k))` while `consumed <= samples`.

    Raises:
      ConfigError: a size does not divide by micro_batch_size * data_parallel_size, or the ramp does not end exactly at
        global_batch_size. With `decrease_batch_size_if_needed` sizes are rounded down to a multiple instead.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    rampup: tuple[int, int, int] | None = None
    decrease_batch_size_if_needed: bool = False

    def __post_init__(self) -> None:
        if self.rampup is not None:
            start, increment, _ = self.rampup
            if start > self.global_batch_size:
                raise ConfigError(
                    f"rampup_batch_size starts at {start}, above global_batch_size={self.global_batch_size}; lower it"
                )
            if (self.global_batch_size - start) % increment:
                raise ConfigError(
                    f"rampup_batch_size cannot grow from {start} to global_batch_size={self.global_batch_size} in steps"
                    f" of {increment}; choose an increment that divides {self.global_batch_size - start}"
                )
        for size in self._asked_sizes():
            self._require_microbatches(size)

    def at(self, consumed_samples: int) -> BatchSize:
        """The batch of the step that starts after `consumed_samples` samples."""
        return self._batch(self._asked_size(consumed_samples))

    @property
    def sizes(self) -> tuple[BatchSize, ...]:
        """Every batch size of the run in order: one compiled program each."""
        return tuple(self._batch(size) for size in self._asked_sizes())

    def train_iters(self, train_samples: int) -> int:
        """Steps that `train_samples` samples suffice for; a last incomplete batch is dropped.

        The ramp is walked step by step and the rest divided. Unlike Megatron's `update_train_iters`, a run that ends
        inside its ramp does not overshoot `train_samples` by a step.

        Raises:
          ConfigError: not even one step.
        """
        ramp_samples = self.rampup[2] if self.rampup is not None else 0
        steps, consumed = 0, 0
        while consumed <= ramp_samples:
            batch = self.at(consumed).running_global_batch_size
            if consumed + batch > train_samples:
                break
            steps, consumed = steps + 1, consumed + batch
        else:
            steps += (train_samples - consumed) // self._batch(self.global_batch_size).running_global_batch_size
        if steps == 0:
            raise ConfigError(
                f"train_samples={train_samples} is less than the first batch of"
                f" {self.at(0).running_global_batch_size} samples; raise train_samples or lower global_batch_size"
            )
        return steps

    def _asked_size(self, consumed_samples: int) -> int:
        if self.rampup is None:
            return self.global_batch_size
        start, increment, samples = self.rampup
        increments = (self.global_batch_size - start) // increment
        if consumed_samples > samples or increments == 0 or samples == 0:
            return self.global_batch_size
        return start + int(consumed_samples / (samples / increments)) * increment  # in floating point, as Megatron

    def _asked_sizes(self) -> tuple[int, ...]:
        if self.rampup is None or self.rampup[2] == 0:
            return (self.global_batch_size,)
        start, increment, _ = self.rampup
        return tuple(range(start, self.global_batch_size + 1, increment))

    def _batch(self, asked: int) -> BatchSize:
        unit = self.micro_batch_size * self.data_parallel_size
        return BatchSize(asked // unit, asked, asked // unit * unit)

    def _require_microbatches(self, size: int) -> None:
        unit = self.micro_batch_size * self.data_parallel_size
        below = size // unit * unit
        if size == below or (self.decrease_batch_size_if_needed and below > 0):
            return
        what = "global_batch_size" if size == self.global_batch_size else "rampup_batch_size reaches a batch of"
        near = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise ConfigError(
            f"{what}{'=' if size == self.global_batch_size else ' '}{size} is not divisible by micro_batch_size times"
            f" the data-parallel size, {self.micro_batch_size} * {self.data_parallel_size} = {unit}; use {near}"
        )


def make_batch_schedule(config: TrainConfig, *, data_parallel_size: int) -> BatchSchedule:
    """The batch sizes of a run; global_batch_size defaults to one microbatch per data-parallel shard.

    Raises:
      ConfigError: see `BatchSchedule`.
    """
    return BatchSchedule(
        global_batch_size=config.global_batch_size or config.micro_batch_size * data_parallel_size,
        micro_batch_size=config.micro_batch_size,
        data_parallel_size=data_parallel_size,
        rampup=config.rampup_batch_size,
    )
