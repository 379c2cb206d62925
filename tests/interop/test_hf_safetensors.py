"""Safetensors files against the format's own library; damaged, sharded and interrupted checkpoints."""

# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megajax.config import ConfigError
from megajax.interop import hf
from megajax.interop.hf_safetensors import LazyTensor, tensor_table, write_checkpoint

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3, dtype=np.float16),
    "brain": np.arange(5, dtype=ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.arange(4, dtype=np.int64),
}


def lazy(tensors):
    return {name: LazyTensor(array.dtype, array.shape, lambda array=array: array) for name, array in tensors.items()}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_the_library_reads_what_is_written(tmp_path):
    write_checkpoint(tmp_path, lazy(TENSORS), {})
    assert_same(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same({name: entry.read() for name, entry in tensor_table(tmp_path).items()}, TENSORS)


def test_shards(tmp_path):
    write_checkpoint(tmp_path, lazy(TENSORS), {"a": 1}, max_shard_size=30)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) == 3
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert_same({name: entry.read() for name, entry in tensor_table(tmp_path).items()}, TENSORS)
    assert {file.name for file in tmp_path.iterdir()} == {*files, "model.safetensors.index.json", "config.json"}


def test_a_second_save_replaces_the_first_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_checkpoint(tmp_path, lazy(TENSORS), {"a": 1}, max_shard_size=30)
    write_checkpoint(tmp_path, lazy({"a": TENSORS["a"]}), {"a": 2})
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    write_checkpoint(tmp_path, lazy(TENSORS), {"a": 1})

    def fail():
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        write_checkpoint(tmp_path, lazy(TENSORS) | {"a": LazyTensor(np.dtype("f4"), (2, 3), fail)}, {"a": 2})
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert_same(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_checkpoint(tmp_path / "file", lazy(TENSORS), {})


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint that a test may damage."""
    target = tmp_path / "mistral"
    shutil.copytree(GOLDEN / "hf_options/mistral_window", target)
    assert len(list(target.glob("model-*.safetensors"))) > 1
    return target


def truncate(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])


def truncate_header(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:20])


def scramble_header(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"?" * 40 + data[48:])


def empty_file(folder):
    sorted(folder.glob("model-*.safetensors"))[0].write_bytes(b"")


def remove_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def climb_out(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    path.write_text(json.dumps(index))


def misplace(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "copy it again"),
        (truncate_header, "not a complete safetensors file"),
        (scramble_header, "damaged safetensors header"),
        (empty_file, "not a complete safetensors file"),
        (remove_shard, "cannot read"),
        (climb_out, "outside its folder"),
        (misplace, "lacks model.extra.weight"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "no safetensors index"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_damaged_checkpoints(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError) as error:
        hf.load(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_half_precision_files_keep_their_dtype(folder):
    for file in folder.glob("model-*.safetensors"):
        save_file({n: t.astype(ml_dtypes.bfloat16) for n, t in load_file(file).items()}, file)
    pretrained = hf.load(folder)
    assert pretrained.config.params_dtype == "bfloat16"
    assert str(pretrained.params["decoder"]["final_layernorm"]["scale"].dtype) == "bfloat16"
    hf.save(pretrained, folder.parent / "out", max_shard_size=10_000)
    before, after = tensor_table(folder), tensor_table(folder.parent / "out")
    assert_same({n: e.read() for n, e in after.items()}, {n: e.read() for n, e in before.items()})


def test_files_of_several_dtypes_become_float32(folder):
    file = sorted(folder.glob("model-*.safetensors"))[0]
    save_file({n: t.astype(np.float16) for n, t in load_file(file).items()}, file)
    assert hf.load(folder).config.params_dtype == "float32"


def test_buffers_are_ignored(folder):
    tensors = {name: entry.read() for name, entry in tensor_table(folder).items()}
    for file in folder.glob("model*"):
        file.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    hf.load(folder)
    tensors["model.layers.0.self_attn.rotary_embed"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"holds model\.layers\.0\.self_attn\.rotary_embed"):
        hf.load(folder)
