"""`--print-sharding`: the bytes are those that a real state takes on a device, and the table fits on a terminal."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shlex

import jax
import pytest

from megajax import cli
from megajax.config import ConfigError
from megajax.models.registry import FAMILIES
from megajax.parallel.mesh import make_abstract_mesh
from megajax.train import main
from megajax.training.blueprint import draw_up
from megajax.training.setup import build_program
from megajax.training.sharding_table import rows_of

TINY = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 48 --seq-length 16"
    " --vocab-size 300 --make-vocab-size-divisible-by 64 --global-batch-size 8 --micro-batch-size 1 --optimizer adam"
)


@pytest.mark.parametrize(
    "flags",
    [
        "--tp 2 --pp 2 --zero 1 --pipeline-model-parallel-layout Et|tttL",
        "--tp 4 --zero 3 --params-dtype bfloat16",
        "--zero 2 --optimizer muon --num-distributed-optimizer-instances 2",
    ],
)
def test_bytes_are_those_of_a_state(flags):
    config = cli.parse(shlex.split(f"{TINY} {flags}"), prog="train", families=FAMILIES)
    family = FAMILIES["gpt"]
    rows, rest = rows_of(draw_up(config, family, make_abstract_mesh(config.parallel, 8)))
    state = build_program(config, family, devices=jax.devices()).create_state()

    def on_first(tree):
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    assert sum(row.parameter for row in rows) == on_first(state.params)
    assert sum(row.state for row in rows) + rest == on_first(state.replace(params=None))
    item = 2 if "bfloat16" in flags else 4
    if config.parallel.zero == 3:  # gradients lie as parameters do, in float32
        assert sum(row.gradient for row in rows) == on_first(state.params) * 4 // item
    elif config.parallel.zero == 2:
        [kernel] = [row for row in rows if row.name.endswith("linear_fc1/kernel")]
        assert kernel.gradient * 4 == kernel.parameter  # over the dp=4 of one copy


def test_the_table(capsys):
    assert main(shlex.split(f"{TINY} --tp 2 --pp 2 --print-sharding 8")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("parameters in float32, optimizer adam, zero=1")
    assert lines[1] == "8 devices: pp=2 dp=2 tp=2"
    titles = " ".join(lines[3].split())
    assert titles == "parameter shape logical axes spec state spec param grad state KiB"
    kernels = [line.split() for line in lines if "linear_fc1/kernel" in line]
    # 2 of 4 layers, half of the features: 2 x 32 x 24 floats; two moments, divided over dp
    assert kernels == [["linear_fc1/kernel", "4x32x48", "layers,embed,mlp", "pp,-,tp", "pp,dp,tp", *["6.00"] * 3]]
    norms = [line.split() for line in lines if "pre_mlp_layernorm/scale" in line]
    assert norms == [["pre_mlp_layernorm/scale", "4x32", "layers,norm", "pp,-", "same", "0.25", "0.25", "0.50"]]
    assert [line.split()[0] for line in lines if line.startswith(("total", "together"))] == ["total", "together"]


def test_a_model_and_a_mesh_far_larger_than_the_machine(capsys):
    before = sum(array.nbytes for array in jax.live_arrays())
    assert main(shlex.split("--preset llama3.1-405b --tp 8 --pp 6 --bf16 --zero 3 --print-sharding 1536")) == 0
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1024
    out = capsys.readouterr().out
    assert "1536 devices: pp=6 dp=32 tp=8; this machine has 8\n" in out
    assert max(map(len, out.splitlines())) <= 120
    assert "405,853,388,800 parameters" in out


@pytest.mark.parametrize(
    ("flags", "devices"),
    [("", "8 devices: dp=8"), ("--tp 2", "8 devices: dp=4 tp=2"), ("--tp 4 --pp 4", "16 devices: pp=4 tp=4; this")],
)
def test_devices_are_those_at_hand_or_the_fewest_that_do(flags, devices, capsys):
    assert main(shlex.split(f"{TINY} --print-sharding {flags}")) == 0
    assert f"\n{devices}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--print-sharding all", "--print-sharding all is not valid: expected a number of devices, or nothing"),
        ("--print-sharding 0", "--print-sharding 0 is not valid"),
        ("--print-sharding 3 4", "--print-sharding takes no value, or a number of devices"),
        ("--print-sharding 3 --tp 2", "tensor_model_parallel_size=2 does not divide the 3 devices"),
        ("--print-sharding --tp 3", "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(ConfigError, match=message):
        main(shlex.split(f"{TINY} {flags}"))
