"""Text to sentences, and sources of sentences to the three data sets of a run."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megajax.config import Config, ConfigError, DataConfig
from megajax.data.blended import BlendedDataset, component_size, normalize
from megajax.data.build import Datasets, Sizes
from megajax.data.indexed_dataset import TokenSequences
from megajax.data.sources import Source, load_sources
from megajax.data.tokenizers import Tokenizer

_ENDS = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n\s*\n")
Build = Callable[[TokenSequences, np.ndarray, int | None], Any]
"""(sentences, documents of a split, samples or None for one epoch) -> data set; ConfigError where there are none."""


def refuse_packing(config: Config) -> None:
    """Raises ConfigError for options of documents that are packed into samples, which sentences are not."""
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(config.data, name):
            raise ConfigError(f"{name}=True has no effect on --model {config.model_family}; drop it")


def split_sentences(text: str, longest: int, size: Callable[[str], int] = len) -> Iterator[str]:
    """The sentences of a text, its white space made single blanks.

    Those whose `size` is above `longest` are cut between words, into parts of about equal length: a table, say, has no
    sentences.
    """
    start = 0
    for end in [*(match.start() for match in _ENDS.finditer(text)), len(text)]:
        sentence, start = " ".join(text[start:end].split()), end
        if sentence:
            yield from _parts(sentence, -(-size(sentence) // longest))


def _parts(sentence: str, count: int) -> Iterator[str]:
    begin = 0
    for part in range(1, count):
        cut = sentence.find(" ", round(part * len(sentence) / count))
        if cut > begin:
            yield sentence[begin:cut]
            begin = cut + 1
    yield sentence[begin:]


def build_sentence_datasets(config: DataConfig, tokenizer: Tokenizer, sizes: Sizes, build: Build) -> Datasets:
    """Train, validation and test set of `config.data`, whose documents are cut into sentences of at most half a sample.

    Several sources are blended as `megajax.data.build` does it.

    Raises:
      ConfigError: a source cannot be read, or there is nothing to train on.
    """

    def size(sentence: str) -> int:
        return len(tokenizer.tokenize(sentence))

    longest = max(1, config.seq_length // 2)
    sources = load_sources(config, tokenizer, sentences=lambda text: list(split_sentences(text, longest, size)))
    train = _build_split(sources, 0, sizes.train, build, config.data_cache_path, required=True)
    validation, test = (
        _build_split(sources, split, sizes[split], build, config.data_cache_path, required=False) for split in (1, 2)
    )
    return Datasets(train, validation, test)


def _build_split(
    sources: list[Source], split: int, size: int | None, build: Build, cache_path: str | None, *, required: bool
) -> Any:
    def build_one(source: Source, samples: int | None) -> Any:
        try:
            return build(source.tokens, source.splits[split], samples)
        except ConfigError:
            if required:
                raise
            return None

    if len(sources) == 1:
        return build_one(sources[0], size)
    weights = normalize([source.weight or max(1, len(source.splits[split])) for source in sources])
    wanted = [None if size is None else component_size(size, weight) for weight in weights]
    parts = [build_one(source, samples) for source, samples in zip(sources, wanted, strict=True)]
    if any(part is None for part in parts):
        return None
    return BlendedDataset(parts, None if size is None else weights, size, cache_path=cache_path)
