"""torch_dist checkpoint folders against one that Megatron wrote, and pickles that must not be obeyed."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError
from megajax.interop import megatron
from megajax.interop.megatron_args import settings_from_arguments
from megajax.interop.megatron_checkpoint import iteration_folder, read_settings, unstacked
from megajax.interop.megatron_config import transformer_config
from megajax.interop.megatron_pickle import METADATA_CLASSES, SETTINGS_CLASSES, read_common, restricted_load

CASE = Path(__file__).parents[1] / "golden" / "mcore_ckpt_llama"
MODEL = {"position_embedding_type": "rope", "vocab_size": 96}


def fields() -> dict[str, Any]:
    return json.loads((CASE / "config.json").read_text())["transformer_config"]


@pytest.mark.parametrize("path", [CASE, CASE / "iter_0000007"])
def test_checkpoint_equals_the_state_dict_it_was_made_from(path: Path) -> None:
    pytest.importorskip("torch")
    pretrained = megatron.load_checkpoint(path, "gpt", fields(), MODEL)
    expected = load_file(CASE / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


@pytest.mark.parametrize("layers_are_equal", [True, False])
def test_stacked_layers_and_experts_are_taken_apart(layers_are_equal: bool) -> None:
    """Megatron stacks experts, and layers that are all alike; these are its names of a router and of an expert."""
    layers = np.arange(48.0).reshape(2, 3, 4, 2)
    router = np.arange(12.0).reshape(2, 3, 2)
    if layers_are_equal:
        stored = {
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": layers,
            "decoder.layers.mlp.router.weight": router,
        }
    else:
        stored = {
            f"decoder.layers.{i}.mlp.{name}.weight": value[i]
            for name, value in (("experts.experts.linear_fc1", layers), ("router", router))
            for i in range(2)
        }
    tensors = unstacked(stored)
    assert len(tensors) == 2 * 3 + 2
    for i in range(2):
        np.testing.assert_array_equal(tensors[f"decoder.layers.{i}.mlp.router.weight"], router[i])
        for e in range(3):
            name = f"decoder.layers.{i}.mlp.experts.local_experts.{e}.linear_fc1.weight"
            np.testing.assert_array_equal(tensors[name], layers[i, e])


def test_without_torch_the_message_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from megajax.interop import megatron\n"
        f"megatron.load_checkpoint({str(CASE)!r}, config=dict(num_layers=2, hidden_size=32, num_attention_heads=4))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ConfigError" in run.stderr
    assert "needs torch; install it: pip install 'megajax[megatron]'" in run.stderr.splitlines()[-1]


class Attack:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("allowed", [METADATA_CLASSES, SETTINGS_CLASSES])
def test_a_pickle_that_calls_something_is_refused_before_the_call(allowed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^\S+: contains builtins\.exec, which is not part of a checkpoint"):
        restricted_load(pickle.dumps({"a": Attack()}), ".metadata", allowed)


@pytest.mark.parametrize("name", ["eval", "os.system", "__import__", "load"])
def test_members_of_allowed_modules_stay_refused(name: str) -> None:
    for module in ("torch", "torch.serialization", "argparse", "collections"):
        data = b"\x80\x04" + f"c{module}\n{name}\n.".encode()
        with pytest.raises(ConfigError, match="refused"):
            restricted_load(data, "x", METADATA_CLASSES)


def test_damaged_pickles_are_one_line() -> None:
    for data in (b"", b"\x80\x04garbage", pickle.dumps([1, 2, 3])[:-3]):
        with pytest.raises(ConfigError, match=r"^\.metadata: cannot be read [^\n]*$"):
            restricted_load(data, ".metadata", METADATA_CLASSES)


def test_a_checkpoint_with_a_dangerous_metadata_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    shutil.copytree(CASE, tmp_path / "copy")
    (tmp_path / "copy" / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ConfigError, match=r"builtins\.exec"):
        megatron.load_checkpoint(tmp_path / "copy", "gpt", fields(), MODEL)


def write_common(path: Path, value: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps(value))
    return path


def test_common_pt_is_read_without_torch(tmp_path: Path) -> None:
    assert read_common(CASE / "iter_0000007" / "common.pt") == {"iteration": 7, "checkpoint_version": 3.0, "args": None}
    with pytest.raises(ConfigError, match="holds no training arguments; pass config and model_kwargs"):
        read_settings(CASE / "iter_0000007")
    with pytest.raises(ConfigError, match=r"builtins\.exec"):
        read_common(write_common(tmp_path / "common.pt", {"args": Attack()}))
    (tmp_path / "common.pt").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_common(tmp_path / "common.pt")


def test_training_arguments_become_the_config(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        num_layers=2, hidden_size=32, num_attention_heads=4, group_query_attention=True, num_query_groups=2,
        ffn_hidden_size=56, kv_channels=8, norm_epsilon=1e-6, normalization="RMSNorm", add_bias_linear=False,
        swiglu=True, position_embedding_type="rope", rotary_base=500000, rotary_percent=1.0, use_rope_scaling=True,
        rope_scaling_factor=32.0, padded_vocab_size=128, max_position_embeddings=64, bf16=True, fp16=False,
        untie_embeddings_and_output_weights=True, apply_layernorm_1p=False, lr=1e-4, moe_router_topk=8,
        num_experts=None, yarn_rotary_scaling_factor=1.0,
    )  # fmt: skip
    write_common(tmp_path / "common.pt", {"args": arguments})
    config = transformer_config(*read_settings(tmp_path))
    assert (config.num_query_groups, config.activation_func, config.gated_linear_unit) == (2, "silu", True)
    assert (config.layernorm_epsilon, config.normalization, config.add_bias_linear) == (1e-6, "RMSNorm", False)
    assert (config.rope_scaling_type, config.rope_scaling_factor, config.rotary_base) == ("llama3", 32.0, 500000)
    assert (config.vocab_size, config.max_sequence_length, config.params_dtype) == (128, 64, "bfloat16")
    assert not config.share_embeddings_and_output_weights
    gpt = settings_from_arguments(
        {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "bias_gelu_fusion": True}
    )
    assert transformer_config(*gpt).activation_func == "gelu_tanh"
    with pytest.raises(ConfigError, match="num_moe_experts=4"):
        transformer_config(*settings_from_arguments({**vars(arguments), "num_experts": 4}))


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.metadata"):
        iteration_folder(tmp_path)
    shutil.copytree(CASE, tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(ConfigError, match=r"iter_0000008: holds no \.metadata"):
        iteration_folder(tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ConfigError, match="must be a number"):
        iteration_folder(tmp_path / "copy")
    (tmp_path / "copy" / "iter_0000007" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConfigError, match="'zarr'; only 'torch_dist'"):
        iteration_folder(tmp_path / "copy" / "iter_0000007")
