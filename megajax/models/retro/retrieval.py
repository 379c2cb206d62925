"""Chunks of text that resemble another one: a database of chunks, and exact search over it.

Megatron embeds chunks with BERT and searches approximately, with Faiss: two programs and a download. Here a chunk is
what n-grams of tokens it has, each weighted by how rare it is (tf-idf). That needs no model, works with any tokenizer,
and finds what a small decoder can make use of: text that continues like this one because it is worded like this one.
"""

# SPDX-License-Identifier: Apache-2.0
# N chunks of the database, Q chunks that are searched for, M tokens of a chunk, E features of an embedding
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from megajax.config import ConfigError

NGRAMS = (1, 2, 3, 4, 5)
FEATURES = 512
"""E. The n-grams are hashed into so many sums with random signs, which keeps dot products but for about 1/sqrt(E)."""
SCALE = 2048
"""Embeddings have about this length and whole numbers, so that every dot product is a whole number below 2^24: exact
in fp32, in whatever order a machine adds, and the same neighbours everywhere."""
NOTHING = -1
"""In the place of a neighbour where there is none."""

_BUCKETS = 1 << 20
"""N-grams are counted by their hash modulo this."""
_TOGETHER = 512
"""Chunks that are worked on at once."""
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Hashes of uint64, by the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngrams(tokens_QM: np.ndarray) -> np.ndarray:
    """Hashes of the n-grams of each chunk, below `_BUCKETS`; int64 [Q, n-grams], each chunk's sorted, repeats as -1."""
    ids = _mixed(tokens_QM.astype(np.uint64) + _ODD)
    M = tokens_QM.shape[1]
    every = []
    for n in NGRAMS:
        if n <= M:
            value = np.zeros((len(ids), M - n + 1), np.uint64)
            for i in range(n):
                value = _mixed(value * _ODD + ids[:, i : M - n + 1 + i])
            every.append(value % np.uint64(_BUCKETS))
    found = np.sort(np.concatenate(every, axis=1).astype(np.int64), axis=1)
    found[:, 1:][found[:, 1:] == found[:, :-1]] = -1
    return found


class ChunkDatabase:
    """The chunks of some documents, and the ones among them that resemble others most.

    Args:
      documents: the tokens of each, without an end-of-document id.
      chunk_length: M.
      pad: fills the last chunk of a document.

    Attributes:
      tokens: int32 [N, M], chunk after chunk, document after document.
      starts: int64 [documents + 1], the first chunk of each, then N.
    """

    def __init__(self, documents: Sequence[np.ndarray], chunk_length: int, pad: int):
        counts = [-(-len(document) // chunk_length) for document in documents]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.tokens = np.full((int(self.starts[-1]), chunk_length), pad, np.int32)
        self.pad = pad
        for start, document in zip(self.starts, documents, strict=False):
            self.tokens.reshape(-1)[start * chunk_length : start * chunk_length + len(document)] = document
        if not len(self.tokens):
            raise ConfigError("the training documents hold no tokens to retrieve; give other data")

    @cached_property
    def _rarity(self) -> np.ndarray:
        """float64: for each hash of an n-gram, in how few chunks it occurs."""
        counts = np.zeros(_BUCKETS, np.int64)
        for start in range(0, len(self.tokens), _TOGETHER):
            found = ngrams(self.tokens[start : start + _TOGETHER])
            counts += np.bincount(found[found >= 0], minlength=_BUCKETS)
        return np.log((1 + len(self.tokens)) / (1 + counts))

    @cached_property
    def _embeddings_NE(self) -> np.ndarray:
        return self.embed(self.tokens)

    def embed(self, tokens_QM: np.ndarray) -> np.ndarray:
        """fp32 [Q, E], whole numbers; the length of each is about `SCALE`."""
        result = np.empty((len(tokens_QM), FEATURES), np.float32)
        for start in range(0, len(tokens_QM), _TOGETHER):
            found = ngrams(tokens_QM[start : start + _TOGETHER])
            rows, _ = np.nonzero(found >= 0)
            found = found[found >= 0]
            hashes = _mixed(found.astype(np.uint64) + _ODD)
            at = rows * FEATURES + (hashes % np.uint64(FEATURES)).astype(np.int64)
            signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
            size = min(_TOGETHER, len(tokens_QM) - start)
            sums = np.bincount(at, signs * self._rarity[found], minlength=size * FEATURES).reshape(size, FEATURES)
            length = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
            result[start : start + size] = np.rint(sums * (SCALE / np.maximum(length, 1e-6)))
        return result

    def search(
        self,
        tokens_QM: np.ndarray,
        count: int,
        banned: Sequence[Sequence[int]],
        *,
        span: int = 1,
        align: bool = False,
    ) -> np.ndarray:
        """Where the `count` chunks begin that resemble each chunk most, best first; of equals, the first.

        Args:
          banned: for each chunk, the documents that none of its neighbours, nor the chunks behind them, may be from.
          span: chunks that are read of each neighbour, itself among them.
          align: move each neighbour by less than a chunk, within its document, to where most of its tokens are those
            of the chunk: a quotation then begins where the chunk does.

        Returns:
          int64 [Q, count], places in the flat `tokens`; `NOTHING` where fewer chunks are left.
        """
        result = np.full((len(tokens_QM), count), NOTHING, np.int64)
        for start in range(0, len(tokens_QM), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            scores_QN = self.embed(tokens_QM[part]) @ self._embeddings_NE.T
            for row, documents in zip(scores_QN, banned[part], strict=True):
                for document in documents:
                    row[self._leading_into(document, span + align)] = -np.inf
            rows = np.arange(len(scores_QN))
            for rank in range(count):
                best = scores_QN.argmax(axis=1)
                left = scores_QN[rows, best] > -np.inf
                result[start + rows[left], rank] = best[left] * tokens_QM.shape[1]
                scores_QN[rows, best] = -np.inf
            if align:
                result[part] = self._aligned(result[part], tokens_QM[part])
        return result

    def _aligned(self, starts_QK: np.ndarray, tokens_QM: np.ndarray) -> np.ndarray:
        """The places less than a chunk from these where most tokens are those of the chunk; of equals, the nearest."""
        M = tokens_QM.shape[1]
        shifts = np.array(sorted(range(1 - M, M), key=abs))
        document = np.searchsorted(self.starts, starts_QK // M, side="right")  # the one behind
        places = starts_QK[..., None] + shifts
        inside = (places >= self.starts[document - 1, None] * M) & (places <= (self.starts[document, None] - 1) * M)
        around = self._from(starts_QK - (M - 1), 3 * M - 2)
        windows = np.lib.stride_tricks.sliding_window_view(around, M, axis=-1)[..., shifts + M - 1, :]
        equal = (windows == tokens_QM[:, None, None, :]).sum(axis=-1)
        best = np.where(inside, equal, -1).argmax(axis=-1)
        return np.where(starts_QK == NOTHING, NOTHING, starts_QK + shifts[best])

    def _leading_into(self, document: int, span: int) -> np.ndarray:
        """The chunks of a document, and those before it whose continuation is in it."""
        first, end = int(self.starts[document]), int(self.starts[document + 1])
        return np.arange(first - (span - 1) if first < end else end, end) % len(self.tokens)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [..., length]: the tokens from each place on, as Megatron's: behind the last comes the first.

        `NOTHING` is as good as an empty text.
        """
        return np.where((starts == NOTHING)[..., None], np.int32(self.pad), self._from(starts, length))

    def _from(self, starts: np.ndarray, length: int) -> np.ndarray:
        flat = self.tokens.reshape(-1)
        return flat[(starts[..., None] + np.arange(length)) % len(flat)]
