"""From the `data` options to the three data sets of a run."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from megajax.config import ConfigError, DataConfig
from megajax.data.blended import BlendedDataset, component_size, normalize
from megajax.data.gpt_dataset import GPTDataset, GPTDatasetConfig, Sample
from megajax.data.sources import Source, load_sources
from megajax.data.tokenizers import Tokenizer

SPLITS = ("training", "validation", "test")


class SampleDataset(Protocol):
    """A sequence of samples, each a dict of arrays, of the same shapes in all of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class TextDataset(SampleDataset, Protocol):
    """Samples of tokens."""

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size] that sum to 1."""
        ...


class Sizes(NamedTuple):
    """Samples that each split has to hold at least; None is one epoch."""

    train: int | None
    validation: int | None
    test: int | None


class Datasets(NamedTuple):
    """The three splits; None where a split holds less than one sample of distinct tokens."""

    train: Any
    validation: SampleDataset | None
    test: SampleDataset | None


def build_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    train_samples: int | None,
    validation_samples: int | None,
    test_samples: int | None,
    seed: int,
) -> Datasets:
    """Builds train, validation and test from `config.data`, in Megatron's sample order.

    Each holds at least the samples asked for, repeating its documents as often as that takes; None is one epoch.
    Several data sets are blended by their weights, or without weights by the tokens they have in the split.

    Raises:
      ConfigError: a source cannot be read, or the training split is shorter than one sample.
    """
    sources = load_sources(config, tokenizer)
    sample_config = GPTDatasetConfig(
        sequence_length=config.seq_length,
        seed=seed,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
    )
    sizes = (train_samples, validation_samples, test_samples)
    train, validation, test = (
        _build_split(split, sources, sizes[split], sample_config, config.data_cache_path) for split in range(3)
    )
    if train is None:
        tokens = sum(_split_tokens(source, 0) for source in sources)
        raise ConfigError(
            f"the training split (split={config.split!r}) has {tokens} tokens, less than one sample of"
            f" seq_length={config.seq_length}; give more data, a larger first share, or a smaller seq_length"
        )
    return Datasets(train, validation, test)


def _split_tokens(source: Source, split: int) -> int:
    return int(np.sum(source.tokens.sequence_lengths[source.splits[split]], dtype=np.int64))


def _build_split(
    split: int, sources: list[Source], size: int | None, config: GPTDatasetConfig, cache_path: str | None
) -> SampleDataset | None:
    # A split with less than one sample of text would repeat itself inside every sample, which measures nothing.
    enough = [source for source in sources if _split_tokens(source, split) > config.sequence_length]
    if not enough:
        return None

    def build(source: Source, samples: int | None) -> GPTDataset:
        return GPTDataset(source.tokens, source.splits[split], samples, config, cache_path=cache_path)

    if len(enough) == 1:
        return build(enough[0], size)
    if size is None:
        return BlendedDataset([build(source, None) for source in enough], None, None, cache_path=cache_path)
    weights = normalize([source.weight or _split_tokens(source, split) for source in enough])
    parts = [build(source, component_size(size, weight)) for source, weight in zip(enough, weights, strict=True)]
    return BlendedDataset(parts, weights, size, cache_path=cache_path)
