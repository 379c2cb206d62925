"""Samples of consecutive tokens with the neighbours of their chunks, from the training documents."""

# SPDX-License-Identifier: Apache-2.0
# S sequence, L chunks of a sequence, K neighbours of a chunk, R tokens of each, M tokens of a chunk
from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from megajax.config import Config, ConfigError
from megajax.data.blended import BlendedDataset
from megajax.data.build import Datasets, Sizes
from megajax.data.gpt_dataset import GPTDataset, Sample
from megajax.data.index_cache import load_or_build
from megajax.data.tokenizers import Tokenizer
from megajax.models import language
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.retrieval import FEATURES, NGRAMS, SCALE, ChunkDatabase

Samples = GPTDataset | BlendedDataset
_BLOCKS_KEPT = 4


def components(samples: Samples) -> list[GPTDataset]:
    """The data sets of a blend, or the only one."""
    return samples.datasets if isinstance(samples, BlendedDataset) else [samples]


class TrainingChunks:
    """What neighbours come from: the documents that are trained on.

    Attributes:
      database: their chunks.
      key: what it depends on, as JSON values.

    Raises:
      ConfigError: there are no other documents to find something in.
    """

    def __init__(self, parts: Sequence[GPTDataset], chunk_length: int, eod: int):
        self._numbers: dict[tuple[str, int], int] = {}
        documents = []
        for part in parts:
            for sequence in part.documents.tolist():
                name = (part.tokens.fingerprint, sequence)
                if name not in self._numbers:  # a data set may be in a blend twice
                    self._numbers[name] = len(documents)
                    document = np.asarray(part.tokens.get(sequence))
                    documents.append(document[:-1] if len(document) and document[-1] == eod else document)
        if len(documents) < 2:
            raise ConfigError(
                f"data={parts[0].tokens.name}: neighbors come from other documents, but the training split has one;"
                " separate documents by lines of <|endoftext|>, or give a .jsonl file"
            )
        self.database = ChunkDatabase(documents, chunk_length, eod)
        self.key: dict[str, Any] = {
            "database": [[part.tokens.fingerprint, part.cache_key["documents"]] for part in parts],
            "chunk_length": chunk_length,
            "embedding": [NGRAMS, FEATURES, SCALE],
        }

    def number_of(self, fingerprint: str, sequence: int) -> int | None:
        """The number of a document in the database, None if it is not trained on."""
        return self._numbers.get((fingerprint, sequence))


class RetroDataset:
    """Samples with, for each of their chunks, the most similar chunks of other documents, and what follows those.

    Counterpart of `megatron/core/datasets/retro`. As there, no neighbour is from a document that the sample has a part
    of; nor is what follows it. Neighbours are searched for many chunks together, when the first of them is asked for.

    Args:
      samples: what is predicted. chunks: where neighbours come from.
      cache_path: folder that keeps the neighbours between runs; safe for many processes at once.
    """

    def __init__(
        self,
        samples: Samples,
        chunks: TrainingChunks,
        config: RetroConfig,
        *,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        self.samples, self.chunks, self.config = samples, chunks, config
        self._cache_path = cache_path
        self._key = {
            **chunks.key,
            "samples": [part.cache_key for part in components(samples)],
            "blend": samples.cache_key if isinstance(samples, BlendedDataset) else None,
            "neighbors": [config.retro_num_neighbors, config.retro_num_retrieved_chunks, config.retro_align_neighbors],
        }
        self._blocks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_blocks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """The sample, and context_tokens int32 [L, K, R]."""
        index = range(len(self))[index]
        neighbors = self.neighbors(index)
        found = self.chunks.database.read(neighbors, self.config.retro_retrieved_length)
        return {**self.samples[index], "context_tokens": found}

    def once(self) -> RetroDataset:
        """The same texts, each token in at most one sample: those that fill no sample are left out."""
        epochs = [GPTDataset(part.tokens, part.documents, None, part.config) for part in components(self.samples)]
        samples = BlendedDataset(epochs, None, None) if len(epochs) > 1 else epochs[0]
        return RetroDataset(samples, self.chunks, self.config, cache_path=self._cache_path)

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size]: the share of each token id in what is predicted."""
        return self.samples.token_frequencies(vocab_size)

    def neighbors(self, index: int) -> np.ndarray:
        """int64 [L, K]: for each chunk of a sample where its neighbours begin in the database."""
        size = self._block_size(index)
        block, row = divmod(index, size)
        with self._lock:
            if block not in self._blocks:
                while len(self._blocks) >= _BLOCKS_KEPT:
                    del self._blocks[next(iter(self._blocks))]
                self._blocks[block] = self._search(block, size)
            return self._blocks[block][row]

    def _block_size(self, index: int) -> int:
        length = len(self.samples[index]["tokens"]) // self.config.retro_chunk_length
        return max(1, self.config.retro_block_size // length)

    def _search(self, block: int, size: int) -> np.ndarray:
        """int64 [samples of the block, L, K], from the cache where it has them."""
        config = self.config
        members = range(block * size, min(len(self), (block + 1) * size))

        def build() -> dict[str, np.ndarray]:
            tokens = np.stack([self.samples[index]["tokens"] for index in members])
            chunks = tokens.reshape(-1, config.retro_chunk_length)
            per_sample = len(chunks) // len(members)
            banned = [documents for index in members for documents in [self._own_documents(index)] * per_sample]
            found = self.chunks.database.search(
                chunks,
                config.retro_num_neighbors,
                banned,
                span=config.retro_num_retrieved_chunks,
                align=config.retro_align_neighbors,
            )
            return {"neighbors": found.reshape(len(members), per_sample, -1)}

        key = {**self._key, "block": [members.start, members.stop]}
        return np.asarray(load_or_build(self._cache_path, "neighbors", key, build)["neighbors"])

    def _own_documents(self, index: int) -> list[int]:
        """Documents of the database that a sample has tokens of."""
        part: Any = self.samples
        if isinstance(part, BlendedDataset):
            part, index = part.component_of(index)
        numbers = (self.chunks.number_of(part.tokens.fingerprint, sequence) for sequence in part.sequences_of(index))
        return [number for number in numbers if number is not None]


def datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Samples of consecutive tokens, in Megatron's order, with neighbours from the training split."""
    model = config.model
    assert isinstance(model, RetroConfig)
    plain: Any = language.datasets(config, tokenizer, sizes)
    chunks = TrainingChunks(components(plain.train), model.retro_chunk_length, tokenizer.eod)
    train, validation, test = (
        None if split is None else RetroDataset(split, chunks, model, cache_path=config.data.data_cache_path)
        for split in plain
    )
    return Datasets(train, validation, test)
