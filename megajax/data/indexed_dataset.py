"""Token sequences: Megatron's `.bin/.idx` pairs, read by mmap and written atomically, and the same in memory."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pathlib
import shutil
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from megajax.config import ConfigError
from megajax.data.files import publish, temporary_beside

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document indices."""
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
"""Meaning of the dtype code (`megatron/core/datasets/indexed_dataset.py`)."""
UINT16_VOCAB = 65500
"""Vocabularies below this are stored as uint16, larger ones as int32, as Megatron does."""


def best_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The dtype Megatron stores ids of such a vocabulary in."""
    small = vocab_size is not None and vocab_size < UINT16_VOCAB
    return np.dtype(np.uint16 if small else np.int32)


class TokenSequences(Protocol):
    """What the datasets need of a store of token sequences, on disk or in memory.

    Attributes:
      name: where the tokens come from, for messages.
      fingerprint: identifies the store and its present content, for cache keys.
      sequence_lengths: int32[S], tokens of each sequence.
      document_indices: int64[D+1], the first sequence of each document, then S.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sequence_lengths(self) -> np.ndarray: ...
    @property
    def document_indices(self) -> np.ndarray: ...
    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence; None reads to its end."""
        ...


class InMemoryDataset:
    """Token sequences held in one array; each sequence is a document, unless documents are given.

    Args:
      name: where the tokens came from, for messages.
      tokens: all sequences, one after another.
      sequence_lengths: their lengths; they sum to `len(tokens)`.
      fingerprint: identifies the content for cache keys.
      document_indices: int64[D+1], the first sequence of each document, then their number.
    """

    def __init__(
        self,
        name: str,
        tokens: np.ndarray,
        sequence_lengths: np.ndarray,
        *,
        fingerprint: str,
        document_indices: np.ndarray | None = None,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.tokens = tokens
        self.sequence_lengths = np.asarray(sequence_lengths, np.int32)
        if document_indices is None:
            document_indices = np.arange(len(self.sequence_lengths) + 1)
        self.document_indices = np.asarray(document_indices, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        if self._starts[-1] != len(tokens):
            raise ValueError(f"sequence_lengths sum to {self._starts[-1]}, but there are {len(tokens)} tokens")

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        start = int(self._starts[index])
        stop = int(self._starts[index + 1]) if length is None else start + offset + length
        return self.tokens[start + offset : stop]


class IndexedDataset:
    """Read-only view of `PREFIX.bin` and `PREFIX.idx`; both are memory-mapped, so opening costs no memory.

    Counterpart of `megatron/core/datasets/indexed_dataset.py`, byte for byte: `dataset[i]` is sequence i as a
    read-only array of the stored dtype, `dataset[a:b]` a list of them, `get` reads part of one.

    Args:
      path_prefix: the path with or without `.bin` or `.idx`.

    Attributes:
      dtype: of the tokens.
      sequence_lengths: int32[S].
      sequence_pointers: int64[S], byte offset of each sequence in the `.bin` file.
      document_indices: int64[D+1].
      sequence_modes: int8[S], or None; what kind of data a sequence is, in multimodal files.
      stored_tokens: the whole `.bin` file.

    Raises:
      ConfigError: a file is missing, cut short, or not of this format.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]):
        self.path_prefix = strip_suffix(path_prefix)
        self._index = _map(self.path_prefix + ".idx")
        self._parse_index()
        self._bin = _map(self.path_prefix + ".bin")
        self._check_bin()

    def _parse_index(self) -> None:
        path, size = self.path_prefix + ".idx", len(self._index)
        if size < HEADER.size or bytes(self._index[: len(MAGIC)]) != MAGIC:
            raise ConfigError(f"{path} is not a Megatron index file; make it with python -m megajax.data.preprocess")
        _, version, code, sequences, documents = HEADER.unpack(bytes(self._index[: HEADER.size]))
        if version != VERSION or code not in DTYPES:
            raise ConfigError(
                f"{path} has format version {version} and dtype code {code}; this reader knows version {VERSION} and"
                f" codes {min(DTYPES)} to {max(DTYPES)}"
            )
        self.dtype = DTYPES[code]
        expected = HEADER.size + sequences * 12 + documents * 8
        if size not in (expected, expected + sequences):
            raise ConfigError(
                f"{path} holds {size} bytes, but its header promises {expected}: it was cut short or damaged;"
                " copy it again or redo the preprocessing"
            )
        lengths_end = HEADER.size + 4 * sequences
        pointers_end = lengths_end + 8 * sequences
        self.sequence_lengths = self._index[HEADER.size : lengths_end].view("<i4")
        self.sequence_pointers = self._index[lengths_end:pointers_end].view("<i8")
        self.document_indices = self._index[pointers_end:expected].view("<i8")
        self.sequence_modes = self._index[expected:].view(np.int8) if sequences and size > expected else None

    def _check_bin(self) -> None:
        lengths, pointers, documents = self.sequence_lengths, self.sequence_pointers, self.document_indices
        path, size = self.path_prefix + ".bin", len(self._bin)
        ends = pointers + lengths.astype(np.int64) * self.dtype.itemsize
        if len(lengths) and (lengths.min() < 0 or pointers.min() < 0 or np.any(pointers % self.dtype.itemsize)):
            raise ConfigError(f"{self.path_prefix}.idx is damaged: it has impossible lengths or offsets")
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(lengths) or np.any(np.diff(documents) < 0):
            raise ConfigError(f"{self.path_prefix}.idx is damaged: its documents do not cover its sequences")
        needed = int(ends.max()) if len(ends) else 0
        if size < needed:
            raise ConfigError(
                f"{path} holds {size} bytes, but its index needs {needed}: it was cut short or belongs to another .idx;"
                " copy it again or redo the preprocessing"
            )
        self.stored_tokens = self._bin[: size - size % self.dtype.itemsize].view(self.dtype.newbyteorder("<"))

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(range(len(self))[index])

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return type(self), (self.path_prefix,)  # workers map the files again instead of copying them

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of sequence `index`; `length=None` reads to its end."""
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        stop = start + (int(self.sequence_lengths[index]) if length is None else offset + length)
        return self.stored_tokens[start + offset : stop]

    @property
    def name(self) -> str:
        """The prefix, for messages."""
        return self.path_prefix

    @property
    def fingerprint(self) -> str:
        """Changes when either file does: names, sizes and modification times."""
        files = [os.stat(self.path_prefix + suffix) for suffix in (".bin", ".idx")]
        parts = [str(number) for file in files for number in (file.st_size, file.st_mtime_ns)]
        return ":".join([os.path.abspath(self.path_prefix), *parts])


class IndexedDatasetBuilder:
    """Writes `PREFIX.bin` and `PREFIX.idx`; they appear at `finalize`, complete, or never.

    Use as a context manager, so that an exception leaves nothing behind:

      with IndexedDatasetBuilder(prefix, dtype=best_dtype(vocab_size)) as builder:
          builder.add_document(tokens, [len(tokens)])
          builder.finalize()

    Args:
      path_prefix: the path with or without `.bin` or `.idx`.
      dtype: one of `DTYPES`.
      multimodal: also store a mode for each sequence.

    Raises:
      ConfigError: the folder cannot be written, or a token does not fit `dtype`.
    """

    def __init__(self, path_prefix: str | os.PathLike[str], *, dtype: Any = np.int32, multimodal: bool = False):
        self.path_prefix = strip_suffix(path_prefix)
        self.dtype = np.dtype(dtype)
        self._code = next((code for code, known in DTYPES.items() if known == self.dtype), None)
        if self._code is None:
            raise ConfigError(
                f"dtype={self.dtype} cannot be stored; choose one of {', '.join(map(str, DTYPES.values()))}"
            )
        self._lengths: list[np.ndarray] = []
        self._modes: list[np.ndarray] | None = [] if multimodal else None
        self._sequences = 0
        self._document_indices: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._temporary: list[str] = [temporary_beside(self.path_prefix + ".bin")]
        self._file: BinaryIO = open(self._temporary[0], "wb", buffering=1 << 20)  # noqa: SIM115 closed in __exit__

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for name in self._temporary:
            pathlib.Path(name).unlink(missing_ok=True)

    def add_item(self, tokens: np.ndarray | Sequence[int], mode: int = 0) -> None:
        """Appends one sequence to the current document."""
        self._append(tokens, np.array([len(tokens)], np.int32), [mode])

    def end_document(self) -> None:
        """Ends the current document."""
        self._document_indices.append(np.array([self._sequences], np.int64))

    def add_document(
        self, tokens: np.ndarray | Sequence[int], lengths: Sequence[int], modes: Sequence[int] | None = None
    ) -> None:
        """Appends a document whose sequences, `lengths` tokens each, follow one another in `tokens`."""
        self._append(tokens, np.asarray(lengths, np.int32), modes if modes is not None else [0] * len(lengths))
        self.end_document()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends many documents of one sequence each."""
        before = self._sequences
        self._append(tokens, np.asarray(lengths, np.int32), np.zeros(len(lengths), np.int8))
        self._document_indices.append(np.arange(before + 1, self._sequences + 1, dtype=np.int64))

    def _append(
        self, tokens: np.ndarray | Sequence[int], lengths: np.ndarray, modes: Sequence[int] | np.ndarray
    ) -> None:
        wide = np.asarray(tokens, dtype=None if len(tokens) else self.dtype)
        stored = wide.astype(self.dtype.newbyteorder("<"))
        if self.dtype.kind in "iu" and not np.array_equal(wide, stored):
            bad = wide[wide != stored][0]
            raise ConfigError(f"token id {bad} does not fit {self.dtype}, the dtype of {self.path_prefix}.bin")
        if int(lengths.sum()) != len(stored):
            raise ValueError(f"lengths sum to {lengths.sum()}, but the document has {len(stored)} tokens")
        self._file.write(stored.tobytes())
        self._lengths.append(lengths)
        self._sequences += len(lengths)
        if self._modes is not None:
            self._modes.append(np.asarray(modes, np.int8))

    def add_index(self, path_prefix: str | os.PathLike[str]) -> None:
        """Appends all documents of another pair of files, which must have the same dtype."""
        other = IndexedDataset(path_prefix)
        if other.dtype != self.dtype or (other.sequence_modes is None) != (self._modes is None):
            raise ConfigError(
                f"{other.path_prefix} stores {other.dtype}{'' if other.sequence_modes is None else ' and modes'}, but"
                f" {self.path_prefix} {self.dtype}{'' if self._modes is None else ' and modes'}; only equal ones merge"
            )
        with open(other.path_prefix + ".bin", "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 22)
        self._document_indices.append(other.document_indices[1:] + self._sequences)
        self._lengths.append(np.array(other.sequence_lengths))
        self._sequences += len(other)
        if self._modes is not None and other.sequence_modes is not None:
            self._modes.append(np.array(other.sequence_modes))

    def finalize(self) -> None:
        """Writes the index and makes both files visible, the `.idx` last."""
        self._file.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths]).astype("<i4")
        sizes = lengths.astype(np.int64) * self.dtype.itemsize
        pointers = np.cumsum(sizes) - sizes
        documents = np.concatenate(self._document_indices).astype("<i8")
        self._temporary.append(temporary_beside(self.path_prefix + ".idx"))
        with open(self._temporary[-1], "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
            for part in (lengths, pointers.astype("<i8"), documents):
                file.write(part.tobytes())
            if self._modes is not None:
                file.write(np.concatenate([np.zeros(0, np.int8), *self._modes]).tobytes())
        # A kill between the renames must leave a missing index, never a new .bin under an old .idx.
        pathlib.Path(self.path_prefix + ".idx").unlink(missing_ok=True)
        for temporary, suffix in zip(self._temporary, (".bin", ".idx"), strict=True):
            publish(temporary, self.path_prefix + suffix)
        self._temporary.clear()


def strip_suffix(path: str | os.PathLike[str]) -> str:
    """`PREFIX.bin`, `PREFIX.idx` or `PREFIX` -> `PREFIX`."""
    return os.fspath(path).removesuffix(".bin").removesuffix(".idx")


def _map(path: str) -> np.ndarray:
    """The bytes of a file, mapped read-only; an empty file gives an empty array."""
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)
        # A plain array on top of the map: np.memmap's own __getitem__ is slow, and a view keeps the map alive.
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; a data set PREFIX is the two files PREFIX.bin and PREFIX.idx"
        ) from error
