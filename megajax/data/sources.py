"""Where tokens come from: each `--data` entry becomes a store of token sequences with its own three splits."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megajax.config import ConfigError, DataConfig, parse_split
from megajax.data.gpt_dataset import check_ids
from megajax.data.indexed_dataset import IndexedDataset, InMemoryDataset, TokenSequences, best_dtype, strip_suffix
from megajax.data.tokenizers import Tokenizer

DEFAULT_CORPUS = "pydoc_data.topics"
DOCUMENT_SEPARATOR = "<|endoftext|>"
"""On a line of its own in a .txt file it ends a document."""
CHUNK_CHARACTERS = 1 << 22
"""Longer texts are tokenized in pieces of about this size, cut at line ends, to bound memory."""
CHECKED_TOKENS = 1 << 26
"""Tokens of a .bin file whose ids are checked before training; the rest are checked as they are read."""
KINDS = "FILE.txt, FILE.jsonl, or PREFIX of PREFIX.bin and PREFIX.idx"


@dataclasses.dataclass(frozen=True)
class Source:
    """One `--data` entry.

    Attributes:
      tokens: its sequences.
      splits: sequence numbers of train, validation and test, int32 each, possibly empty; of documents, if their
        sentences are sequences.
      weight: its share of a blend; None when no weights were given.
    """

    tokens: TokenSequences
    splits: tuple[np.ndarray, np.ndarray, np.ndarray]
    weight: float | None = None


Sentences = Callable[[str], Sequence[str]]
"""Cuts a document into its sentences."""


def load_sources(config: DataConfig, tokenizer: Tokenizer, *, sentences: Sentences | None = None) -> list[Source]:
    """Opens or tokenizes every entry of `config.data`; without entries, Python's own documentation.

    Args:
      sentences: makes each sentence a sequence, and lets no id end a document. Tokens of a .bin file come as they are.

    Raises:
      ConfigError: an entry is missing, empty, unreadable, of an unknown kind, or holds ids the tokenizer has not.
    """
    fractions = parse_split(config.split)
    if not config.data:
        sections = _without_repeats(split_text(_python_documentation(), fractions))
        return [_text_source(DEFAULT_CORPUS, sections, tokenizer, sentences)]
    return [
        dataclasses.replace(_load(entry, config, tokenizer, fractions, sentences), weight=weight)
        for entry, weight in parse_blend(config.data)
    ]


def parse_blend(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """`("0.3", "A", "0.7", "B")` or `("0.3 A 0.7 B",)` -> [("A", 0.3), ("B", 0.7)]; no weights give None.

    Raises:
      ConfigError: some entries have a weight and others not, or a weight is not above 0.
    """
    words = [word for entry in data for word in ([entry] if pathlib.Path(entry).exists() else entry.split())]
    entries: list[tuple[str, float | None]] = []
    weight = None
    for word in words:
        number = _number(word)
        if number is None:
            entries.append((word, weight))
            weight = None
        elif weight is not None or not (math.isfinite(number) and number > 0):
            raise ConfigError(
                f"data={' '.join(words)!r}: the weight {word} must be above 0 and stand before its data set"
            )
        else:
            weight = number
    weighted = sum(w is not None for _, w in entries)
    if weight is not None or weighted not in (0, len(entries)):
        raise ConfigError(f"data={' '.join(words)!r} must give every data set a weight before it, or none")
    return entries


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def split_documents(count: int, fractions: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts sequences 0..count-1 into train, validation and test with Megatron's rounding; int32 each."""
    edges = [0.0]
    for fraction in fractions:
        edges.append(edges[-1] + fraction)
    at = [round(edge * float(count)) for edge in edges]
    train, validation, test = (np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(at))
    return train, validation, test


def _load(
    entry: str, config: DataConfig, tokenizer: Tokenizer, fractions: Sequence[float], sentences: Sentences | None
) -> Source:
    path = pathlib.Path(entry)
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise ConfigError(f"data={entry} is no file; check the path")
        if path.suffix == ".txt":
            return _text_source(entry, split_text(read_text(path), fractions), tokenizer, sentences)
        documents = [text for (text,) in read_jsonl(path, [config.json_key])]
        tokens = tokenize_documents(entry, documents, tokenizer, sentences)
    else:
        prefix = strip_suffix(entry)
        if not any(pathlib.Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")):
            found = "is not" if path.exists() else "does not exist; give"
            raise ConfigError(f"data={entry} {found} {KINDS}")
        tokens = IndexedDataset(prefix)
        check_ids(tokens.stored_tokens[:CHECKED_TOKENS], tokenizer.vocab_size, prefix)
    if not np.any(tokens.sequence_lengths):
        raise ConfigError(f"data={entry} holds no tokens")
    count = len(tokens) if sentences is None else len(tokens.document_indices) - 1
    return Source(tokens, split_documents(count, fractions))


def _text_source(
    name: str, sections: Sequence[Sequence[str]], tokenizer: Tokenizer, sentences: Sentences | None
) -> Source:
    """A source whose three splits are these documents. Plain text is split by size, not by documents, so that even
    one long document gives all three.
    """
    tokens = tokenize_documents(name, [text for section in sections for text in section], tokenizer, sentences)
    if not len(tokens.tokens):
        raise ConfigError(f"data={name} holds no text")
    edges = np.cumsum([0, *map(len, sections)])
    train, validation, test = (np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(edges))
    return Source(tokens, (train, validation, test))


def split_text(documents: Sequence[str], fractions: Sequence[float]) -> list[list[str]]:
    """Cuts the concatenated documents into sections of these fractions of their characters, at the next line end."""
    total = sum(map(len, documents))
    edges = [round(total * sum(fractions[: i + 1])) for i in range(len(fractions))]
    edges[-1] = total
    sections: list[list[str]] = [[] for _ in fractions]
    section, start = 0, 0
    for text in documents:
        begin = 0
        while start + len(text) > edges[section]:
            at = max(begin, edges[section] - start)
            cut = at if at == begin else (text.find("\n", at - 1) + 1 or at)
            sections[section].append(text[begin:cut])
            begin, section = cut, section + 1
        sections[section].append(text[begin:])
        start += len(text)
    return [[text for text in section if text] for section in sections]


def tokenize_documents(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, sentences: Sentences | None = None
) -> InMemoryDataset:
    """Tokenizes each document and ends it with `eod`; all in memory. A document with no tokens keeps only `eod`."""
    if sentences is not None:
        return _tokenize_sentences(name, documents, tokenizer, sentences)
    dtype = best_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    lengths = []
    for text in documents:
        before = len(parts)
        parts += [np.array(tokenizer.tokenize(chunk), dtype) for chunk in _chunks(text)]
        parts.append(np.array([tokenizer.eod], dtype))
        lengths.append(sum(map(len, parts[before:])))
    tokens = np.concatenate([np.zeros(0, dtype), *parts])
    digest = hashlib.sha256(tokens.tobytes() + np.array(lengths, np.int64).tobytes()).hexdigest()
    return InMemoryDataset(name, tokens, np.array(lengths, np.int32), fingerprint=digest)


def _tokenize_sentences(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, sentences: Sentences
) -> InMemoryDataset:
    dtype = best_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    ends = [0]
    for text in documents:
        found = (np.array(tokenizer.tokenize(sentence), dtype) for sentence in sentences(text))
        parts += [ids for ids in found if len(ids)]
        ends.append(len(parts))
    tokens, lengths = np.concatenate([np.zeros(0, dtype), *parts]), np.array([len(ids) for ids in parts], np.int64)
    index = np.array(ends, np.int64)
    digest = hashlib.sha256(tokens.tobytes() + lengths.tobytes() + index.tobytes()).hexdigest()
    return InMemoryDataset(name, tokens, lengths.astype(np.int32), fingerprint=digest, document_indices=index)


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        cut = text.rfind("\n", start, start + CHUNK_CHARACTERS) + 1 or start + CHUNK_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def read_text(path: pathlib.Path) -> list[str]:
    """The documents of a UTF-8 text file: one, or several that lines of `<|endoftext|>` separate."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data={path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise ConfigError(f"data={path} cannot be read: {error.strerror}") from error
    if DOCUMENT_SEPARATOR not in text:
        return [text] if text.strip() else []
    documents: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.strip() == DOCUMENT_SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ["".join(lines) for lines in documents]
    return [document for document in joined if document.strip()]


def read_jsonl(path: pathlib.Path, keys: Sequence[str]) -> Iterator[list[str]]:
    """The texts under `keys` of each line whose texts are not all empty.

    Raises:
      ConfigError: the file cannot be read, or a line is not such an object; the message has the line's number.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                texts = parse_json_line(line, keys, f"{path}:{number}")
                if any(texts):
                    yield texts
    except OSError as error:
        raise ConfigError(f"data={path} cannot be read: {error.strerror}") from error


def parse_json_line(line: bytes, keys: Sequence[str], where: str) -> list[str]:
    """The strings under `keys`; a blank line gives empty ones. `where` (FILE:LINE) begins every error message."""
    if not line.strip():
        return [""] * len(keys)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: a line must be a JSON object with a text, not {type(record).__name__}")
    texts = []
    for key in keys:
        if key not in record:
            known = ", ".join(sorted(map(str, record))[:8]) or "none"
            raise ConfigError(f"{where}: no key {key!r}; the line has {known}; set json_key")
        if not isinstance(record[key], str):
            raise ConfigError(f"{where}: {key!r} is {type(record[key]).__name__}, not a text")
        # JSON may escape half of a surrogate pair, which is no character and which tokenizers reject.
        texts.append(record[key].encode("utf-8", errors="replace").decode("utf-8"))
    return texts


def _python_documentation() -> list[str]:
    """The topics of CPython's `help()`, about 465 KB of English, in a fixed mixed order, each a document."""
    topics: dict[str, str] = importlib.import_module(DEFAULT_CORPUS).topics
    # Alphabetical order would make the last, validating topics a biased choice.
    return [topics[name] for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())]


def _without_repeats(sections: Sequence[Sequence[str]]) -> list[list[str]]:
    """Drops, from every section but the first, paragraphs that an earlier section has: Python's topics quote each
    other, and a validation text that was trained on tells nothing.
    """
    seen: set[str] = set()
    result = []
    for section in sections:
        kept = [[part for part in text.split("\n\n") if " ".join(part.split()) not in seen] for text in section]
        seen |= {" ".join(part.split()) for text in section for part in text.split("\n\n")}
        result.append([text for text in map("\n\n".join, kept) if text.strip()])
    return result


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy, in nats, of drawing tokens with these frequencies: the loss of the best model that ignores context."""
    p = np.asarray(counts, np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())
