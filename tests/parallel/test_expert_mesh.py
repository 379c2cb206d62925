"""Mesh refinement against Megatron's device groups, enumerated here from its two rank orders."""

# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from typing import Any

import numpy as np
import pytest

from megajax.config import ConfigError
from megajax.parallel.expert_mesh import Refinement, expand, refine

PLAIN = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")


def megatron_groups(sizes: dict[str, int], group: tuple[str, ...]) -> set[tuple[int, ...]]:
    """Ranks that share the coordinates of all axes but those of `group`; the first axis of `sizes` is the fastest."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        coordinates, rest = {}, rank
        for name, size in sizes.items():
            rest, coordinates[name] = divmod(rest, size)
        key = tuple(c for name, c in coordinates.items() if name not in group)
        groups.setdefault(key, []).append(rank)
    return {tuple(g) for g in groups.values()}


def mesh_groups(mesh: Refinement, axes: tuple[str, ...]) -> set[tuple[int, ...]]:
    """Devices, in the order in which `PartitionSpec(axes)` counts them, that differ only along the fine `axes`."""
    devices = np.arange(math.prod(mesh.shape)).reshape(mesh.shape)
    inside = [mesh.names.index(a) for a in axes]
    others = [i for i in range(devices.ndim) if i not in inside]
    size = math.prod(mesh.shape[i] for i in inside)
    return {tuple(int(r) for r in row) for row in devices.transpose(*others, *inside).reshape(-1, size)}


def fits(tp: int, cp: int, dp: int, etp: int, ep: int) -> bool:
    """Whether the two numberings cut the line of devices in a chain of divisors."""
    cuts = sorted({1, tp, tp * cp, tp * cp * dp, etp, etp * ep})
    return all(high % low == 0 for low, high in itertools.pairwise(cuts)) and cuts[-1] == tp * cp * dp


def test_groups_are_megatrons() -> None:
    """Every layout of up to 32 devices with factors 1, 2, 4 and 3."""
    checked = refused = 0
    for tp, cp, dp, etp, ep, pp in itertools.product(
        (1, 2, 4), (1, 2), (1, 2, 3, 4), (1, 2, 4), (1, 2, 3, 4, 8), (1, 2)
    ):
        if not fits(tp, cp, dp, etp, ep):
            with pytest.raises(ConfigError):
                refine(tp=tp, cp=cp, dp=dp, etp=etp, ep=ep, pp=pp, folded=True)
            refused += 1
            continue
        mesh = refine(tp=tp, cp=cp, dp=dp, etp=etp, ep=ep, pp=pp, folded=True)
        dense = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
        data = mesh.dense["replica"] + mesh.dense["dp"] + mesh.dense["ep"]
        for name, axes in {**{n: mesh.dense[n] for n in ("tp", "cp", "pp")}, "dp": data}.items():
            assert mesh_groups(mesh, axes) == megatron_groups(dense, (name,)), (name, mesh)
        expert = {"etp": etp, "ep": ep, "edp": tp * cp * dp // (etp * ep), "pp": pp}
        for name in ("etp", "ep", "edp"):
            assert mesh_groups(mesh, mesh.expert[name]) == megatron_groups(expert, (name,)), (name, mesh)
        checked += 1
    assert checked > 100 and refused > 100


def test_16_devices_by_hand() -> None:
    """tp 2, cp 2, dp 4 and ep 4, etp 1: the expert group is one tp x cp block."""
    mesh = refine(tp=2, cp=2, dp=4, ep=4, etp=1)
    assert dict(mesh.sizes) == {"pp": 1, "replica": 1, "dp": 4, "ep": 1, "cp": 2, "ulysses": 1, "tp": 2}
    assert mesh.expert == {"etp": (), "ep": ("cp", "tp"), "edp": ("dp",)}
    assert mesh_groups(mesh, mesh.expert["ep"]) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}
    assert mesh_groups(mesh, mesh.expert["edp"]) == {(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)}


def test_64_devices() -> None:
    """tp 4, cp 2, dp 8 with etp 1, ep 64: every axis is part of the expert group."""
    mesh = refine(tp=4, cp=2, dp=8, etp=1, ep=64)
    assert (mesh.sizes["dp"], mesh.sizes["ep"], mesh.sizes["cp"], mesh.sizes["tp"]) == (1, 8, 2, 4)
    assert mesh.expert == {"etp": (), "ep": ("ep", "cp", "tp"), "edp": ()}


def test_axes_that_are_cut() -> None:
    """etp 2 inside tp 4, and a data axis that holds etp, ep and edp."""
    inside_tp = refine(tp=4, dp=4, etp=2, ep=4)
    assert inside_tp.dense["tp"] == ("tp0", "tp1") and inside_tp.expert["etp"] == ("tp1",)
    assert inside_tp.expert["ep"] == ("ep", "tp0") and inside_tp.expert["edp"] == ("dp",)
    inside_dp = refine(dp=8, etp=2, ep=2)
    assert inside_dp.dense["dp"] == ("dp",) and inside_dp.dense["ep"] == ("ep0", "ep1")
    assert inside_dp.expert == {"etp": ("ep1",), "ep": ("ep0",), "edp": ("dp",)}


def test_without_folding_the_plain_axes() -> None:
    mesh = refine(tp=2, ulysses=2, cp=2, dp=8, replica=2, ep=2, pp=2)
    assert mesh.names == PLAIN and mesh.shape == (2, 2, 2, 2, 2, 2, 2) and not mesh.folded
    assert all(axes == (name,) for name, axes in mesh.dense.items())
    assert mesh.expert["ep"] == ("ep",) and mesh.expert["etp"] == ("tp",)
    assert math.prod(mesh.sizes[a] for a in mesh.expert["edp"]) == 16
    table = {"batch": ("replica", "dp", "ep"), "experts": ("ep",), "expert_mlp": ("tp",), "expert_embed": ("dp",)}
    assert expand(table, mesh) == table


def test_ep_beyond_dp_folds_over_context() -> None:
    """cp 8 and ep 8 on 8 devices need no word about expert tensor parallelism."""
    assert refine(cp=8, dp=1, ep=8).expert["ep"] == ("cp",)


def test_expand() -> None:
    table = {
        "batch": ("replica", "dp", "ep"),
        "mlp": ("tp",),
        "residual_seq": ("cp", "ulysses", "tp"),
        "experts": ("ep",),
        "expert_mlp": ("tp",),
        "expert_embed": ("dp",),
    }
    mesh = refine(tp=4, cp=2, dp=8, replica=2, etp=2, ep=8)
    assert expand(table, mesh) == {
        "batch": ("replica", "dp", "ep"),
        "mlp": ("tp0", "tp1"),
        "residual_seq": ("cp", "ulysses", "tp0", "tp1"),
        "experts": ("ep", "cp", "tp0"),
        "expert_mlp": ("tp1",),
        "expert_embed": ("dp",),
    }
    assert mesh.expert["edp"] == ("replica", "dp")
    with pytest.raises(ConfigError, match="'xx' is not a mesh axis"):
        expand({"mlp": ("xx",)}, mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 2, "dp": 3, "ep": 4, "etp": 1}, "expert_model_parallel_size=4 times .* does not divide the 6 devices"),
        (
            {"tp": 4, "dp": 3, "ep": 2, "etp": 3},
            "expert_tensor_parallel_size=3 makes groups of 3 devices, which cut tp",
        ),
        (
            {"tp": 4, "dp": 3, "ep": 3, "etp": 2},
            "expert_model_parallel_size=3 makes groups of 6 devices, which cut",
        ),
        ({"dp": 8, "replica": 3}, "num_distributed_optimizer_instances=3 does not divide the data-parallel size 8"),
        (
            {"cp": 2, "dp": 4, "replica": 4, "ep": 4},
            "num_distributed_optimizer_instances=4 does not divide the expert",
        ),
        ({"tp": 2, "dp": 2, "ep": 2, "etp": 1, "folded": False}, "expert_model_parallel_size=2 is not a part of"),
    ],
)
def test_impossible_layouts_are_one_line(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        refine(**sizes)
    assert "\n" not in str(error.value)
