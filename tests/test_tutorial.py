"""The README's new family, three files written from its text, trains on several layouts as on one device."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from megajax.config import ConfigError, ParallelConfig, TrainConfig
from megajax.data.tokenizers import build_tokenizer
from megajax.models.registry import FAMILIES
from megajax.training.setup import build_program, fit_config, on_mesh, place_batch

README = Path(__file__).parents[1] / "README.md"
NAME = "mingru.family:MINGRU"
BATCH, SEQ, STEPS = 8, 16, 3
LAYOUTS = {
    "dp8": (8, ParallelConfig()),
    "zero3": (8, ParallelConfig(zero=3)),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2-sp-zero3": (8, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, zero=3)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    files = re.findall(r"```python\n# (mingru/\w+\.py)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in files] == ["mingru/config.py", "mingru/model.py", "mingru/family.py"]
    (folder / "mingru").mkdir()
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def train(devices: int, parallel: ParallelConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(losses and gradient norms [steps, 2], final parameters by path)."""
    family = FAMILIES[NAME]
    config = dataclasses.replace(
        family.default,
        model=family.default.model.replace(
            num_layers=2, hidden_size=32, ffn_hidden_size=None, rnn_width=48, init_method_std=0.2
        ),
        parallel=parallel,
        data=dataclasses.replace(family.default.data, seq_length=SEQ),
        train=TrainConfig(
            micro_batch_size=BATCH * parallel.tensor_model_parallel_size // devices, global_batch_size=BATCH
        ),
    )
    config = fit_config(config, family, build_tokenizer("byte"))
    program = build_program(config, family, devices=jax.devices()[:devices])
    state, seen, rng = program.create_state(), [], np.random.default_rng(5)
    with on_mesh(program):
        for _ in range(STEPS):
            text = rng.integers(256, size=(BATCH, SEQ + 1)).astype(np.int32)
            batch = {
                "tokens": text[:, :-1],
                "labels": text[:, 1:],
                "loss_mask": (rng.random((BATCH, SEQ)) < 0.8).astype(np.float32),
                "position_ids": np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1)),
            }
            state, metrics = program.train_step(state, place_batch(program, batch, num_microbatches=1))
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def one_device(folder):
    return train(1, ParallelConfig())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_device(one_device, layout):
    seen, params = train(*LAYOUTS[layout])
    np.testing.assert_allclose(seen, one_device[0], rtol=2e-5)
    assert params.keys() == one_device[1].keys()
    for name, value in one_device[1].items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_trains_from_the_command_line_and_resumes(folder):
    flags = ["--train-iters", "3", "--micro-batch-size", "2", "--rnn-width", "64", "--tp", "2", "--run-dir", "run"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "megajax.train", "--model", NAME, *flags]
    for resumed in (False, True):
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert resumed or "unigram entropy" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.family:IT", "No module named 'nowhere'"),
        ("megajax.config:IT", "megajax.config has no variable IT"),
        ("megajax.config:Config", "is a type; expected a megajax.models.family.Family"),
        (":IT", "the module has no variable IT"),
    ],
)
def test_what_is_no_family_is_one_line(name, message):
    with pytest.raises(ConfigError) as caught:
        FAMILIES[name]
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
