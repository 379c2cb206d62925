"""Tokenizers agree with the packages that define their files, and say in one line what is wrong with a file."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import io
import json
import sys

import pytest

from megajax.config import ConfigError
from megajax.data.tokenizers import (
    CL100K_PATTERN,
    MEGATRON_PATTERN_V2,
    ByteTokenizer,
    MegatronTikTokenizer,
    build_tokenizer,
)

TEXTS = [
    "Hello, world!  It's 12345 o'clock.\n\nTwo  spaces.",
    "naïve café — 日本語 🙂",
    "",
    " \n\t ",
    "def f(x):\n    return x\n",
]
CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", *TEXTS] * 20


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=320, byte_fallback=True, minloglevel=2
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def _ranks() -> dict[bytes, int]:
    extra = [b"th", b"the", b" the", b"in", b"ow", b"qu", b"  ", b"12", b"345"]
    return {token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + extra)}


@pytest.fixture(scope="module")
def tiktoken_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiktoken") / "mine.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in _ranks().items()))
    return path


@pytest.fixture(scope="module")
def megatron_json_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("megatron") / "vocab.json"
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin1")}
        for token, rank in _ranks().items()
    ]
    path.write_text(json.dumps(entries))
    return path


def test_bytes():
    tokenizer = build_tokenizer("byte")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod) == ("byte", 257, 256)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize([*tokenizer.tokenize(text), 256]) == text
    assert ByteTokenizer().detokenize([0xFF, 65]) == "\ufffdA"
    assert ByteTokenizer().tokenize("\ud800") == [ord("?")]


def test_null():
    tokenizer = build_tokenizer("null:100")
    assert (tokenizer.vocab_size, tokenizer.eod) == (100, 99)
    assert tokenizer.tokenize(" 3 14\n98 ") == [3, 14, 98]
    assert tokenizer.detokenize([3, 14, 99]) == "3 14"
    for bad in ("3 x", "100", "-1", "1.5", "²"):
        with pytest.raises(ConfigError, match="reads ids below 100"):
            tokenizer.tokenize(bad)


def test_hugging_face(hf_path):
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(hf_path))
    for spec in (str(hf_path), str(hf_path.parent)):
        tokenizer = build_tokenizer(spec)
        assert tokenizer.vocab_size == reference.get_vocab_size() == 360
        assert tokenizer.eod == 1
        for text in TEXTS:
            assert tokenizer.tokenize(text) == reference.encode(text).ids
            assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text


@pytest.mark.parametrize("eos", ["<pad>", {"content": "<pad>", "lstrip": False}])
def test_hugging_face_eod_from_its_config(hf_path, tmp_path, eos):
    (tmp_path / "tokenizer.json").write_bytes(hf_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert build_tokenizer(str(tmp_path)).eod == 0


def test_sentencepiece(sentencepiece_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    tokenizer = build_tokenizer(str(sentencepiece_path))
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert tokenizer.eod == reference.eos_id()
    for text in TEXTS:
        assert tokenizer.tokenize(text) == reference.encode(text)
        assert tokenizer.detokenize([*reference.encode(text), tokenizer.eod]) == reference.decode(
            reference.encode(text)
        )


@pytest.mark.parametrize("file_name", ["mine.tiktoken", "tokenizer.model"])
def test_tiktoken(tiktoken_path, tmp_path, file_name):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.Encoding("mine", pat_str=CL100K_PATTERN, mergeable_ranks=_ranks(), special_tokens={})
    (tmp_path / file_name).write_bytes(tiktoken_path.read_bytes())
    tokenizer = build_tokenizer(str(tmp_path / file_name))
    assert (tokenizer.eod, tokenizer.vocab_size) == (265, 266)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == reference.encode(text)
        assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text


def test_tiktoken_published_file_names(tiktoken_path, tmp_path):
    (tmp_path / "cl100k_base.tiktoken").write_bytes(tiktoken_path.read_bytes())
    tokenizer = build_tokenizer(str(tmp_path / "cl100k_base.tiktoken"))
    assert (tokenizer.eod, tokenizer.vocab_size) == (100257, 100258)


def test_megatron_tiktoken(megatron_json_path):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.Encoding("mine", pat_str=MEGATRON_PATTERN_V2, mergeable_ranks=_ranks(), special_tokens={})
    tokenizer = build_tokenizer(str(megatron_json_path))
    assert isinstance(tokenizer, MegatronTikTokenizer)
    assert (tokenizer.eod, tokenizer.vocab_size) == (2, 1265)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == [i + 1000 for i in reference.encode(text)]
        assert tokenizer.detokenize([*tokenizer.tokenize(text), 2]) == text


def test_names_follow_the_content(tiktoken_path, tmp_path):
    other = tmp_path / "mine.tiktoken"
    other.write_bytes(tiktoken_path.read_bytes())
    assert build_tokenizer(str(other)).name == build_tokenizer(str(tiktoken_path)).name
    other.write_bytes(tiktoken_path.read_bytes() + base64.b64encode(b"zz") + b" 265\n")
    assert build_tokenizer(str(other)).name != build_tokenizer(str(tiktoken_path)).name


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "is not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "is not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b'[{"rank": 0}]', "is not a JSON list of ranks"),
        ("tokenizer.json", b"[1, 2", "is not a JSON list of ranks"),
        ("tokenizer.model", b"not a model", "is neither a sentencepiece model nor a tiktoken file"),
        ("tokenizer.model", b"", "is neither a sentencepiece model nor a tiktoken file"),
        ("a.tiktoken", b"", "is empty"),
        ("a.tiktoken", b"QQ== 0\nnonsense\n", "line 2 is not 'BASE64 RANK'"),
        ("a.tiktoken", b"QQ== 0\n", "has no rank for the single byte 0"),
        ("vocab.bpe", b"a b c\n", "ends in '.bpe'"),
    ],
)
def test_damaged_files(tmp_path, file_name, content, message):
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        build_tokenizer(str(tmp_path / file_name))
    assert "\n" not in str(error.value)
    assert file_name in str(error.value)


@pytest.mark.parametrize("spec", ["nowhere/tokenizer.json", "bytes", "null:x", "null:1", "null:"])
def test_unknown_names(spec):
    with pytest.raises(ConfigError, match="tokenizer="):
        build_tokenizer(spec)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder without tokenizer\.json"):
        build_tokenizer(str(tmp_path))


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece", "tiktoken"])
def test_missing_package_names_the_extra(monkeypatch, package, hf_path, sentencepiece_path, tiktoken_path):
    paths = {"tokenizers": hf_path, "sentencepiece": sentencepiece_path, "tiktoken": tiktoken_path}
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'megajax\[tokenizers\]'"):
        build_tokenizer(str(paths[package]))
