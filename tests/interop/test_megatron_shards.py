"""Tensor-parallel shards against the state dicts of Megatron's own ranks (tests/golden/mcore_tp2_shards)."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError
from megajax.interop import megatron

GOLDEN = Path(__file__).parents[1] / "golden"


def whole_and_ranks(case: str) -> tuple[dict, list[dict], dict]:
    shards = [load_file(GOLDEN / "mcore_tp2_shards" / f"{case}_mp_rank_0{rank}.safetensors") for rank in range(2)]
    fields = json.loads((GOLDEN / case / "config.json").read_text())["transformer_config"]
    return load_file(GOLDEN / case / "model.safetensors"), shards, fields


def require_equal(one: dict, other: dict) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("case", ["mcore_gpt3", "mcore_llama", "mcore_mixtral"])
def test_two_ranks_merge_and_split_bit_for_bit(case: str) -> None:
    whole, shards, fields = whole_and_ranks(case)
    require_equal(megatron.merge_tensor_parallel(shards, fields), whole)
    for rank, shard in enumerate(megatron.split_tensor_parallel(whole, 2, fields)):
        require_equal(shard, shards[rank])


@pytest.mark.parametrize(
    "case",
    [
        "mcore_deepseek_v3",
        "mcore_gpt_mtp",
        "mcore_mamba_hybrid",
        "mcore_bert",
        "mcore_t5_relative",
        "mcore_radio",
        "mcore_llava",
    ],
)
def test_merge_inverts_split_of_every_family(case: str) -> None:
    whole, settings = (
        load_file(GOLDEN / case / "model.safetensors"),
        json.loads((GOLDEN / case / "config.json").read_text()),
    )
    fields = settings["transformer_config"] | settings["model_args"]
    ranks = megatron.split_tensor_parallel(whole, 2, fields)
    require_equal(megatron.merge_tensor_parallel(ranks, fields), whole)


def test_a_rank_of_a_state_space_has_its_part_of_each_of_its_inputs() -> None:
    # Heads of 2 features, 2 groups of 3 states: rows z 8, x 8, B 6, C 6, step sizes 4.
    fields = {"mamba_head_dim": 2, "mamba_num_groups": 2, "mamba_state_dim": 3}
    name, rows = "decoder.layers.0.mixer.in_proj.weight", np.arange(32)[:, None]
    second = megatron.split_tensor_parallel({name: rows}, 2, fields)[1][name][:, 0]
    assert list(second) == [*range(4, 8), *range(12, 16), *range(19, 22), *range(25, 28), 30, 31]


def test_latents_may_be_divided_or_whole() -> None:
    fields = {"q_lora_rank": 4}
    name, rows = "decoder.layers.0.self_attention.linear_q_down_proj.weight", np.arange(4.0)[:, None]
    divided = [{name: rows[:2]}, {name: rows[2:]}]
    for ranks in ([{name: rows}] * 2, divided):
        np.testing.assert_array_equal(megatron.merge_tensor_parallel(ranks, fields)[name], rows)


def test_merge_inverts_split_on_four_ranks_with_fewer_groups_than_ranks() -> None:
    whole, _, fields = whole_and_ranks("mcore_llama")
    whole["decoder.layers.0.self_attention.core_attention.softmax_offset"] = np.arange(4.0)
    ranks = megatron.split_tensor_parallel(whole, 4, fields)
    require_equal(megatron.merge_tensor_parallel(ranks, fields), whole)


def test_the_config_may_be_the_loaded_one() -> None:
    whole, shards, fields = whole_and_ranks("mcore_llama")
    config = megatron.load(whole, "gpt", fields, {"position_embedding_type": "rope"}).config
    require_equal(megatron.merge_tensor_parallel(shards, config), whole)


def test_ranks_that_do_not_belong_together_are_refused() -> None:
    _, shards, fields = whole_and_ranks("mcore_llama")
    name = "decoder.layers.1.pre_mlp_layernorm.weight"
    with pytest.raises(ConfigError, match=rf"{name} should be equal .* differs on rank 1"):
        megatron.merge_tensor_parallel([shards[0], {**shards[1], name: shards[1][name] + 1}], fields)
    with pytest.raises(ConfigError, match=rf"rank 1 and rank 0 do not both have {name}"):
        megatron.merge_tensor_parallel([shards[0], {k: v for k, v in shards[1].items() if k != name}], fields)
    with pytest.raises(ConfigError, match="different shapes"):
        megatron.merge_tensor_parallel([shards[0], {**shards[1], "output_layer.weight": np.zeros((3, 32))}], fields)


def test_sizes_that_do_not_divide_and_unknown_tensors_are_refused() -> None:
    whole, _, fields = whole_and_ranks("mcore_llama")
    with pytest.raises(ConfigError, match=r"dim \d of size \d+ is not divisible by tp=5"):
        megatron.split_tensor_parallel(whole, 5, fields)
    with pytest.raises(ConfigError, match=r"decoder\.mystery"):
        megatron.split_tensor_parallel({"decoder.mystery": np.zeros(4)}, 2, fields)
