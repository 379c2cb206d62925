"""Resharding: the same numbers in the chunks that the other mesh wants, one array at a time, whole or not at all."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from megajax import cli, reshard, train
from megajax.checkpoint import CheckpointStore, inspect, read_config
from megajax.config import CheckpointConfig, ConfigError, ParallelConfig
from megajax.models.registry import FAMILIES
from megajax.training.setup import build_program

FLAGS = (
    "--num-layers 4 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 16"
    " --tokenizer null:21 --make-vocab-size-divisible-by 32 --micro-batch-size 1 --global-batch-size 8 --lr 0.02"
    " --train-iters 4 --eval-interval 100 --eval-iters 1 --sample-tokens 0"
)


def run(folder: Path, name: str, flags: str = "") -> list[float]:
    """Trains in `folder / name` on the eight devices; the losses by step."""
    argv = [*shlex.split(FLAGS), "--data", str(folder / "numbers.txt"), "--run-dir", str(folder / name)]
    assert train.main([*argv, *shlex.split(flags)]) == 0
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megajax.reshard", *words]


def stored(folder: Path, name: str) -> Any:
    """The array as TensorStore opens it, which knows nothing of this package."""
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}", "path": name.replace("/", ".") + "/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `half`, a run of four steps that has stopped after two, and the text it reads."""
    folder = tmp_path_factory.mktemp("runs")
    numbers = [" ".join(str((i + j * j) % 20) for j in range(12)) for i in range(300)]
    (folder / "numbers.txt").write_text("\n".join(numbers))
    run(folder, "half", "--exit-interval 2")
    run(folder, "mixed", "--exit-interval 2 --bf16")
    return folder


def test_a_run_goes_on_from_the_copy(folder, tmp_path, capsys):
    copy = tmp_path / "new" / "copy"
    reshard.main([str(folder / "half"), str(copy), "--mesh", "tp=2,dp=4", "--zero", "3"])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith(f"{copy}: step 2, ")
    assert first.endswith(" GB, in chunks for dp=4 tp=2")
    assert second == f"use it with --load {copy}"
    going_on = run(folder, "on", f"--load {copy} --tp 2 --zero 3")
    np.testing.assert_allclose(going_on, run(folder, "whole")[2:], rtol=2e-5)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]  # nothing temporary stays
    assert read_config(copy)["parallel"]["zero"] == 3
    assert read_config(copy)["devices"] == 8


@pytest.mark.parametrize(
    ("words", "parallel", "source"),
    [
        ("--mesh zero=0,dp=8", ParallelConfig(zero=0), "half"),
        ("--dp 8 --zero 3", ParallelConfig(zero=3), "half"),
        ("--dp 8", ParallelConfig(), "mixed"),
        (
            "--mesh dp=8 --zero 1 --num-distributed-optimizer-instances 2",
            ParallelConfig(num_distributed_optimizer_instances=2),
            "half",
        ),
        ("--tp 4 --dp 2", ParallelConfig(tensor_model_parallel_size=4), "half"),
        ("--mesh tp=2,cp=2 --dp 2", ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2), "half"),
        (
            "--mesh tp=2,pp=2 --dp 2 --pipeline-model-parallel-layout Et|tttL",
            ParallelConfig(
                tensor_model_parallel_size=2,
                pipeline_model_parallel_size=2,
                pipeline_model_parallel_layout="Et|tttL",
            ),
            "half",
        ),
        ("--pp 4 --dp 2", ParallelConfig(pipeline_model_parallel_size=4), "half"),
    ],
)
def test_chunks_are_the_parts_of_the_devices(words, parallel, source, folder, tmp_path):
    """What the trainer's own program on eight devices would read; the values are the same."""
    reshard.main([str(folder / source), str(tmp_path / "copy"), *shlex.split(words)])
    before, after = (path / "step_00000002" for path in (folder / source / "checkpoints", tmp_path / "copy"))
    config = cli.from_json(json.loads((folder / source / "config.json").read_text()), families=FAMILIES)
    program = build_program(dataclasses.replace(config, parallel=parallel), FAMILIES["gpt"], devices=jax.devices())
    wanted = program.stages.abstract_stored(program.abstract_state)
    leaves, divided = jax.tree_util.tree_leaves_with_path(wanted), 0
    assert {path.name for path in after.iterdir()} >= {"config.json", "extras.json", "tree.json", "integrity.json"}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        copy, original = stored(after, name), stored(before, name).read().result()
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert (copy.chunk_layout.read_chunk.shape or ()) == tuple(map(min, zip(shard, copy.shape, strict=True))), name
        np.testing.assert_array_equal(copy.read().result(), original, err_msg=name)
        divided += shard != leaf.shape
    assert divided > 6 or parallel.zero == 0
    assert (after / "extras.json").read_text() == (before / "extras.json").read_text()


def test_weights_only_in_another_dtype(folder, tmp_path):
    reshard.main([str(folder / "half" / "checkpoints"), str(tmp_path / "w"), "--weights-only", "--dtype", "bf16"])
    rows = inspect(tmp_path / "w")
    before = {row.path for row in inspect(folder / "half" / "checkpoints") if row.path.startswith("params/")}
    assert {row.path for row in rows} == before
    assert {row.dtype for row in rows} == {"bfloat16"}
    name = "params/decoder/layers/mlp/linear_fc1/kernel"
    old, new = (stored(path / "step_00000002", name) for path in (folder / "half" / "checkpoints", tmp_path / "w"))
    assert old.chunk_layout.read_chunk.shape == new.chunk_layout.read_chunk.shape  # no mesh asked for
    np.testing.assert_array_equal(new.read().result(), old.read().result().astype(ml_dtypes.bfloat16))
    run(folder, "tuned", f"--finetune --load {tmp_path / 'w'} --exit-interval 1")
    with pytest.raises(ConfigError, match="take only the weights: --finetune --load"):
        run(folder, "other", f"--load {tmp_path / 'w'}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("half new", "nothing to change: give --mesh"),
        ("half numbers.txt --tp 2", "numbers.txt: exists already; give a new folder"),
        ("none new --tp 2", "none: no such folder"),
        ("half new --tp 2 --step 7", "has no step 7; it has 2"),
        ("half/checkpoints/step_00000002 new --tp 2 --step 7", "--step 7 is not the step of"),
        ("half new --tp 3", "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3"),
        ("half new --pp 3", "not divisible by"),
        (
            "half new --mesh tp=two",
            "--mesh tp=two: argument --tensor-model-parallel-size/--tp: invalid int value: 'two'",
        ),
        ("half new --mesh tq=2", "--mesh tq=2: unrecognized arguments: --tq=2"),
        ("half new --mesh tp=2 --tp 4", "says tensor_model_parallel_size=2 and a flag 4; drop one"),
        ("half new --dp 3 --num-distributed-optimizer-instances 2", "dp=3 must be a multiple of the 2"),
        ("half new --dp 0", "dp=0 must be"),
        ("half new --vpp 2", "num_virtual_stages_per_pipeline_rank=2 has no effect"),
        ("half new --dtype int8", "--dtype: invalid choice"),
        ("half", "required: DST"),
        ("damaged new --tp 2", "is damaged, tree.json"),
        ("half half/file/new --tp 2", "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(words, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if not Path("damaged").exists():
        shutil.copytree("half/checkpoints", "damaged")
        Path("damaged/step_00000002/tree.json").write_text("{}")
        Path("half/file").touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        reshard.main(shlex.split(words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


ARRAYS, LARGEST = 24, 16 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is 24 times as large as its largest array."""
    folder = tmp_path_factory.mktemp("large")
    weight, axes = jax.numpy.ones((4, 1024, LARGEST >> 14), np.float32), ("layers", "embed", "mlp")
    names = [f"weight_{i}" for i in range(ARRAYS)]
    config = cli.to_json(FAMILIES["gpt"].default)["model"] | {"vocab_size": 256}
    with CheckpointStore.open(
        folder,
        CheckpointConfig(async_save=False),
        family="gpt",
        model_config=config,
        logical_axes={"params": dict.fromkeys(names, axes)},
    ) as store:
        store.save(1, {"params": dict.fromkeys(names, weight)}, {})
    return folder


MEASURE = """
import sys
from pathlib import Path
from megajax import reshard

def peak():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

small, large, target = sys.argv[1:]
reshard.main([small, target + "-small", "--mesh", "tp=2,dp=2"])  # loads what it needs
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
reshard.main([large, target, "--mesh", "tp=2,dp=2,zero=3"])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_bounded_by_the_largest_array(folder, large, tmp_path, program_env):
    words = [str(folder / "half"), str(large), str(tmp_path / "copy")]
    # Freed memory goes back at once, so that the peak counts what is used and not what glibc keeps for later.
    env = program_env | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.splitlines()[-1]) / LARGEST
    print(f"peak: {growth:.1f} times the largest of {ARRAYS} arrays")
    assert growth < 6 < ARRAYS / 3


def test_a_full_disk_is_one_line(large, tmp_path, program_env, said):
    """Files may not grow beyond 4 MiB, which fails as a disk without room does."""
    limited = f"ulimit -f 4096; exec {shlex.join(command(str(large), str(tmp_path / 'copy'), '--tp', '2'))}"
    done = subprocess.run(["bash", "-c", limited], env=program_env, capture_output=True, text=True, check=False)
    message = f"error: cannot write {tmp_path / 'copy'}: file too large; make room there, or give another folder\n"
    assert (done.returncode, done.stdout, said(done.stderr)) == (2, "", message)
    assert list(tmp_path.iterdir()) == []


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(reshard.time, "monotonic", iter([0.0, 4.0, 12.0, 13.0]).__next__)
    with reshard.Progress(3_000_000_000) as progress:
        for name in ("one", "two", "three"):
            progress.add(name, 600_000_000)
    assert capsys.readouterr().err == " 40.0% of 3 GB, 100 MB/s, two\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_there_is_no_target(number, large, tmp_path, program_env, said):
    words = command(str(large), str(tmp_path / "copy"), "--tp", "2")
    # A suite that a shell runs in the background has SIGINT ignored, and its children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, env=program_env, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".copy.*.tmp/step_00000001/d/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # on a busy machine it could be done before it hears of the signal
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if (tmp_path / "copy").exists():
            pytest.skip("it was done before it could be stopped")
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not (tmp_path / "copy").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert (process.returncode, said(errors)) == (130, "interrupted\n")
        assert list(tmp_path.iterdir()) == []
