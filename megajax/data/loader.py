"""Batches in training order, read ahead by Grain, resumable at any sample on any number of processes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from megajax.config import ConfigError
from megajax.data.build import SampleDataset

READ_THREADS = 2
BATCHES_AHEAD = 4

Batch = dict[str, np.ndarray]


class ProcessRows(NamedTuple):
    """Which rows of each microbatch a process reads. Processes whose devices share rows read the same ones.

    rows: ascending, of [0, of). of: rows of a microbatch over all processes.
    """

    rows: tuple[int, ...]
    of: int

    def of_batch(self, batch_size: int) -> list[int]:
        """The rows of a global batch, which is a whole number of microbatches one after the other."""
        return [first + row for first in range(0, batch_size, self.of) for row in self.rows]


class _ProcessBatches:
    """One process's rows of each global batch from sample `start` on, as a random-access source of batches."""

    def __init__(self, dataset: SampleDataset, start: int, batch_size: int, rows: Sequence[int]):
        self._dataset = dataset
        self._start = start
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return (len(self._dataset) - self._start) // self._batch_size

    def __getitem__(self, index: int) -> Batch:
        first = self._start + int(index) * self._batch_size
        samples = [self._dataset[first + row] for row in self._rows]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


class Loader:
    """Hands out the samples of a data set in order, a global batch at a time, and never wraps.

    The state is the number of samples consumed, nothing else: Grain's own iterator state fits only an equal number of
    workers, processes and rows a batch, while a resumed run may differ in all three and must see the same samples. A
    change of batch size or `restore` starts Grain anew at that sample.

    Args:
      dataset: built with at least as many samples as will be asked for.
      process_rows: what this process reads; None is all.
      num_workers: processes that read ahead; 0 reads ahead in threads. Workers are started with `spawn`, so the
        program needs the usual `if __name__ == "__main__"`.

    Attributes:
      consumed_samples: samples handed out, over all processes.
    """

    def __init__(self, dataset: SampleDataset, *, process_rows: ProcessRows | None = None, num_workers: int = 0):
        self._dataset = dataset
        self._process_rows = process_rows
        self._num_workers = num_workers
        self.consumed_samples = 0
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self._batch_size = 0

    def next_batch(self, num_samples: int) -> Batch:
        """The next global batch: this process's rows, [n, S] each, in data set order.

        Raises:
          ConfigError: `num_samples` are no whole microbatches, or the data set has fewer samples left.
        """
        if num_samples < 1 or (self._process_rows is not None and num_samples % self._process_rows.of):
            whole = self._process_rows.of if self._process_rows is not None else 1
            raise ConfigError(
                f"a global batch of {num_samples} samples is no multiple of the {whole} of a microbatch; change"
                " global_batch_size"
            )
        left = len(self._dataset) - self.consumed_samples
        if num_samples > left:
            raise ConfigError(
                f"the data set was built with {len(self._dataset)} samples and {self.consumed_samples} are consumed, so"
                f" no batch of {num_samples} is left; raise train_samples (or train_iters) so that more are built"
            )
        if self._iterator is None or num_samples != self._batch_size:
            self._start(num_samples)
        assert self._iterator is not None
        batch = next(self._iterator)
        self.consumed_samples += num_samples
        return batch

    def _start(self, num_samples: int) -> None:
        self.close()
        rows = range(num_samples) if self._process_rows is None else self._process_rows.of_batch(num_samples)
        source = _ProcessBatches(self._dataset, self.consumed_samples, num_samples, rows)
        # Grain hands whole elements to its workers in turn, so an element is a batch: a row would come out of order.
        ahead = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
        )
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which only absl.app programs parse
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=BATCHES_AHEAD)
            )
        self._batch_size = num_samples
        self._iterator = iter(ahead)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {"consumed_samples": self.consumed_samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the samples that the loader which gave `state` had handed out.

        Raises:
          ConfigError: the state is damaged or lies beyond this data set.
        """
        consumed = state.get("consumed_samples")
        if not isinstance(consumed, int) or not 0 <= consumed <= len(self._dataset):
            raise ConfigError(
                f"the saved data position {consumed!r} does not lie in this data set of {len(self._dataset)} samples;"
                " resume with the data and the training length of the saved run, or set finetune to start anew"
            )
        self.close()
        self.consumed_samples = consumed

    def close(self) -> None:
        """Stops the read-ahead. The loader can go on being used."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class EvaluationLoader:
    """The same first batches of a data set each time it is iterated.

    Args:
      dataset: see `Loader`.
      batch_size: rows of a global batch.
      num_batches: batches an iteration.
      process_rows: see `Loader`.
    """

    def __init__(
        self, dataset: SampleDataset, *, batch_size: int, num_batches: int, process_rows: ProcessRows | None = None
    ):
        self._dataset = dataset
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._process_rows = process_rows

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        loader = Loader(self._dataset, process_rows=self._process_rows)
        try:
            for _ in range(self._num_batches):
                yield loader.next_batch(self._batch_size)
        finally:
            loader.close()
