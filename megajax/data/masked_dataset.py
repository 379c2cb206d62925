"""Samples whose tokens are hidden to be found again: the masking of Megatron's BERT and T5 data, bit for bit."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bisect
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megajax.config import ConfigError
from megajax.data.gpt_dataset import check_ids
from megajax.data.index_cache import load_or_build
from megajax.data.indexed_dataset import TokenSequences
from megajax.data.sentence_index import build_sentence_index

RandomState = np.random.RandomState


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How tokens are chosen. Names are those of Megatron's `MaskedWordPieceDatasetConfig`.

    Attributes:
      masking_probability: share of the tokens that are masked.
      masking_max_ngram: longest run of words that is masked at once.
      masking_do_full_word: the pieces of a word are masked together.
      masking_do_permutation: as many other tokens are put in a wrong order. Megatron draws these from numpy's global
        state; here from RandomState(permutation_seed + sample), to be the same each time.
      masking_use_longer_ngrams: favours long runs instead of short ones.
      masking_use_geometric_distribution: lengths of runs as in SpanBERT (arXiv:1907.10529).
    """

    masking_probability: float = 0.15
    masking_max_ngram: int = 3
    masking_do_full_word: bool = True
    masking_do_permutation: bool = False
    masking_use_longer_ngrams: bool = False
    masking_use_geometric_distribution: bool = False
    permutation_seed: int = 5678

    def __post_init__(self) -> None:
        if not 0 < self.masking_probability < 1:
            raise ConfigError(f"mask_prob={self.masking_probability} must be above 0 and below 1")
        if self.masking_use_geometric_distribution and self.masking_do_permutation:
            raise ConfigError("masking_use_geometric_distribution excludes masking_do_permutation; set one of them")


class Vocabulary(NamedTuple):
    """What masking has to know of the ids.

    separators: ids that are never masked. continues: bool [ids], whether one goes on with the word before it. choices:
    ids that a random token is drawn from.
    """

    separators: frozenset[int]
    continues: np.ndarray
    choices: Sequence[int]


class Masked(NamedTuple):
    """A masked sequence. spans: runs that were masked together, (positions, tokens), in the order of their positions.

    labels: position -> token to be found; with permutation these are not all masked.
    """

    tokens: list[int]
    labels: dict[int, int]
    spans: list[tuple[list[int], list[int]]]


Replacement = Callable[[RandomState, int], int]
"""(random numbers, token) -> what stands in its place."""
_GEOMETRIC_P = 0.2


def mask_tokens(
    tokens: Sequence[int],
    target_length: int,
    config: MaskingConfig,
    vocabulary: Vocabulary,
    replacement: Replacement,
    random: RandomState,
    permutation_random: RandomState,
) -> Masked:
    """Masks `masking_probability` of the tokens, in runs of words.

    target_length: tokens that the sample was to have, which bounds the number of masks.
    """
    words = _words(tokens, config, vocabulary)
    limit = min(config.masking_probability * target_length, max(1, round(len(tokens) * config.masking_probability)))
    order = list(range(len(words)))
    random.shuffle(order)
    found = _Chosen(words, limit, config)
    # The limit is seldom a whole number, so that Megatron goes on to the last word; only what comes after it can tell.
    enough = limit if config.masking_do_permutation else int(limit)
    masked, spans = list(tokens), []
    for start in order:
        if len(found.positions) >= enough:
            break
        run = found.run(start, random)
        if run is None:
            continue
        for position in run:
            masked[position] = replacement(random, tokens[position])
        spans.append((run, [tokens[position] for position in run]))
    labels = {position: tokens[position] for run, _ in spans for position in run}
    if config.masking_do_permutation:
        random.shuffle(order)
        labels |= _permute(masked, order, found, limit, random, permutation_random)
    return Masked(masked, labels, sorted(spans, key=lambda span: span[0][0]))


def _words(tokens: Sequence[int], config: MaskingConfig, vocabulary: Vocabulary) -> list[list[int]]:
    """Positions of the tokens of each word, or of each token, separators left out."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in vocabulary.separators:
            continue
        if config.masking_do_full_word and words and vocabulary.continues[token]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


class _Chosen:
    """Runs of words chosen so far, none of which overlap."""

    def __init__(
        self, words: list[list[int]], limit: float, config: MaskingConfig, taken: frozenset[int] = frozenset()
    ):
        self.words, self.limit, self.config = words, limit, config
        self.positions: set[int] = set()
        self.taken = taken
        # Longer runs are rarer, inversely to their length, or the other way round.
        chances = 1.0 / (np.arange(config.masking_max_ngram) + 1)
        chances = chances / chances.sum()
        chances = chances[::-1] if config.masking_use_longer_ngrams else chances
        chances = chances / chances.sum()
        cumulative = np.cumsum(chances)
        self.cumulative = (cumulative / cumulative[-1]).tolist()

    def run(self, start: int, random: RandomState) -> list[int] | None:
        """Chooses a run that begins at word `start`, shortened to what the limit leaves; None if it cannot be."""
        config = self.config
        if config.masking_use_geometric_distribution:
            length = min(int(random.geometric(_GEOMETRIC_P)), config.masking_max_ngram)
        else:  # `random.choice` without its checks
            length = 1 + bisect.bisect_right(self.cumulative, random.random_sample())
        for n in range(length, 0, -1):
            positions = [position for word in self.words[start : start + n] for position in word]
            if self.limit >= len(self.positions) + len(positions):
                if any(position in self.positions or position in self.taken for position in positions):
                    return None
                self.positions.update(positions)
                return positions
        return None


def _permute(
    masked: list[int], order: list[int], found: _Chosen, limit: float, random: RandomState, choose: RandomState
) -> dict[int, int]:
    """Puts unmasked tokens of `masked` in a wrong order; returns position -> token that belongs there."""
    chosen = _Chosen(found.words, limit, found.config, frozenset(found.positions))
    for start in order:
        if len(chosen.positions) >= limit:
            break
        chosen.run(start, choose)
    positions = sorted(chosen.positions)
    sources = list(positions)
    random.shuffle(sources)
    before = list(masked)
    for position, source in zip(positions, sources, strict=True):
        masked[position] = before[source]
    return {position: before[position] for position in positions}


class SentenceSamples:
    """The samples of a store of sentences: which sentences each is made of, and how many tokens it is to have.

    Args:
      tokens: a sequence for each sentence.
      documents: the documents of this split.
      num_samples: build at least this many, repeating the documents as often as needed; None is one epoch.
      max_tokens: of a sample, special tokens left out.
      vocab_size: ids from here on are refused.
      cache_path: folder that keeps the index between runs.

    Raises:
      ConfigError: no document has enough sentences.
    """

    def __init__(
        self,
        tokens: TokenSequences,
        documents: np.ndarray,
        num_samples: int | None,
        *,
        max_tokens: int,
        short_sequence_probability: float,
        min_sentences: int,
        seed: int,
        vocab_size: int,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        self.tokens, self.documents, self.vocab_size = tokens, np.asarray(documents, np.int64), vocab_size
        ends = tokens.document_indices
        pairs = np.stack([ends[self.documents], ends[self.documents + 1]], axis=1)
        options = {
            "max_samples": num_samples,
            "max_tokens": max_tokens,
            "short_sequence_probability": short_sequence_probability,
            "min_sentences": min_sentences,
            "seed": seed,
        }
        digest = hashlib.sha256(self.documents.tobytes()).hexdigest()
        self.cache_key = {"tokens": tokens.fingerprint, "documents": digest, **options}

        def build() -> dict[str, np.ndarray]:
            return {"sentence_index": build_sentence_index(pairs, tokens.sequence_lengths, **options)}

        self.index = load_or_build(cache_path, "sentences", self.cache_key, build)["sentence_index"]
        if not len(self.index):
            raise ConfigError(
                f"data={tokens.name}: none of the {len(pairs)} documents has {min_sentences} or more sentences of at"
                " most 512 tokens; split documents into sentences"
            )

    def __len__(self) -> int:
        return len(self.index)

    def sentences(self, index: int) -> tuple[list[list[int]], int]:
        """(the sentences of a sample, the number of tokens that it is to have)."""
        first, end, target = (int(value) for value in self.index[index])
        found = [np.asarray(self.tokens.get(i)) for i in range(first, end)]
        for sentence in found:
            check_ids(sentence, self.vocab_size, self.tokens.name)
        return [sentence.tolist() for sentence in found], target

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size]: the share of each id in the documents."""
        counts, ends = np.zeros(vocab_size, np.int64), self.tokens.document_indices
        for document in self.documents:
            for sentence in range(int(ends[document]), int(ends[document + 1])):
                ids = np.asarray(self.tokens.get(sentence)).astype(np.int64)
                counts += np.bincount(ids, minlength=vocab_size)[:vocab_size]
        return counts / max(int(counts.sum()), 1)
