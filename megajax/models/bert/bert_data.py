"""Masked sentences in pairs, in their order or not: Megatron's BERT data set, and what the trainer makes of it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from megajax.config import Config, ConfigError
from megajax.data.build import Datasets, Sizes
from megajax.data.indexed_dataset import TokenSequences
from megajax.data.masked_dataset import MaskingConfig, SentenceSamples, Vocabulary, mask_tokens
from megajax.data.sentences import build_sentence_datasets
from megajax.data.special_tokens import SpecialTokens, special_tokens
from megajax.data.tokenizers import Tokenizer
from megajax.models.bert.bert_config import BertConfig

ROLES = ("pad", "cls", "sep", "mask")
_KEPT, _RANDOM = 0.8, 0.5


def bert_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of this family."""
    return special_tokens(tokenizer, ROLES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertDatasetConfig:
    """How sentences become samples; names are Megatron's.

    Attributes:
      special: ids of pad, cls, sep and mask.
      vocab_size: ids in the data are below it.
      continues: ids of pieces that go on with the word before them.
      choices: what a random token is drawn from; None: all ids below `vocab_size`.
      classification_head: pairs of texts, half of them swapped; without, a single text.
    """

    sequence_length: int
    special: dict[str, int]
    vocab_size: int
    seed: int = 1234
    continues: tuple[int, ...] = ()
    choices: tuple[int, ...] | None = None
    classification_head: bool = True
    short_sequence_probability: float = 0.1
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)

    @property
    def vocabulary(self) -> Vocabulary:
        """What masking has to know."""
        special = self.special
        table = np.zeros(max(self.vocab_size, *(i + 1 for i in special.values())), bool)
        table[list(self.continues)] = True
        choices = range(self.vocab_size) if self.choices is None else self.choices
        return Vocabulary(frozenset((special["cls"], special["sep"])), table, choices)


class BertDataset:
    """Two texts from consecutive sentences, some of their tokens masked.

    Counterpart of `megatron/core/datasets/bert_dataset.py`: the same samples in the same order, bit for bit.

    Args:
      tokens: a sequence for each sentence.
      documents: the documents of this split.
      num_samples: build at least this many; None is one epoch.
      cache_path: folder that keeps the index between runs.

    Raises:
      ConfigError: no document has two sentences.
    """

    def __init__(
        self,
        tokens: TokenSequences,
        documents: np.ndarray,
        num_samples: int | None,
        config: BertDatasetConfig,
        *,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        if config.sequence_length < 8:
            raise ConfigError(f"seq_length={config.sequence_length} has no room for two texts; give at least 8")
        self.tokens, self.config = tokens, config
        self.samples = SentenceSamples(
            tokens,
            documents,
            num_samples,
            max_tokens=config.sequence_length - 3,  # one cls, two sep
            short_sequence_probability=config.short_sequence_probability,
            min_sentences=2 if config.classification_head else 1,
            seed=config.seed,
            vocab_size=config.vocab_size,
            cache_path=cache_path,
        )
        self.token_frequencies = self.samples.token_frequencies
        self.cache_key = {
            **self.samples.cache_key,
            "sequence_length": config.sequence_length,
            "masking": dataclasses.asdict(config.masking),
        }
        self._vocabulary = config.vocabulary

    def __len__(self) -> int:
        return len(self.samples)

    def megatron_sample(self, index: int) -> dict[str, Any]:
        """Megatron's fields: text, types, labels (-1 where nothing is to be found), is_random (whether the texts are
        swapped), padding_mask, loss_mask, all int64 [S] or scalars; truncated."""
        config, special = self.config, self.config.special
        sentences, target = self.samples.sentences(index)
        random = np.random.RandomState((config.seed + index) % 2**32)
        first, second, swapped = self._pair(sentences, random)
        truncated = _truncate(first, second, target, random)
        text = [special["cls"], *first, special["sep"]]
        types = [0] * len(text)
        if second:
            types += [1] * (len(second) + 1)
            text += [*second, special["sep"]]
        masked = mask_tokens(
            text, target, config.masking, self._vocabulary, self._replacement, random,
            np.random.RandomState((config.masking.permutation_seed + index) % 2**32)
            if config.masking.masking_do_permutation
            else random,
        )  # fmt: skip
        padding = config.sequence_length - len(text)
        tokens = np.pad(np.array(masked.tokens, np.int64), (0, padding), constant_values=special["pad"])
        labels, loss_mask = np.full(len(tokens), -1, np.int64), np.zeros(len(tokens), np.int64)
        for position, token in masked.labels.items():
            labels[position], loss_mask[position] = token, 1
        return {
            "text": tokens,
            "types": np.pad(np.array(types, np.int64), (0, padding)),
            "labels": labels,
            "is_random": int(swapped),
            "padding_mask": (tokens != special["pad"]).astype(np.int64),
            "loss_mask": loss_mask,
            "truncated": int(truncated),
        }

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, labels, tokentype_ids, position_ids int32 [S], attention_mask bool [S], loss_mask fp32 [S], is_random
        int32 [], -1 without the binary head."""
        sample = self.megatron_sample(range(len(self))[index])
        order = sample["is_random"] if self.config.classification_head else -1
        return {
            "tokens": sample["text"].astype(np.int32),
            "labels": sample["labels"].astype(np.int32),
            "tokentype_ids": sample["types"].astype(np.int32),
            "position_ids": np.arange(self.config.sequence_length, dtype=np.int32),
            "attention_mask": sample["padding_mask"].astype(bool),
            "loss_mask": sample["loss_mask"].astype(np.float32),
            "is_random": np.array(order, np.int32),
        }

    def _pair(self, sentences: list[list[int]], random: np.random.RandomState) -> tuple[list[int], list[int], bool]:
        """(first text, second text, whether they are swapped)."""
        pivot, swapped = len(sentences), False
        if self.config.classification_head:
            pivot = random.randint(1, len(sentences)) if len(sentences) >= 3 else 1
            swapped = random.random_sample() < 0.5
        first = [token for sentence in sentences[:pivot] for token in sentence]
        second = [token for sentence in sentences[pivot:] for token in sentence]
        return (second, first, True) if swapped else (first, second, False)

    def _replacement(self, random: np.random.RandomState, token: int) -> int:
        """The mask, in one of ten cases a random token, in another the token itself."""
        if random.random_sample() < _KEPT:
            return self.config.special["mask"]
        if random.random_sample() >= _RANDOM:
            choices = self._vocabulary.choices
            return choices[random.randint(0, len(choices))]
        return token


def _truncate(first: list[int], second: list[int], target: int, random: np.random.RandomState) -> bool:
    """Shortens the longer of both, token by token, at a random end, until they have `target` tokens together."""
    truncated = len(first) + len(second) > target
    while len(first) + len(second) > target:
        longer = first if len(first) > len(second) else second
        del longer[0 if random.random_sample() < 0.5 else -1]
    return truncated


def datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Samples from text, see `BertDataset`."""
    model = config.model
    assert isinstance(model, BertConfig)
    dataset_config = BertDatasetConfig(
        sequence_length=config.data.seq_length,
        special=bert_tokens(tokenizer).ids,
        vocab_size=tokenizer.vocab_size,
        seed=config.train.seed,
        continues=tuple(tokenizer.continuations()),
        classification_head=model.add_binary_head,
        short_sequence_probability=model.short_seq_prob,
        masking=MaskingConfig(masking_probability=model.mask_prob),
    )
    cache = config.data.data_cache_path

    def build(tokens: TokenSequences, documents: np.ndarray, samples: int | None) -> BertDataset:
        return BertDataset(tokens, documents, samples, dataset_config, cache_path=cache)

    return build_sentence_datasets(config.data, tokenizer, sizes, build)
