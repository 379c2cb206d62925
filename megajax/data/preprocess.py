"""`python -m megajax.data.preprocess`: JSON lines to Megatron's `PREFIX_KEY_document.bin/.idx`, on many processes."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn

import numpy as np

from megajax.config import ConfigError
from megajax.data.indexed_dataset import IndexedDatasetBuilder, best_dtype
from megajax.data.sources import parse_json_line
from megajax.data.tokenizers import Tokenizer, build_tokenizer
from megajax.status_line import StatusLine

BATCH_BYTES = 1 << 20
"""Text handed to a process at once."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """Some consecutive lines of an input file; `first` is the number of the first of them."""

    path: str
    first: int
    lines: list[bytes]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of one key's non-empty documents, one after another, and their lengths."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process does with lines."""

    tokenizer: str
    keys: tuple[str, ...]
    append_eod: bool

    def encode(self, batch: Lines) -> list[Encoded]:
        """Tokens of every key.

        Raises:
          ConfigError: a line is no such object; the message has its file and number.
        """
        tokenizer = _tokenizer(self.tokenizer)
        dtype = best_dtype(tokenizer.vocab_size)
        documents: list[list[np.ndarray]] = [[] for _ in self.keys]
        for number, line in enumerate(batch.lines, batch.first):
            where = f"{batch.path}:{number}"
            for texts, text in zip(documents, parse_json_line(line, self.keys, where), strict=True):
                try:
                    ids = tokenizer.tokenize(text) if text else []
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from error
                if ids:
                    texts.append(np.array([*ids, tokenizer.eod] if self.append_eod else ids, dtype))
        return [
            Encoded(np.concatenate([np.zeros(0, dtype), *texts]), np.array([len(ids) for ids in texts], np.int32))
            for texts in documents
        ]


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; only the one that cleans up is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _tokenizer(spec: str) -> Tokenizer:
    """Built once in each process."""
    return build_tokenizer(spec)


def read_batches(paths: Sequence[str]) -> Iterator[Lines]:
    """The lines of the files, in order, about `BATCH_BYTES` at a time."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                first = 1
                while lines := file.readlines(BATCH_BYTES):
                    yield Lines(path, first, lines)
                    first += len(lines)
        except OSError as error:
            raise ConfigError(f"input={path} cannot be read: {error.strerror}") from error


def encode_in_order(
    task: Task, batches: Iterator[Lines], workers: int
) -> Generator[tuple[Lines, list[Encoded]], None, None]:
    """Encodes the batches, several at once, and yields them in their order, whatever the number of workers."""
    if workers == 1:
        yield from ((batch, task.encode(batch)) for batch in batches)
        return
    pending: collections.deque[tuple[Lines, Future[list[Encoded]]]] = collections.deque()
    # spawn: forking a process that holds threads, as numpy and tokenizers do, can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts) as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(task.encode, batch)))
                if len(pending) > 2 * workers:  # bounds memory, and keeps every worker busy
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"workers={workers}: a worker process was killed, probably for memory; use fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Progress:
    """One line on a terminal, rewritten every `interval` documents; silent elsewhere.

    Attributes:
      documents: read so far.
      read: bytes read so far.
    """

    def __init__(self, total_bytes: int, interval: int):
        self.documents = 0
        self.read = 0
        self._total = max(total_bytes, 1)
        self._interval = interval
        self._next = interval
        self._start = time.perf_counter()
        self._line = StatusLine()

    def add(self, documents: int, read: int) -> None:
        """Counts a batch."""
        self.documents += documents
        self.read += read
        if self.documents >= self._next:
            self._next = self.documents + self._interval
            self._line.show(f"{self.read / self._total:6.1%}  {self.documents:,} documents  {self.rate:.1f} MB/s")

    def clear(self) -> None:
        """Removes the line."""
        self._line.clear()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Megabytes of input a second."""
        return self.read / 1e6 / max(self.seconds, 1e-9)


def preprocess(
    inputs: Sequence[str], output_prefix: str, task: Task, *, workers: int = 1, log_interval: int = 1000
) -> list[str]:
    """Writes `{output_prefix}_{key}_document.bin/.idx` for each key, all of them at the end or none.

    Returns:
      A line of summary for each key.

    Raises:
      ConfigError: an input cannot be read, a line is damaged, nothing can be written, or there is no text.
    """
    vocab_size = _tokenizer(task.tokenizer).vocab_size
    missing = [path for path in inputs if not os.path.isfile(path)]
    if missing:
        raise ConfigError(f"input={missing[0]} is no file; check the path")
    progress = Progress(sum(os.path.getsize(path) for path in inputs), log_interval)
    prefixes = [f"{output_prefix}_{key}_document" for key in task.keys]
    counts = np.zeros((len(task.keys), 2), np.int64)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.clear)
        dtype = best_dtype(vocab_size)
        builders = [stack.enter_context(IndexedDatasetBuilder(prefix, dtype=dtype)) for prefix in prefixes]
        encoded_batches = stack.enter_context(contextlib.closing(encode_in_order(task, read_batches(inputs), workers)))
        for batch, encoded in encoded_batches:
            for i, (builder, part) in enumerate(zip(builders, encoded, strict=True)):
                builder.add_documents(part.tokens, part.lengths)
                counts[i] += len(part.lengths), len(part.tokens)
            progress.add(len(batch.lines), sum(map(len, batch.lines)))
        for key, (documents, _) in zip(task.keys, counts, strict=True):
            if not documents:
                raise ConfigError(f"input={' '.join(inputs)} has no text under {key!r}; check --json-keys")
        for builder in builders:
            builder.finalize()
    return [
        f"{prefix}.bin/.idx: {documents:,} documents, {tokens:,} tokens of {dtype}"
        f" in {progress.seconds:.1f} s ({progress.rate:.1f} MB/s)"
        for prefix, (documents, tokens) in zip(prefixes, counts, strict=True)
    ]


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as in the other programs."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive number"  # what argparse calls the type in its messages


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m megajax.data.preprocess",
        description="Tokenizes JSON lines into the .bin/.idx files that --data and Megatron read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files with one JSON object a line")
    parser.add_argument("--output-prefix", required=True, help="files are named PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys whose texts are taken")
    parser.add_argument(
        "--tokenizer", default="byte", help="byte, null:VOCAB, or a path of tokenizer.json, .model or .tiktoken"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document id")
    parser.add_argument("--workers", type=_positive, default=1, help="processes that tokenize")
    parser.add_argument("--log-interval", type=_positive, default=1000, help="documents between progress updates")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    options = _parse(arguments)
    task = Task(options.tokenizer, tuple(dict.fromkeys(options.json_keys)), options.append_eod)
    try:
        lines = preprocess(
            options.input, options.output_prefix, task, workers=options.workers, log_interval=options.log_interval
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {options.output_prefix}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
