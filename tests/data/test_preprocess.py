"""The preprocessing program end to end: the same files from any number of workers, nothing after an error."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
import os
import pathlib
import pty
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megajax.config import DataConfig
from megajax.data import preprocess
from megajax.data.build import build_datasets
from megajax.data.indexed_dataset import IndexedDataset
from megajax.data.tokenizers import ByteTokenizer


def _corpus(path: pathlib.Path, documents: int = 400) -> list[dict[str, str]]:
    rng = random.Random(0)
    records = [
        {"text": "".join(rng.choices("abcdefgh é🙂\n", k=rng.randrange(0, 60))), "title": f"t{i}" * (i % 3)}
        for i in range(documents)
    ]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)) + "\n")
    return records


def _run(*arguments: object, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megajax.data.preprocess", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(preprocess.__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_workers_write_equal_files(tmp_path):
    records = _corpus(tmp_path / "in.jsonl", 40_000)
    for workers in (1, 2):
        run = _run(
            *("--input", "in.jsonl", "--output-prefix", f"out/w{workers}", "--json-keys", "text", "title"),
            *("--append-eod", "--workers", workers),
            cwd=tmp_path,
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert len(run.stdout.splitlines()) == 2
    for key in ("text", "title"):
        expected = [[*record[key].encode(), 256] for record in records if record[key]]
        dataset = IndexedDataset(tmp_path / f"out/w1_{key}_document")
        assert dataset.dtype == np.uint16
        assert [sequence.tolist() for sequence in dataset[:]] == expected
        assert dataset.document_indices.tolist() == list(range(len(expected) + 1))
        counted = f"out/w2_{key}_document.bin/.idx: {len(expected):,} documents, {sum(map(len, expected)):,} tokens"
        assert counted in run.stdout
        for suffix in (".bin", ".idx"):
            files = [tmp_path / f"out/w{workers}_{key}_document{suffix}" for workers in (1, 2)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_batches_keep_order_and_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "BATCH_BYTES", 100)
    _corpus(tmp_path / "a.jsonl", 50)
    (tmp_path / "b.jsonl").write_text('{"text": "last"}')
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    batches = list(preprocess.read_batches(paths))
    assert len(batches) > 10
    for path in paths:
        lines = [line for batch in batches if batch.path == path for line in batch.lines]
        assert b"".join(lines) == pathlib.Path(path).read_bytes()
    assert batches[-1] == preprocess.Lines(paths[1], 1, [b'{"text": "last"}'])
    assert batches[1].first == 1 + len(batches[0].lines)


def test_trainer_reads_what_was_written(tmp_path):
    _corpus(tmp_path / "in.jsonl")
    assert preprocess.main(["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "c")]) == 0
    config = DataConfig(data=(str(tmp_path / "c_text_document"),), seq_length=32)
    datasets = build_datasets(
        config, ByteTokenizer(), train_samples=10, validation_samples=None, test_samples=None, seed=1
    )
    assert datasets.train[9]["tokens"].shape == (32,)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b'{"text": "a"}\nnonsense\n', [], "in.jsonl:2: not JSON"),
        (b'{"text": "a"}\n\n{"text": 1}\n', [], "in.jsonl:3: 'text' is int, not a text"),
        (b'{"text": "1 2"}\n{"text": "x"}\n', ["--tokenizer", "null:9"], "in.jsonl:2: tokenizer='null:9' reads ids"),
        (b'{"text": "a"}\n', ["--json-keys", "body"], "in.jsonl:1: no key 'body'"),
        (b'{"text": ""}\n', [], "has no text under 'text'"),
        (b"", [], "has no text under 'text'"),
        (b"x", ["--tokenizer", "nowhere.json"], "tokenizer='nowhere.json' is no file"),
        (None, [], "in.jsonl is no file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, content, arguments, message):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    command = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out/x"), *arguments]
    assert preprocess.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_mistakes_in_a_worker_are_one_line(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n{"text": oops}\n')
    run = _run("--input", "in.jsonl", "--output-prefix", "out/x", "--workers", 2, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr == "error: in.jsonl:2: not JSON: Expecting value: line 1 column 10 (char 9)\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["--input", "x"], ["--input", "x", "--output-prefix", "y", "--workers", "0"], ["--inputs", "x"]]
)
def test_wrong_flags_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        preprocess.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_progress_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    progress = preprocess.Progress(100, 1)
    progress.add(5, 50)
    progress.clear()
    assert capsys.readouterr().err == ""
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = preprocess.Progress(100, 10)
        progress.add(5, 20)
        progress.add(5, 30)
        progress.clear()
        shown = os.read(leader, 1000).decode()
    os.close(leader)
    assert shown.startswith("\r\x1b[K 50.0%  10 documents")
    assert shown.endswith("\r\x1b[K")


def test_interrupt_leaves_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # an input that never ends
    code = "import sys; from megajax.data import preprocess as p; p.os.path.isfile = lambda _: True; sys.exit(p.main())"
    command = [sys.executable, "-c", code, "--input", "pipe", "--output-prefix", "out/x"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(preprocess.__file__).parents[2])}
    # A suite that a shell runs in the background has SIGINT ignored, and its children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    with open(tmp_path / "pipe", "wb") as pipe:
        pipe.write(b'{"text": "a"}\n')
        pipe.flush()
        deadline = time.monotonic() + 60
        while not (tmp_path / "out").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert error == "error: interrupted; nothing was written\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_starts_without_jax():
    """Every worker imports the module anew, so it must be light."""
    code = "import sys, megajax.data.preprocess; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(preprocess.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
