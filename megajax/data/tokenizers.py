"""Tokenizers behind one protocol: bytes, Hugging Face `tokenizer.json`, sentencepiece, tiktoken, and plain numbers."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import json
import pathlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Protocol

from megajax.config import ConfigError


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer.

    Attributes:
      name: identifies the vocabulary in cache keys; equal names mean equal tokens.
      vocab_size: ids are in [0, vocab_size).
      eod: the id that ends a document.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens added around it."""
        ...

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens such as `eod` become nothing."""
        ...

    def token_id(self, name: str) -> int | None:
        """Id of a special token such as `[MASK]`; None where the vocabulary has none of that name."""
        ...

    def continuations(self) -> Iterable[int]:
        """Ids of pieces that go on with the word before them, where the vocabulary marks them (`##` of WordPiece)."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0..255 and an end-of-document id 256."""

    name = "byte"
    vocab_size = 257
    eod = 256

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))  # lone surrogates, which JSON allows, become "?"

    def detokenize(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        del name  # no byte is special

    def continuations(self) -> Iterable[int]:
        return ()


class NullTokenizer:
    """Text that is already ids, separated by spaces; `eod` is the last id. Megatron's NullTokenizer."""

    def __init__(self, vocab_size: int):
        if vocab_size < 2:
            raise ConfigError(f"tokenizer='null:{vocab_size}' needs a vocabulary of at least 2")
        self.name = f"null:{vocab_size}"
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def tokenize(self, text: str) -> list[int]:
        """Raises ConfigError where a word is no id of the vocabulary."""
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size):
                raise ConfigError(f"tokenizer={self.name!r} reads ids below {self.vocab_size}, not {word!r}")
            ids.append(int(word))
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids if i != self.eod)

    def token_id(self, name: str) -> int | None:
        del name

    def continuations(self) -> Iterable[int]:
        return ()


HF_EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|eot_id|>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
"""End-of-document tokens to look for when no `tokenizer_config.json` names one."""


class HFTokenizer:
    """A Hugging Face `tokenizer.json`. `eod` is `eos_token` of `tokenizer_config.json` beside it, else a usual name.

    Raises:
      ConfigError: the `tokenizers` package is missing, the file cannot be read, or it has no end-of-document token.
    """

    def __init__(self, path: str):
        package = _import("tokenizers", path)
        content = _read(path)
        try:
            self._tokenizer = package.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises plain Exception
            raise ConfigError(f"tokenizer={path!r} is not a Hugging Face tokenizer.json: {_line(error)}") from error
        self.name = f"hf:{_digest(content)}"
        # Ids may have gaps above the count of entries, so the table needs the largest id.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._find_eod(pathlib.Path(path))

    def _find_eod(self, path: pathlib.Path) -> int:
        beside = path.with_name("tokenizer_config.json")
        names: tuple[str, ...] = HF_EOD_NAMES
        if beside.is_file():
            try:
                token = json.loads(beside.read_bytes()).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{beside} is not a JSON object: {_line(error)}") from error
            named = token.get("content") if isinstance(token, dict) else token
            names = ((named,) if named else ()) + HF_EOD_NAMES
        for name in names:
            token_id = self._tokenizer.token_to_id(name)
            if token_id is not None:
                return token_id
        raise ConfigError(
            f"tokenizer={str(path)!r} has no end-of-document token; name one as eos_token in {beside.name} beside it"
        )

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_with_specials(self, text: str) -> list[int]:
        """Ids of `text` between the special tokens that the file says the model reads around it."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def continuations(self) -> Iterable[int]:
        return [i for text, i in self._tokenizer.get_vocab(with_added_tokens=True).items() if text.startswith("##")]


class SentencePieceTokenizer:
    """A sentencepiece `.model`; `eod` is its `</s>`.

    Raises:
      ConfigError: the `sentencepiece` package is missing, the file cannot be read, or it has no `</s>`.
    """

    def __init__(self, path: str):
        package = _import("sentencepiece", path)
        content = _read(path)
        self._model = package.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except Exception as error:
            raise ConfigError(
                f"tokenizer={path!r} is neither a sentencepiece model nor a tiktoken file: {_line(error)}"
            ) from error
        self.name = f"sentencepiece:{_digest(content)}"
        self.vocab_size = int(self._model.vocab_size())
        self.eod = int(self._model.eos_id())
        if self.eod < 0:
            raise ConfigError(f"tokenizer={path!r} has no </s>; train the sentencepiece model with an eos_id")

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size])  # control tokens decode to ""

    def token_id(self, name: str) -> int | None:
        found = int(self._model.piece_to_id(name))
        return None if found == self._model.unk_id() else found

    def continuations(self) -> Iterable[int]:
        return ()


R50K_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
MEGATRON_PATTERN_V2 = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

# A rank file holds neither its word pattern nor its special tokens: (pattern, eod id) of the published ones, by the
# first part of their file name. Any other file gets cl100k's pattern and the first id after its ranks.
PUBLISHED_RANKS: dict[str, tuple[str, int]] = {
    "r50k_base": (R50K_PATTERN, 50256),
    "p50k_base": (R50K_PATTERN, 50256),
    "cl100k_base": (CL100K_PATTERN, 100257),
    "o200k_base": (O200K_PATTERN, 199999),
}
LLAMA3_RANKS = 128000
LLAMA3_EOD = 128001  # <|end_of_text|>, the second of 256 special tokens after the ranks
LLAMA3_SPECIALS = 256


class TiktokenTokenizer:
    """A tiktoken rank file: lines of base64 bytes and a rank. `eod` as `PUBLISHED_RANKS` says; Llama 3's file is known.

    Raises:
      ConfigError: the `tiktoken` package is missing, or the file cannot be read.
    """

    def __init__(self, path: str):
        content = _read(path)
        ranks = _parse_ranks(content, path)
        pattern, self.eod = PUBLISHED_RANKS.get(pathlib.Path(path).name.split(".")[0], (CL100K_PATTERN, len(ranks)))
        self.vocab_size = max(max(ranks.values()), self.eod) + 1
        if len(ranks) == LLAMA3_RANKS:
            self.eod, self.vocab_size = LLAMA3_EOD, LLAMA3_RANKS + LLAMA3_SPECIALS
        self.name = f"tiktoken:{_digest(content)}"
        self._encoding = _encoding(path, pattern, ranks)
        self._known = set(ranks.values())

    def tokenize(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([i for i in ids if i in self._known])

    def token_id(self, name: str) -> int | None:
        del name

    def continuations(self) -> Iterable[int]:
        return ()


class MegatronTikTokenizer:
    """Megatron's TikTokenizer: a JSON list of {rank, token_bytes, token_str}, ids shifted past 1,000 special tokens.

    `eod` is `</s>`, id 2. The vocabulary is cut at 2^17 ids, the word pattern is Megatron's `v2`: the defaults of
    `megatron/training/tokenizer/tokenizer.py`.

    Raises:
      ConfigError: the `tiktoken` package is missing, or the file cannot be read.
    """

    num_special_tokens = 1000
    max_vocab_size = 2**17
    eod = 2

    def __init__(self, path: str):
        content = _read(path)
        try:
            entries = json.loads(content)[: self.max_vocab_size - self.num_special_tokens]
            ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"tokenizer={path!r} is not a JSON list of ranks and token_bytes: {error!r}") from error
        self.vocab_size = max(ranks.values(), default=0) + 1 + self.num_special_tokens
        self.name = f"megatron-tiktoken:{_digest(content)}"
        self._encoding = _encoding(path, MEGATRON_PATTERN_V2, ranks)

    def tokenize(self, text: str) -> list[int]:
        return [i + self.num_special_tokens for i in self._encoding.encode_ordinary(text)]

    def detokenize(self, ids: Iterable[int]) -> str:
        shift = self.num_special_tokens
        return self._encoding.decode([i - shift for i in ids if shift <= i < self.vocab_size])

    def token_id(self, name: str) -> int | None:
        del name

    def continuations(self) -> Iterable[int]:
        return ()


def build_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Args:
      spec: `byte`; `null:VOCAB`; a `tokenizer.json` or the folder that holds one; a sentencepiece `.model`; a
        `.tiktoken` rank file (also when it is called `.model`, like Llama 3's); or Megatron's tiktoken JSON.

    Raises:
      ConfigError: the name is unknown, the file is missing or damaged, or its package is not installed.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("null:"):
        size = spec.removeprefix("null:")
        if not size.isdecimal():
            raise ConfigError(f"tokenizer={spec!r} must be null:VOCAB, such as null:32000")
        return NullTokenizer(int(size))
    path = pathlib.Path(spec)
    if path.is_dir():
        return build_tokenizer(str(_in_folder(path)))
    if not path.is_file():
        raise ConfigError(
            f"tokenizer={spec!r} is no file; give byte, null:VOCAB, or a path of tokenizer.json, .model or .tiktoken"
        )
    if path.suffix == ".json":
        with open(path, "rb") as file:
            is_list = file.read(64).lstrip()[:1] == b"["
        return MegatronTikTokenizer(spec) if is_list else HFTokenizer(spec)
    if path.suffix == ".tiktoken" or _looks_like_ranks(path):
        return TiktokenTokenizer(spec)
    if path.suffix == ".model":
        return SentencePieceTokenizer(spec)
    raise ConfigError(f"tokenizer={spec!r} ends in {path.suffix!r}; give a tokenizer.json, .model or .tiktoken file")


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"tokenizer={str(folder)!r} is a folder without tokenizer.json or tokenizer.model")


def _looks_like_ranks(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _parse_ranks(content: bytes, path: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"tokenizer={path!r} line {number} is not 'BASE64 RANK': {_line(error)}") from error
    if not ranks:
        raise ConfigError(f"tokenizer={path!r} is empty; give a tiktoken rank file")
    return ranks


def _encoding(path: str, pattern: str, ranks: dict[bytes, int]) -> Any:
    package = _import("tiktoken", path)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # tiktoken aborts the process with a Rust panic when it meets such a byte
        raise ConfigError(f"tokenizer={path!r} has no rank for the single byte {missing[0]}; it needs all 256")
    try:
        return package.Encoding(name=path, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except Exception as error:
        raise ConfigError(f"tokenizer={path!r} is not a tiktoken vocabulary: {_line(error)}") from error


def _import(package: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"tokenizer={path!r} needs the package {package!r}: pip install 'megajax[tokenizers]'"
        ) from error


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer={path!r} cannot be read: {error.strerror}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
