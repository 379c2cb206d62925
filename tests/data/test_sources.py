"""What each `--data` entry becomes, how it is split, and what is said when it cannot be used."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import pydoc_data.topics

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from megajax.config import ConfigError, DataConfig, parse_split
from megajax.data import sources
from megajax.data.indexed_dataset import IndexedDatasetBuilder
from megajax.data.sources import load_sources, parse_blend, split_documents, split_text, unigram_entropy
from megajax.data.tokenizers import ByteTokenizer, NullTokenizer

BYTE = ByteTokenizer()


def _documents(source, split: int) -> list[str]:
    return [BYTE.detokenize(source.tokens.get(int(i)).tolist()) for i in source.splits[split]]


def _load(*data: str, **options) -> list[sources.Source]:
    return load_sources(DataConfig(data=data, **options), BYTE)


def test_text_is_one_document_split_by_size_at_line_ends(tmp_path):
    lines = [f"line {i} of the file\n" for i in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (source,) = _load(str(tmp_path / "a.txt"), split="80,15,5")
    parts = [_documents(source, split) for split in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == "".join(lines)
    assert all(part[0].endswith("\n") for part in parts)
    assert [part[0].count("\n") for part in parts] == pytest.approx([80, 15, 5], abs=1)
    assert source.tokens.get(0)[-1] == BYTE.eod


def test_text_with_separators_is_several_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\n<|endoftext|>\ntwo <|endoftext|> stays\n")
    (source,) = _load(str(tmp_path / "a.txt"), split="1")
    assert _documents(source, 0) == ["one\n", "two <|endoftext|> stays\n"]


def test_jsonl_has_a_document_a_line_and_megatrons_split(tmp_path):
    texts = [f"document {i} é" for i in range(20)]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join([*lines, json.dumps({"body": ""})]))
    (source,) = _load(str(tmp_path / "a.jsonl"), json_key="body", split="8,1,1")
    assert [_documents(source, split) for split in range(3)] == [texts[:16], texts[16:18], texts[18:]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_binary_prefix(tmp_path, suffix):
    with IndexedDatasetBuilder(tmp_path / "a", dtype=np.uint16) as builder:
        for i in range(10):
            builder.add_document([i, 256], [2])
        builder.finalize()
    (source,) = _load(f"{tmp_path}/a{suffix}", split="7,2,1")
    assert [split.tolist() for split in source.splits] == [list(range(7)), [7, 8], [9]]
    with pytest.raises(ConfigError, match=r"a holds token id 256, but the tokenizer has vocab_size=100"):
        load_sources(DataConfig(data=(str(tmp_path / "a"),)), NullTokenizer(100))


def test_default_is_pythons_documentation():
    (source,) = _load()
    sizes = [sum(map(len, _documents(source, split))) for split in range(3)]
    total = sum(map(len, pydoc_data.topics.topics.values()))
    assert sizes[0] == pytest.approx(0.969 * total, rel=0.02)
    assert 0.01 * total < sizes[1] < 0.04 * total
    known = {" ".join(part.split()) for text in _documents(source, 0) for part in text.split("\n\n")}
    held_out = [part for text in _documents(source, 1) for part in text.split("\n\n") if len(part) > 60]
    assert held_out
    assert sum(" ".join(part.split()) in known for part in held_out) == 0


def test_long_texts_are_tokenized_in_pieces(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 10)
    text = "short\nabcdefghijklmnopqrst\nend\n"
    tokens = sources.tokenize_documents("x", [text, ""], BYTE)
    assert tokens.tokens.tolist() == [*text.encode(), 256, 256]
    assert tokens.sequence_lengths.tolist() == [len(text) + 1, 1]
    assert list(sources._chunks(text)) == ["short\n", "abcdefghij", "klmnopqrst", "\nend\n"]


@hypothesis.given(
    documents=st.lists(st.text(alphabet="ab\n", max_size=30), max_size=8),
    fractions=st.sampled_from([(0.969, 0.03, 0.001), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.4, 0.3, 0.3)]),
)
def test_split_text_loses_nothing(documents, fractions):
    sections = split_text(documents, fractions)
    assert len(sections) == 3
    assert "".join("".join(section) for section in sections) == "".join(documents)
    for fraction, section in zip(fractions, sections, strict=True):
        assert fraction > 0 or not section


def test_split_documents_rounds_as_megatron():
    for count, split, sizes in [(79, "969,30,1", (77, 2, 0)), (10, "80,15,5", (8, 2, 0)), (5, "1/1", (2, 3, 0))]:
        parts = split_documents(count, parse_split(split))
        assert tuple(map(len, parts)) == sizes
        assert np.concatenate(parts).tolist() == list(range(count))


def test_blend_grammar():
    assert parse_blend(["A", "B"]) == [("A", None), ("B", None)]
    assert parse_blend(["0.3", "A", "7", "B"]) == parse_blend(["0.3 A 7 B"]) == [("A", 0.3), ("B", 7.0)]
    for bad in (["0.3", "A", "B"], ["A", "1"], ["1", "2", "A"], ["0", "A"], ["-1", "A"], ["nan", "A"], ["inf", "A"]):
        with pytest.raises(ConfigError, match="weight"):
            parse_blend(bad)


def test_file_names_with_spaces(tmp_path):
    (tmp_path / "my text.txt").write_text("hello\n" * 9)
    assert len(_load(str(tmp_path / "my text.txt"))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt is no file"),
        ("none.jsonl", None, "none.jsonl is no file"),
        ("none", None, "none does not exist; give FILE.txt"),
        ("a.md", b"x", "a.md is not FILE.txt, FILE.jsonl"),
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\n ", "a.txt holds no text"),
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 at byte 2"),
        ("a.jsonl", b"", "a.jsonl holds no tokens"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', "a.jsonl:3: a line must be a JSON object"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "a.jsonl:1: no key 'text'; the line has body, id; set json_key"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: 'text' is int, not a text"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: not JSON"),
        ("a.bin", b"xx", "a.idx cannot be read"),
    ],
)
def test_unusable_entries(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        _load(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lone_surrogates_become_question_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n' * 2)
    (source,) = _load(str(tmp_path / "a.jsonl"), split="1")
    assert _documents(source, 0)[0] == "a?b"


def test_unigram_entropy():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0.0, 1.0])) == 0
    assert unigram_entropy(np.array([3, 1])) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
