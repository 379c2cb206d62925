"""The doctor: what it says here, of GPUs that are not here, and where it cannot say anything."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
from typing import Any

import pytest

from megajax import doctor
from megajax.config import ConfigError
from megajax.xla_flags import GPU_OPTIONS

aot = all(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "nvidia"))
on_h100 = pytest.mark.skipif(not aot, reason="needs the extra aot, and nvidia-cudnn-cu12")
TINY = (
    *("--model", "gpt", "--num-layers", "1"),
    *("--hidden-size", "128", "--num-attention-heads", "2", "--seq-length", "64"),
)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    doctor.main([*words])
    return capsys.readouterr().out


def test_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(said(capsys, "--json", *TINY))
    assert report["devices"] | {"memory_bytes": None} == {
        "platform": "cpu",
        "kind": "cpu",
        "count": 8,
        "processes": 1,
        "compute_capability": None,
        "memory_bytes": None,
    }
    assert report["versions"].keys() >= {"python", "megajax", "jax", "jaxlib", "flax"}
    assert report["kernels"][0] == {"slot": "attention", "kernel": "plain", "why": "", "text": "attention: plain JAX"}
    assert report["xla_options"] == []
    assert report["trouble"] is None


@on_h100
def test_of_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--{GPU_OPTIONS[0].name}=false")
    text = said(capsys, "--target", "h100", *TINY, "--bf16", "--tp", "2")
    assert "KERNELS of gpt, bfloat16, on h100\n  attention: cuDNN flash attention" in text
    assert f"  {GPU_OPTIONS[0].name}=as in XLA_FLAGS  (the user's own)" in text
    assert f"  {GPU_OPTIONS[1].name}={GPU_OPTIONS[1].text}  ({GPU_OPTIONS[1].why})" in text


@on_h100
def test_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--target", "a100", *TINY, "--bf16", "--kv-channels", "192", "--hidden-size", "384")
    assert "attention: Pallas flash attention (cuDNN flash attention has heads of up to 128 features" in text
    text = said(capsys, "--target", "a100", *TINY)
    assert "attention: plain JAX (cuDNN flash attention computes in bf16 or fp16; set bf16=True; Pallas flash" in text
    text = said(capsys, "--target", "a100", *TINY, "--attention-backend", "fused")
    assert "cannot be said: attention_backend='fused' is not possible: cuDNN flash attention computes in bf16" in text


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ConfigError, match="target='h900' is not known; choose from"):
        doctor.main(["--target", "h900"])
    with pytest.raises(ConfigError, match="--hidden-sizes"):
        doctor.main(["--hidden-sizes", "3"])


def test_missing_extras(monkeypatch: Any) -> None:
    requires = ["jax>=0.10", 'wandb>=0.18; extra == "wandb"', 'jax[cuda12]; extra == "cuda12"', 'nix; extra == "test"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    monkeypatch.setattr(doctor, "_versions", lambda packages: {})
    assert doctor._missing_extras() == {"wandb": ["wandb"], "cuda12": ["jax-cuda12-plugin"]}
