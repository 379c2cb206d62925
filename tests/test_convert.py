"""The converter as a program: every way round, and every mistake on one line."""

# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax import convert
from megajax.config import ConfigError, TransformerConfig
from megajax.interop.pretrained import Pretrained
from megajax.models.gpt.gpt_model import GPTModel

TOKENS = np.arange(10)[None]


def logits(pretrained: Any) -> Any:
    return pretrained.model.apply({"params": pretrained.params}, TOKENS)


def test_weights_survive_a_round_through_all_formats_bit_for_bit(golden: Path, tmp_path: Path) -> None:
    steps = [("megatron", golden / "mcore_llama")]
    steps += [("megajax", tmp_path / "mj"), ("hf", tmp_path / "hf"), ("megatron", tmp_path / "mg")]
    for (source, src), (target, dst) in itertools.pairwise(steps):
        convert.main(["--from", source, str(src), "--to", target, str(dst)])
    original, converted = (load_file(path / "model.safetensors") for path in (steps[0][1], steps[-1][1]))
    assert sorted(original) == sorted(converted)
    for name, value in original.items():
        np.testing.assert_array_equal(converted[name], value, err_msg=name)
    expected = logits(convert.read("megatron", steps[0][1]))
    for source, path in steps[1:]:
        np.testing.assert_allclose(logits(convert.read(source, path)), expected, atol=1e-6)
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]  # the store's own; nothing temporary stays


def test_padding_of_the_vocabulary_is_not_stored(tmp_path: Path) -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=13, make_vocab_size_divisible_by=8,
        position_embedding_type="rope",
    )  # fmt: skip
    model = GPTModel(config)
    original = Pretrained("gpt", config, model, jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
    convert.write("megajax", original, tmp_path / "mj")
    again = convert.read("megajax", tmp_path / "mj")
    assert again.config == config
    np.testing.assert_allclose(logits(again), logits(original), atol=1e-6)


def test_the_program_says_in_one_line_what_is_wrong(golden: Path, tmp_path: Path) -> None:
    case = golden / "mcore_llama"
    broken = tmp_path / "broken"
    shutil.copytree(case, broken)
    settings = json.loads((case / "config.json").read_text())
    settings["transformer_config"]["use_mup"] = True
    (broken / "config.json").write_text(json.dumps(settings))
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--from", "onnx", "a", "--to", "hf", "b"], "--from onnx: is no format; use one of hf, megatron, megajax"),
        (["--from", "hf", "a"], "required: --to"),
        (["--from", "hf", str(tmp_path / "none"), "--to", "megajax", "b"], "there is no such folder"),
        (["--from", "megatron", str(case), "--to", "megatron", str(case)], "is the source itself"),
        (["--from", "megatron", str(tmp_path / "empty"), "--to", "hf", "b"], "holds neither config.json nor"),
        (["--from", "megajax", str(tmp_path / "empty"), "--to", "hf", "b"], str(tmp_path / "empty")),
        (
            ["--from", "megatron", str(broken), "--to", "hf", str(tmp_path / "new")],
            "use_mup=True is not supported",
        ),
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as raised:
            convert.main(arguments)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_exit_codes(tmp_path: Path, program_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "megajax.convert"]
    bad = subprocess.run([*command, "--from", "hf", str(tmp_path / "x"), "--to", "megajax", "y"],
                         capture_output=True, text=True, env=program_env, check=False)  # fmt: skip
    assert bad.returncode == 2
    assert bad.stderr == f"error: --from hf {tmp_path / 'x'}: there is no such folder\n"
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, env=program_env, check=True)
    assert "--load DST --finetune" in shown.stdout
