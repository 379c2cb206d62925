"""GPT samples: fixed-length windows over shuffled documents, with labels, loss mask, positions and segment ids."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import hashlib
import os

import numpy as np

from megajax.config import ConfigError
from megajax.data.helpers import build_index_maps
from megajax.data.index_cache import load_or_build
from megajax.data.indexed_dataset import TokenSequences

UNUSED_PAD_ID = -1
"""Fills a sample that the tokens do not fill when the tokenizer has no pad token; it becomes 0 with no loss."""
COUNTED_TOKENS = 1 << 24
"""`token_frequencies` looks at no more tokens than this."""

Sample = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTDatasetConfig:
    """How tokens become samples. Names are those of Megatron's `GPTDatasetConfig`.

    Attributes:
      vocab_size: ids from here on are refused; None does not look.
      pad: id that gets no loss; None when the tokenizer has none.
    """

    sequence_length: int
    seed: int = 1234
    eod: int | None = None
    pad: int | None = None
    vocab_size: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    add_extra_token_to_sequence: bool = True

    def __post_init__(self) -> None:
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
            if getattr(self, name) and self.eod is None:
                raise ConfigError(f"{name}=True needs the end-of-document id: set eod")


class GPTDataset:
    """Samples of `sequence_length` tokens cut from documents laid end to end in random order.

    Counterpart of `megatron/core/datasets/gpt_dataset.py`: the same samples in the same order, bit for bit. Instead of
    an attention mask of S x S it gives segment ids: a query sees the keys of its own segment.

    Args:
      tokens: the store of sequences.
      documents: sequence numbers of this split.
      num_samples: build at least this many, repeating the documents as often as needed; None is one epoch.
      config: how samples are cut.
      drop_last: leave out a last sample that the tokens do not fill.
      cache_path: folder that keeps the index maps between runs; safe for many processes at once.

    Raises:
      ConfigError: there is nothing to sample from.
    """

    def __init__(
        self,
        tokens: TokenSequences,
        documents: np.ndarray,
        num_samples: int | None,
        config: GPTDatasetConfig,
        *,
        drop_last: bool = True,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        self.tokens = tokens
        self.documents = np.asarray(documents, np.int32)
        self.config = config
        if not np.any(tokens.sequence_lengths[self.documents]):
            raise ConfigError(f"data={tokens.name}: the {len(self.documents)} documents to sample from hold no tokens")
        arguments = {
            "num_samples": num_samples,
            "sequence_length": config.sequence_length,
            "seed": config.seed,
            "add_extra_token": config.add_extra_token_to_sequence,
            "drop_last": drop_last,
        }
        documents_digest = hashlib.sha256(self.documents.tobytes()).hexdigest()
        self.cache_key = {"tokens": tokens.fingerprint, "documents": documents_digest, **arguments}
        self.index = load_or_build(
            cache_path,
            "gpt",
            self.cache_key,
            lambda: build_index_maps(tokens.sequence_lengths, self.documents, **arguments),
        )

    def __len__(self) -> int:
        return len(self.index["shuffle_index"])

    def __getitem__(self, index: int) -> Sample:
        """tokens, labels, position_ids int32[S], loss_mask float32[S]; segment_ids int32[S] where attention is reset.

        Segments count from 1. A token equal to `eod` still belongs to the document it ends.
        """
        config = self.config
        text = self._text(range(len(self))[index])
        pad = UNUSED_PAD_ID if config.pad is None else config.pad
        if config.add_extra_token_to_sequence:
            tokens, labels = text[:-1], text[1:]
        else:
            tokens, labels = text, np.append(text[1:], np.int32(pad))
        loss_mask = np.ones(len(tokens), np.float32)
        loss_mask[labels == pad] = 0.0
        position_ids = np.arange(len(tokens), dtype=np.int32)
        sample = {}
        if config.reset_position_ids or config.reset_attention_mask or config.eod_mask_loss:
            is_eod = tokens == config.eod
            if config.eod_mask_loss:
                loss_mask[is_eod] = 0.0
            if config.reset_position_ids:
                first = np.where(np.append(False, is_eod[:-1]), position_ids, 0)  # where a document starts
                position_ids = position_ids - np.maximum.accumulate(first)
            if config.reset_attention_mask:
                sample["segment_ids"] = (1 + np.cumsum(is_eod) - is_eod).astype(np.int32)
        return {
            "tokens": np.where(tokens == pad, 0, tokens),
            "labels": np.where(labels == pad, 0, labels),
            "loss_mask": loss_mask,
            "position_ids": position_ids,
            **sample,
        }

    def sequences_of(self, index: int) -> list[int]:
        """Numbers of the sequences that a sample has tokens of, in the order of the text."""
        (first, _), (last, _) = self._ends(index)
        return self.index["document_index"][first : last + 1].tolist()

    def _ends(self, index: int) -> list[list[int]]:
        """(place in the document index, offset in that document) of the first and last token of a sample."""
        row = int(self.index["shuffle_index"][index])
        return self.index["sample_index"][row : row + 2].tolist()

    def _text(self, index: int) -> np.ndarray:
        """The int32 tokens of a sample, padded to the full length."""
        extra = int(self.config.add_extra_token_to_sequence)
        (first, first_offset), (last, last_offset) = self._ends(index)
        sequences = self.sequences_of(index)
        get = self.tokens.get
        if first == last:
            parts = [get(sequences[0], first_offset, last_offset - first_offset + extra)]
        else:
            parts = [get(sequences[0], first_offset)]
            parts += [get(sequence) for sequence in sequences[1:-1]]
            parts.append(get(sequences[-1], 0, last_offset + extra))
        text = np.concatenate(parts)
        if self.config.vocab_size is not None:
            check_ids(text, self.config.vocab_size, self.tokens.name)
        text = text.astype(np.int32)
        missing = self.config.sequence_length + extra - len(text)
        if missing:
            pad = UNUSED_PAD_ID if self.config.pad is None else self.config.pad
            text = np.append(text, np.full(missing, pad, np.int32))
        return text

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size]: the share of each id in this split's documents, or in the first of them if many."""
        counts, seen = np.zeros(vocab_size, np.int64), 0
        for document in self.documents:
            ids = np.asarray(self.tokens.get(int(document)))
            check_ids(ids, vocab_size, self.tokens.name)
            counts += np.bincount(ids.astype(np.int64), minlength=vocab_size)
            seen += len(ids)
            if seen >= COUNTED_TOKENS:
                break
        return counts / max(seen, 1)


def check_ids(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """Raises ConfigError where an id is outside [0, vocab_size)."""
    if not len(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"data={name} holds token id {low if low < 0 else high}, but the tokenizer has vocab_size={vocab_size};"
            " name the tokenizer that the data was made with"
        )
