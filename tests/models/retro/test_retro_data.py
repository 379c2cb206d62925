"""What is found for a chunk: the nearest by brute force, never its own text; and a run from end to end."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megajax import cli
from megajax.config import Config, ConfigError, DataConfig
from megajax.data.build import Datasets, Sizes
from megajax.data.tokenizers import build_tokenizer
from megajax.models.retro import retro_data
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.retrieval import NOTHING, ChunkDatabase
from megajax.train import main

M, SPAN = 8, 2
SIZES = Sizes(40, 6, None)
WORDS = ["apple", "pear", "plum", "fig", "date", "lime", "kiwi", "nut", "corn", "rice", "oat", "rye"]


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    """Texts of a few words, each in an order of its own, so that they resemble each other in parts."""
    rng = np.random.default_rng(seed)
    lines = [{"text": " ".join(rng.choice(WORDS, size=rng.integers(5, 30)))} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def build(data: tuple[str, ...], **options: Any) -> Datasets:
    model = RetroConfig(num_layers=6, hidden_size=16, num_attention_heads=2, retro_chunk_length=M)
    config = Config(
        model_family="retro",
        model=model.replace(**{k: v for k, v in options.items() if k.startswith("retro")}),
        data=DataConfig(
            data=data, seq_length=4 * M, split="80,20", **{k: v for k, v in options.items() if k.startswith("data")}
        ),
    )
    return retro_data.datasets(config, build_tokenizer("byte"), SIZES)


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[str, ...]:
    return (str(write_documents(tmp_path / "texts.jsonl", 30)),)


def test_neighbors_are_the_nearest_of_other_documents(corpus: tuple[str, ...]) -> None:
    train = build(corpus).train
    database = train.chunks.database
    embeddings = database.embed(database.tokens).astype(np.int64)
    for index in range(len(train)):
        found, banned = train.neighbors(index), set(train._own_documents(index))
        assert banned
        document = np.searchsorted(database.starts, np.arange(len(database.tokens)), side="right") - 1
        following = (np.arange(len(database.tokens)) + 1) % len(database.tokens)
        allowed = ~(np.isin(document, list(banned)) | np.isin(document[following], list(banned)))
        chunks = train.samples[index]["tokens"].reshape(-1, M)
        for chunk, neighbors in zip(chunks, found, strict=True):
            scores = np.where(allowed, embeddings @ database.embed(chunk[None])[0].astype(np.int64), -(1 << 40))
            best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:2]
            np.testing.assert_array_equal(neighbors, M * np.array(best))


def test_what_resembles_most_is_found() -> None:
    texts = ["the quick brown fox jumps", "entirely other words here", "a quick brown fox sleeps "]
    documents = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
    database = ChunkDatabase(documents, 25, pad=0)
    query = np.frombuffer(b"one quick brown fox waits", np.uint8)[None].astype(np.int64)
    assert set(database.search(query, 2, [[]])[0]) == {0, 50}
    assert database.search(query, 2, [[0]])[0].tolist() == [50, 25]
    np.testing.assert_array_equal(database.search(query, 3, [[0, 1, 2]])[0], [NOTHING] * 3)
    assert (database.read(np.array([NOTHING]), 50) == 0).all()
    np.testing.assert_array_equal(database.read(np.array([50]), 50)[0], np.concatenate([documents[2], documents[0]]))


def test_quotations_are_aligned(corpus: tuple[str, ...]) -> None:
    """By brute force over the places around each neighbour that was found."""
    plain, aligned = build(corpus).train, build(corpus, retro_align_neighbors=True).train
    database = plain.chunks.database
    flat, ends = database.tokens.ravel(), M * database.starts
    moved = 0
    for index in range(len(plain)):
        banned = set(plain._own_documents(index))
        for chunk, rows in zip(plain.samples[index]["tokens"].reshape(-1, M), aligned.neighbors(index), strict=True):
            own = [database._leading_into(document, SPAN + 1) for document in banned]
            scores = database.embed(chunk[None])[0] @ database.embed(database.tokens).T
            scores[np.concatenate(own)] = -np.inf
            for start in np.argsort(-scores, kind="stable")[:2] * M:
                document = np.searchsorted(ends, start, side="right")
                places = range(max(ends[document - 1], start - M + 1), min(ends[document] - M, start + M - 1) + 1)
                equal = {place: (flat[place : place + M] == chunk).sum() for place in places}
                best = min(places, key=lambda place: (-equal[place], abs(place - start), place))
                assert best in rows
                moved += best != start
                read = np.arange(best, best + SPAN * M) % len(flat) // M
                assert not set(np.searchsorted(database.starts, read, side="right") - 1) & banned
    assert moved > len(plain)


def test_a_quotation_begins_where_the_chunk_does() -> None:
    quoted = "what is said here is said elsewhere, too, and goes on"
    documents = [np.frombuffer(text.encode(), np.uint8) for text in ("some words. " + quoted, "nothing of the kind")]
    database = ChunkDatabase(documents, 16, pad=0)
    query = np.frombuffer(quoted.encode(), np.uint8)[None, :16]
    (place,) = database.search(query, 1, [[]], align=True)[0]
    assert bytes(database.read(np.array(place), 32).astype(np.uint8)).decode() == quoted[:32]


def test_samples_hold_neighbors_and_what_follows_them(corpus: tuple[str, ...]) -> None:
    splits = build(corpus)
    database = splits.train.chunks.database
    for split in (splits.train, splits.validation):
        sample, plain = split[1], split.samples[1]  # type: ignore[index, union-attr]
        assert sample["context_tokens"].shape == (4, 2, SPAN * M)
        assert sample["context_tokens"].dtype == np.int32
        assert all(np.array_equal(sample[name], value) for name, value in plain.items())
        first = split.neighbors(1)[0, 0]  # type: ignore[union-attr]
        wanted = database.tokens[[first // M, (first // M + 1) % len(database.tokens)]].ravel()
        np.testing.assert_array_equal(sample["context_tokens"][0, 0], wanted)
    text = {bytes(row.tolist()) for row in database.tokens.astype(np.uint8)}
    held_out = [splits.validation.samples.tokens.get(i) for i in splits.validation.samples.documents]  # type: ignore[union-attr]
    chunks = {bytes(t[i : i + M].tolist()) for t in held_out for i in range(0, len(t) - M, M)}
    assert chunks - text  # the database knows nothing of held-out documents


def test_blocks_cache_and_processes_change_nothing(corpus: tuple[str, ...], tmp_path: Path) -> None:
    plain = build(corpus).train
    cached = [build(corpus, data_cache_path=str(tmp_path / "cache"), retro_block_size=20).train for _ in range(2)]
    copy = pickle.loads(pickle.dumps(plain))
    for index in (39, 0, 17, 5):
        for other in (*cached, copy):
            np.testing.assert_array_equal(other[index]["context_tokens"], plain[index]["context_tokens"])
    entries = list((tmp_path / "cache").glob("neighbors-*"))
    assert len(entries) == len({index // 5 for index in (39, 0, 17, 5)})  # 20 chunks are 5 samples
    damaged = np.load(entries[0] / "neighbors.npy")
    np.save(entries[0] / "neighbors.npy", np.zeros_like(damaged))
    again = build(corpus, data_cache_path=str(tmp_path / "cache"), retro_block_size=20).train
    assert any((again.neighbors(index) == 0).all() for index in (39, 0, 17, 5))  # read, not searched for again


def test_a_blend_finds_in_all_of_its_documents(tmp_path: Path) -> None:
    data = tuple(str(write_documents(tmp_path / f"{seed}.jsonl", 20, seed)) for seed in (1, 2))
    train = build(("0.5", data[0], "0.5", data[1])).train
    database, sources = train.chunks.database, [build((name,)).train.chunks.database for name in data]
    assert len(database.tokens) == sum(len(source.tokens) for source in sources)
    border, seen = len(sources[0].tokens) * M, np.concatenate([train.neighbors(i).ravel() for i in range(len(train))])
    assert (seen < border).any() and (seen >= border).any()
    for index in range(len(train)):
        for document in train._own_documents(index):
            own = M * np.arange(database.starts[document], database.starts[document + 1])
            assert not np.isin(train.neighbors(index), own).any()


def test_one_document_has_no_others(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("some words\n" * 50)
    with pytest.raises(ConfigError, match=r"one\.txt: neighbors come from other documents.*<\|endoftext\|>"):
        build((str(tmp_path / "one.txt"),))


FLAGS = (
    "--model retro --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --micro-batch-size 2 --eval-iters 1"
    " --seq-length 32 --retro-chunk-length 8 --train-iters 2 --make-vocab-size-divisible-by 1 --sample-tokens 20"
)


LEARNED = "--position-embedding-type learned_absolute --no-retro-encoder-rotary --no-retro-cross-attention-rotary"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seq-length 36", "seq_length=36 is not a multiple of retro_chunk_length=8; change one of them"),
        ("--num-layers 4", "num_layers=4 leaves no layer that reads neighbors; give 6 or more"),
        ("--cp 2", "context_parallel_size=2: --model retro does not divide its sequences; set it to 1"),
        ("--pp 2", "pipeline_model_parallel_size=2"),
        ("--reset-attention-mask", "reset_attention_mask=True is not possible for --model retro"),
        (
            f"--max-sequence-length 31 {LEARNED}",
            "max_sequence_length=31 is less than the 32 tokens of a sequence",
        ),
        (
            f"--seq-length 8 --max-sequence-length 8 {LEARNED}",
            "max_sequence_length=8 is less than the 16 tokens",
        ),
        ("--retro-num-neighbors 0", "--retro-num-neighbors=0 must be greater than 0"),
        ("--vocab-size 5", "vocab_size=5 is less than the 257 ids"),
    ],
)
def test_mistakes_are_one_line(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    said: Callable[[str], str],
) -> None:
    run = ["--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train", *shlex.split(FLAGS), *run, *shlex.split(flags)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run_main(main)
    error = said(capfd.readouterr().err)
    assert caught.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_prints_what_retrieval_is_worth(tmp_path: Path, program_env: dict[str, str]) -> None:
    texts = write_documents(tmp_path / "texts.jsonl", 60)
    command = [sys.executable, "-m", "megajax.train", *shlex.split(FLAGS), "--data", str(texts), "--split", "80,10,10"]
    ran = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, env=program_env, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "with the neighbors that were found" in ran.stdout
    assert "sample, with retrieval:\nThe " in ran.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
