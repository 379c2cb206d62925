"""Mistakes of a user, each through the whole program: one line that names the thing and the fix, exit code 2, and
every file as it was before."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megajax import cli
from megajax.data.indexed_dataset import IndexedDatasetBuilder
from megajax.train import main
from megajax.training import metrics

# flags after the tiny run's own ({d}: the test's folder) -> what the one line must hold, the fix among it.
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    # the command line
    "unknown flag": ("--hiden-size 32", ("--hiden-size", "did you mean --hidden-size")),
    "wrong type": ("--num-layers two", ("--num-layers two", "expected")),
    "fraction for a count": ("--train-iters 2.5", ("--train-iters 2.5", "expected")),
    "no value": ("--lr", ("--lr", "needs a value")),
    "unknown model": ("--model gtp", ("--model gtp", "there is gpt")),
    "unknown preset": ("--preset llama3-9b", ("--preset llama3-9b", "did you mean llama3-8b")),
    "unknown optimizer": ("--optimizer adamw", ("--optimizer adamw", "adam")),
    "missing config file": ("--config {d}/none.json", ("{d}/none.json cannot be read",)),
    "fp16 and bf16": ("--fp16 --bf16", ("--bf16", "--fp16", "set one of them")),
    "nothing to finetune": ("--finetune", ("--finetune=True", "needs --load=FOLDER")),
    "no steps": ("--train-iters 0", ("--train-iters=0", "must be greater than 0")),
    # sizes
    "heads": ("--num-attention-heads 3", ("--hidden-size=16", "--num-attention-heads=3", "change one")),
    "groups": ("--num-query-groups 4", ("--num-query-groups=4", "change one")),
    "heads over shards": ("--tp 4", ("num_attention_heads=2", "tensor_model_parallel_size=4", "change one")),
    "more shards than devices": (
        "--tp 16 --num-attention-heads 16 --kv-channels 2 --vocab-size 32",
        ("tensor_model_parallel_size=16", "8 devices", "choose"),
    ),
    "ring in branches": (
        "--pp 2 --cp 2 --pipeline-schedule zb-h1",
        ("--cp-comm-type='p2p'", "--pipeline-schedule='zb-h1'", "use a2a or all_gather"),
    ),
    "schedule of the other engine": (
        "--pp 2 --pipeline-schedule gpipe --pipeline-engine lockstep",
        ("--pipeline-schedule='gpipe'", "needs --pipeline-engine='table'"),
    ),
    "chunks of zb-h1": (
        "--pp 2 --vpp 2 --num-layers 4 --pipeline-schedule zb-h1",
        ("num_virtual_stages_per_pipeline_rank=2", "zb-h1 takes one chunk a stage", "use 1f1b"),
    ),
    "groups smaller than the pipeline": (
        "--pp 2 --num-layers 2 --pipeline-engine table --microbatch-group-size-per-vp-stage 1",
        ("microbatch_group_size_per_vp_stage=1", "at least the 2 stages"),
    ),
    "global batch": ("--global-batch-size 17", ("global_batch_size=17", "16", "use 16 or 32")),
    "ramp": (
        "--global-batch-size 64 --rampup-batch-size 16 32 100",
        ("rampup_batch_size", "16", "64", "choose an increment"),
    ),
    "sequence beyond positions": (
        "--position-embedding-type learned_absolute --max-sequence-length 8",
        ("seq_length=16", "max_sequence_length=8", "change one"),
    ),
    "small vocabulary": ("--vocab-size 10", ("vocab_size=10", "24", "raise it")),
    "long prompt": (
        "--sample-tokens 4 --sample-prompt '1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1'",
        ("sample_prompt", "16 tokens", "seq_length=16", "shorten it"),
    ),
    "prompt for another tokenizer": (
        "--sample-tokens 4 --sample-prompt 'Once upon'",
        ("sample_prompt='Once upon'", "null:24", "reads ids below 24"),
    ),
    # schedules
    "WSD without its decay": ("--lr-decay-style WSD", ("--lr-decay-style='WSD'", "needs --lr-wsd-decay-iters")),
    "least above largest": ("--min-lr 1", ("--min-lr=1.0", "between 0 and --lr=0.02")),
    "warm-up longer than decay": (
        "--lr-warmup-iters 8 --lr-decay-iters 5",
        ("warms up over 128 samples", "ends at 80", "shorten lr_warmup_iters"),
    ),
    "profile backwards": (
        "--profile-step-start 5 --profile-step-end 5",
        ("profile_step_end=5", "profile_step_start=5", "change one"),
    ),
    # data
    "missing data": ("--data {d}/none.txt", ("data={d}/none.txt", "check the path")),
    "missing prefix": ("--data {d}/none", ("data={d}/none", "does not exist", "give")),
    "folder as data": ("--data {d}/folder", ("data={d}/folder", "FILE.txt, FILE.jsonl, or PREFIX")),
    "empty text": ("--data {d}/empty.txt", ("data={d}/empty.txt", "no text")),
    "text too short": ("--data {d}/short.txt", ("3 tokens", "seq_length=16", "give more data")),
    "not UTF-8": ("--data {d}/latin.txt", ("data={d}/latin.txt", "UTF-8", "convert it")),
    "corrupt index": ("--data {d}/index", ("{d}/index.idx", "not a Megatron index", "make it with")),
    "truncated index": ("--data {d}/cut_index", ("{d}/cut_index.idx", "cut short", "copy it again")),
    "truncated tokens": ("--data {d}/tokens", ("{d}/tokens.bin", "cut short", "copy it again")),
    "no index": ("--data {d}/only_bin", ("{d}/only_bin.idx",)),
    "foreign ids": ("--data {d}/ids", ("data={d}/ids", "token id 99", "vocab_size=24", "name the tokenizer")),
    "not JSON": ("--data {d}/bad.jsonl", ("{d}/bad.jsonl:2", "not JSON")),
    "no such key": ("--data {d}/key.jsonl", ("{d}/key.jsonl:1", "no key 'text'", "set json_key")),
    "bad split": ("--split 90,x", ("--split='90,x'", "must be", "969,30,1")),
    "zero weight": ("--data 0 {d}/numbers.txt", ("data=", "the weight 0", "must be above 0")),
    "one weight of two": (
        "--data 0.3 {d}/numbers.txt {d}/numbers.txt",
        ("data=", "must give every data set a weight"),
    ),
    "no room for the index cache": ("--data-cache-path {d}/file/cache", ("{d}/file/cache", "choose a folder")),
    # tokenizers
    "missing tokenizer": ("--tokenizer {d}/none.json", ("tokenizer='{d}/none.json'", "give byte")),
    "corrupt tokenizer": ("--tokenizer {d}/tokenizer.json", ("tokenizer='{d}/tokenizer.json'", "tokenizer.json")),
    "unknown tokenizer": ("--tokenizer gpt2", ("tokenizer='gpt2'", "give byte")),
    # checkpoints
    "load nothing": ("--load {d}/none", ("{d}/none", "no such folder", "give the folder")),
    "load no checkpoint": ("--load {d}/folder", ("{d}/folder", "no checkpoint", "give the folder")),
    "load one level too high": ("--load {d}/run", ("{d}/run", "did you mean {d}/run/checkpoints")),
    "load a file": ("--load {d}/file", ("{d}/file", "not a directory", "give another folder")),
    "load another model": (
        "--load {d}/run/checkpoints --hidden-size 32 --ffn-hidden-size 32",
        ("{d}/run/checkpoints", "hidden_size=16 there, 32 here", "use its settings"),
    ),
    "load a damaged file": ("--load {d}/damaged", ("{d}/damaged/step_00000002", "is damaged", "start anew")),
    "run folder of another model": (
        "--run-dir {d}/run --num-layers 2",
        ("{d}/run/checkpoints", "num_layers=1 there, 2 here", "another folder"),
    ),
    "run folder of another optimizer": (
        "--run-dir {d}/run --optimizer sgd",
        ("{d}/run/checkpoints", "opt_state", "same optimizer", "--finetune"),
    ),
    # where the run goes
    "run folder is a file": ("--run-dir {d}/file", ("{d}/file", "not a directory", "give another folder")),
    "run folder below a file": ("--run-dir {d}/file/run", ("{d}/file/run", "not a directory", "give another")),
    "no permission": ("--run-dir /proc/run", ("/proc/run", "give another folder")),
    "save where nobody may": ("--save /proc/checkpoints", ("save=/proc/checkpoints", "give another folder")),
    "no TensorBoard": ("--tensorboard-dir {d}/tb", ("tensorboard_dir={d}/tb", "pip install 'megajax[tensorboard]'")),
    "no W&B": ("--wandb-project p", ("wandb_project=p", "pip install 'megajax[wandb]'")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_in: Any) -> Path:
    """A run of two steps."""
    return tiny_in(tmp_path_factory.mktemp("trained")).train("run", "--train-iters 2")


def _lay_out(d: Path, trained: Path) -> None:
    """Every file that the table speaks of."""
    shutil.copytree(trained, d / "run")
    shutil.copytree(trained / "checkpoints", d / "damaged")
    step = d / "damaged" / "step_00000002"
    victim = max((path for path in step.rglob("*") if path.is_file() and "/d/" in str(path)), key=os.path.getsize)
    victim.write_bytes(victim.read_bytes()[:-7] + b"garbage")
    (d / "folder").mkdir()
    (d / "file").write_text("a file")
    (d / "empty.txt").write_text(" \n")
    (d / "short.txt").write_text("1 2\n")
    (d / "latin.txt").write_bytes("1 2 é".encode("latin-1"))
    (d / "bad.jsonl").write_text('{"text": "1 2 3"}\n{"text": \n')
    (d / "key.jsonl").write_text('{"content": "1 2 3"}\n')
    (d / "tokenizer.json").write_text('{"model": 1}')
    for name, ids in {"index": [1], "cut_index": [1], "tokens": [1, 2], "ids": [1, 99], "only_bin": [1]}.items():
        with IndexedDatasetBuilder(d / name, dtype=np.uint16) as builder:
            for _ in range(40):
                builder.add_document(ids, [len(ids)])
            builder.finalize()
    (d / "index.idx").write_bytes(b"nonsense" * 20)
    (d / "cut_index.idx").write_bytes((d / "cut_index.idx").read_bytes()[:100])
    (d / "tokens.bin").write_bytes((d / "tokens.bin").read_bytes()[:-5])
    (d / "only_bin.idx").unlink()


def _everything(folder: Path) -> dict[str, bytes | None]:
    """Content of every file (None for a folder) below; a lock only says who looked last."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.fixture
def error_of(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], str]:
    """Runs the program; checks that it ends with exit code 2 and one line, and returns that."""

    def run(argv: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.run_main(main)
        captured = capfd.readouterr()
        assert caught.value.code == 2, captured
        assert captured.err.startswith("error: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.endswith("\n")
        return captured.err

    return run


@pytest.mark.parametrize("case", TABLE)
def test_a_mistake_is_one_line_and_changes_nothing(case, tiny, trained, error_of):
    flags, words = TABLE[case]
    folder = tiny.text.parent
    _lay_out(folder, trained)
    before = _everything(folder)
    error = error_of(tiny.argv("new", flags.format(d=shlex.quote(str(folder)))))
    assert not [word for word in words if word.format(d=folder) not in error], error
    assert _everything(folder) == before


def test_the_table_is_long():
    assert len(TABLE) >= 50


class _FullDisk:
    """A file on a disk that has room for `room` bytes more."""

    def __init__(self, file: Any, room: int):
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._file.write(bytes(data)[: self._room])
        self._room -= written
        return written

    def close(self) -> None:
        self._file.close()


def _fill_up(monkeypatch: pytest.MonkeyPatch, *, room: int) -> None:
    """metrics.jsonl lies on a disk that is full after `room` bytes."""
    original = metrics.JsonLines.__init__

    def init(self: metrics.JsonLines, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._file = _FullDisk(self._file, room)  # type: ignore[assignment]

    monkeypatch.setattr(metrics.JsonLines, "__init__", init)


@pytest.mark.usefixtures("one_device")
def test_full_disk_under_the_metrics(tiny, error_of, monkeypatch, read_saved):
    """The run ends with one line; its checkpoints are good, and it goes on where they stand once there is room."""
    flags = "--train-iters 4 --save-interval 2"
    with monkeypatch.context() as patched:
        _fill_up(patched, room=820)
        error = error_of(tiny.argv("run", flags))
    run_dir = tiny.text.with_name("run")
    assert f"cannot write {run_dir}/metrics.jsonl: the disk is full; make room there" in error
    assert read_saved(run_dir)[0] == 2
    assert not (run_dir / "metrics.jsonl").read_text().endswith("\n")
    tiny.train("run", flags)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.usefixtures("one_device")
def test_full_disk_under_config_json(tiny, error_of, monkeypatch):
    original = Path.write_text

    def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
        if "config.json" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    error = error_of(tiny.argv("run", "--train-iters 1"))
    run_dir = tiny.text.with_name("run")
    assert f"cannot write {run_dir}/config.json: the disk is full; make room there" in error
    assert [path.name for path in run_dir.iterdir()] == ["checkpoints"]


@pytest.mark.usefixtures("one_device")
def test_full_disk_under_the_index_cache(tiny, error_of, monkeypatch):
    """Whichever of the arrays no longer fits, the cache and the run's folder are as if nothing had run."""
    cache, original = tiny.text.with_name("cache"), np.save
    for room in range(3):
        saved = 0

        def save(path: Path, array: Any, room: int = room) -> None:
            nonlocal saved
            if saved == room:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            saved += 1
            original(path, array)

        with monkeypatch.context() as patched:
            patched.setattr(np, "save", save)
            error = error_of(tiny.argv("run", f"--train-iters 1 --data-cache-path {cache}"))
        assert f"cannot write {cache}/gpt-" in error
        assert "the disk is full; make room there" in error
        assert [path.name for path in tiny.text.parent.iterdir()] == [tiny.text.name]
    tiny.train("run", f"--train-iters 1 --data-cache-path {cache}")


@pytest.mark.usefixtures("one_device")
def test_full_disk_when_the_checkpoints_are_opened(tiny, error_of, monkeypatch):
    class Full:
        def __init__(self, **_: Any):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megajax.checkpoint.files.tempfile.NamedTemporaryFile", Full)
    error = error_of(tiny.argv("run", "--train-iters 1"))
    run_dir = tiny.text.with_name("run")
    assert f"save={run_dir}/checkpoints: cannot write there (the disk is full)" in error
    assert not run_dir.exists()


@pytest.mark.usefixtures("one_device")
def test_full_disk_under_a_checkpoint(tiny, error_of, monkeypatch, read_saved):
    """An older checkpoint survives a save that fails."""
    run_dir = tiny.train("run", "--train-iters 2")
    with monkeypatch.context() as patched:

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr("megajax.checkpoint.files.write_integrity", full)
        error = error_of(tiny.argv("run", "--train-iters 4 --save-interval 1"))
    assert f"{run_dir}/checkpoints: step 3 was not saved (the disk is full); step 2 is intact; make room" in error
    step, state = read_saved(run_dir)
    assert (step, state["step"]) == (2, 2)
