"""A small training state with every kind of leaf, on eight simulated devices, and a reader other than the store's."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

VOCAB, WIDTH, LAYERS = 37, 16, 4
PARAM_AXES = {
    "embedding": {"word_embeddings": {"embedding": ("vocab", "embed")}},
    "decoder": {"layers": {"mlp": {"linear_fc1": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}}}},
    "output_layer": {"kernel": ("embed", "vocab")},
}


class State(flax.struct.PyTreeNode):
    """Shaped like the trainer's state: scalars, parameters, optax NamedTuples, an absent part, PRNG data."""

    step: Any
    samples: Any
    params: Any
    opt_state: Any
    loss_scale: Any
    half: Any
    rng: Any
    note: Any


def _pad(rows: np.ndarray, dim: int, size: int) -> np.ndarray:
    width = [(0, 0)] * rows.ndim
    width[dim] = (0, size - rows.shape[dim])
    return np.pad(rows, width)


def _params(seed: int, padded: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    fc1 = {"kernel": normal(LAYERS, WIDTH, 32), "bias": normal(LAYERS, 32)}
    return {
        "embedding": {"word_embeddings": {"embedding": _pad(normal(VOCAB, WIDTH), 0, padded)}},
        "decoder": {"layers": {"mlp": {"linear_fc1": fc1}}},
        "output_layer": {"kernel": _pad(normal(WIDTH, VOCAB), 1, padded)},
    }


def _state(seed: int, padded: int) -> State:
    params = _params(seed, padded)
    adam = optax.ScaleByAdamState(count=np.int32(seed), mu=_params(seed + 1, padded), nu=_params(seed + 2, padded))
    return State(
        step=np.int32(seed),
        samples=np.uint32(4_000_000_000),
        params=params,
        opt_state=(adam, optax.EmptyState()),
        loss_scale=None,
        half={
            "bf16": np.arange(24).reshape(8, 3).astype(jnp.bfloat16) / 7,
            "fp16": np.arange(5).astype(np.float16) / 3,
            "mask": np.array([True, False, True]),
            "int8": np.arange(-4, 4, dtype=np.int8),
        },
        rng=np.array([0xDEADBEEF, seed], dtype=np.uint32),
        note=7,
    )


_MESH_AXES = {"vocab": "tp", "mlp": "tp", "embed": "dp"}


def _shard(state: State, mesh: Mesh | None, spec: Callable[[str], Any]) -> State:
    def put(leaf: Any, axes: tuple[str, ...] | None) -> Any:
        if isinstance(leaf, int):
            return leaf
        if mesh is None:
            return jax.device_put(jnp.asarray(leaf), jax.devices()[0])
        sharding = NamedSharding(mesh, PartitionSpec(*(spec(name) for name in axes or ())))
        return jax.device_put(jnp.asarray(leaf), sharding)

    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    known = dict(
        jax.tree_util.tree_flatten_with_path(
            axes_like(state), is_leaf=lambda x: type(x) is tuple and bool(x) and isinstance(x[0], str)
        )[0]
    )
    return jax.tree.unflatten(structure, [put(leaf, known.get(path)) for path, leaf in paths])


def axes_like(state: State) -> State:
    """The logical axes of a state: those of the parameters, twice more for Adam's moments."""
    adam = optax.ScaleByAdamState(count=None, mu=PARAM_AXES, nu=PARAM_AXES)  # pyright: ignore[reportArgumentType]
    return State(
        None, None, PARAM_AXES, (adam, optax.EmptyState()), None, jax.tree.map(lambda _: None, state.half), None, None
    )


@pytest.fixture
def axes() -> State:
    """The logical axes of `make_state`'s result."""
    return axes_like(_state(0, VOCAB))


@pytest.fixture
def make_state() -> Callable[..., State]:
    """`make_state(seed, padded=40, mesh=None, shape)`: values depend on the seed alone, the padding rows are zero."""

    def make(seed: int = 3, *, padded: int = 40, mesh: str = "one") -> State:
        devices = np.array(jax.devices()[:8])
        types = (AxisType.Auto, AxisType.Auto)
        if mesh == "one":
            return _shard(_state(seed, padded), None, _MESH_AXES.get)
        if mesh == "dp8":
            of_mesh = Mesh(devices.reshape(8, 1), ("dp", "tp"), axis_types=types)
            return _shard(_state(seed, padded), of_mesh, {"vocab": "dp", "mlp": "dp"}.get)
        assert mesh == "2x4"
        return _shard(_state(seed, padded), Mesh(devices.reshape(2, 4), ("dp", "tp"), axis_types=types), _MESH_AXES.get)

    return make


@pytest.fixture
def abstract() -> Callable[[Any], Any]:
    """The ShapeDtypeStructs, with shardings, of a state's arrays; Python scalars stay."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        return leaf

    return lambda state: jax.tree.map(of_leaf, state)


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Equal structure, dtypes, shardings and bits."""

    def check(found: Any, expected: Any) -> None:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            where = jax.tree_util.keystr(path)
            assert type(one) is type(other), where
            if isinstance(other, jax.Array):
                assert one.sharding.is_equivalent_to(other.sharding, other.ndim), where
            one, other = np.asarray(one), np.asarray(other)
            assert (one.dtype, one.shape) == (other.dtype, other.shape), where
            assert one.tobytes() == other.tobytes(), where

    return check


@pytest.fixture
def read_raw() -> Callable[[Path, str], np.ndarray]:
    """Reads one array of a step with TensorStore alone, knowing only Orbax's layout (zarr in OCDBT)."""

    def read(folder: Path, name: str) -> np.ndarray:
        kvstore = {"driver": "ocdbt", "base": f"file://{folder}", "path": name.replace("/", ".") + "/"}
        return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().read().result()

    return read
