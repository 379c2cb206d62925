"""The mesh that the options ask for, folded experts included, and what is refused in one line."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from megajax.config import ConfigError, ParallelConfig, TransformerConfig
from megajax.parallel.mesh import AXES, data_parallel_size, fewest_devices, make_abstract_mesh
from megajax.parallel.sharding import axis_rules, validate_model

DENSE = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=4, vocab_size=64)


def parallel(**sizes: int) -> ParallelConfig:
    """Sizes by their short names."""
    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "expert"}
    given = {f"{names[k]}{'_model' * (k != 'cp')}_parallel_size": v for k, v in sizes.items() if k in names}
    if "etp" in sizes:
        given["expert_tensor_parallel_size"] = sizes["etp"]
    return ParallelConfig(**given)  # type: ignore[arg-type]


def test_without_folding_all_axes_are_there() -> None:
    mesh = make_abstract_mesh(parallel(tp=2, ep=2), 16)
    assert tuple(mesh.shape) == AXES
    assert (mesh.shape["dp"], mesh.shape["ep"], mesh.shape["tp"], data_parallel_size(mesh)) == (4, 2, 2, 8)


@pytest.mark.parametrize(
    ("sizes", "devices", "experts", "expert_mlp"),
    [
        ({"tp": 2, "ep": 8, "etp": 1}, 16, 8, 1),
        ({"tp": 4, "ep": 2, "etp": 2}, 8, 2, 2),
        ({"cp": 2, "ep": 8}, 8, 8, 1),  # more experts than data parallelism has room for
        ({"tp": 2, "pp": 2, "ep": 4, "etp": 1}, 16, 4, 1),
    ],
)
def test_folded_rules_divide_experts_as_asked(sizes, devices, experts, expert_mlp) -> None:
    asked = parallel(**sizes)
    mesh, table = make_abstract_mesh(asked, devices), axis_rules(asked, DENSE, devices).table

    def shards(logical: str) -> int:
        size = 1
        for axis in table[logical]:
            size *= mesh.shape[axis]
        return size

    assert (shards("experts"), shards("expert_mlp")) == (experts, expert_mlp)
    assert shards("mlp") == sizes.get("tp", 1)
    assert (
        shards("batch")
        == data_parallel_size(mesh)
        == devices // (sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1))
    )


def groups(mesh: AbstractMesh, names: str) -> list[list[int]]:
    """Ranks that differ in the axes `names`, as `tp-pp`, alone."""
    within = names.split("-")
    ranks = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    others = [range(size) if axis not in within else [slice(None)] for axis, size in mesh.shape.items()]
    return sorted(ranks[index].ravel().tolist() for index in itertools.product(*others))


def test_the_groups_of_ranks_are_megatrons(golden: Path) -> None:
    """Megatron's ranks are counted as the devices of the mesh, so a job sends as much over the same links."""
    rows = json.loads((golden / "mcore_parallel_layout/table.json").read_text())["rank_groups"]
    ours = [row for row in rows if row["order"] in ("tp-cp-ep-dp-pp", "tp-ep-dp-pp")]
    assert len(ours) == 3
    for row in ours:
        devices = row["tp"] * row["cp"] * row["ep"] * row["dp"] * row["pp"]
        mesh = make_abstract_mesh(parallel(**{axis: row[axis] for axis in ("tp", "cp", "pp", "ep")}), devices)
        for names, expected in row["groups"].items():
            assert groups(mesh, names) == sorted(map(sorted, expected)), (row, names)


def test_the_smallest_mesh() -> None:
    assert fewest_devices(parallel(tp=2, ep=4)) == 8
    assert fewest_devices(parallel(tp=4, ep=8, etp=1)) == 8
    assert fewest_devices(parallel(tp=2, pp=2, ep=2, etp=1)) == 4


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"tp": 3}, 8, "tensor_model_parallel_size=3 does not divide the 8 devices; choose a divisor"),
        ({"tp": 2, "ep": 8, "etp": 2}, 8, "times expert_tensor_parallel_size=2 does not divide the 8 devices"),
        ({"tp": 2, "cp": 4, "ep": 4, "etp": 1}, 8, "cut context_parallel_size=4 in parts"),
    ],
)
def test_refused_in_one_line(sizes, devices, message) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_abstract_mesh(parallel(**sizes), devices)
    assert "\n" not in str(error.value)


def test_shards_of_experts_need_experts() -> None:
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size=1 has no effect without num_moe_experts"):
        validate_model(DENSE, parallel(tp=2, etp=1))
