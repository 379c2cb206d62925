"""Dispatchers on eight devices against a dense sum over all experts on one: outputs, gradients, collectives."""

# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from megajax.config import ConfigError
from megajax.ops import grouped
from megajax.parallel import expert
from megajax.parallel.expert import Dispatcher, dispatch

AXES = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")
B, S, D, F, E, K = 8, 4, 3, 4, 8, 2
Axes = tuple[str, ...]


def make_mesh(**sizes: int) -> Mesh:
    """The trainer's seven axes, those not named of size 1."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inputs() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """x, params, ids, probs, and the weights of a loss. Everybody's first choice is expert 5, no one chooses 2."""
    r = np.random.default_rng(0)
    second = r.choice([0, 1, 3, 4, 6, 7], (B, S))
    ids = np.stack([np.where(np.arange(S) % 3 == 1, second, 5), np.full((B, S), 5)], -1)
    ids[..., 1] = np.where(ids[..., 0] == 5, second, 5)
    f32 = [r.normal(size=size).astype(np.float32) for size in ((B, S, D), (E, D, F), (E, F), (E, F, D), (B, S, D))]
    probs = r.uniform(0.1, 1, (B, S, K)).astype(np.float32)
    return f32[0], dict(zip(("fc1", "bias", "fc2"), f32[1:4], strict=True)), ids.astype(np.int32), probs, f32[4]


def expert_fn(params: Any, x: jax.Array, probs: jax.Array, groups: grouped.Groups | None) -> jax.Array:
    h = grouped.grouped_matmul(x, params["fc1"], groups) + grouped.grouped_bias(params["bias"], x, groups)
    return grouped.grouped_matmul(jnp.tanh(h) * probs[..., None], params["fc2"], groups)


def dense(x: Any, params: Any, probs: Any, weight_BSKE: Any) -> jax.Array:
    """Every expert on every token; `weight_BSKE` is the one-hot choice, zero where it was dropped."""
    h = jnp.tanh(jnp.einsum("bsd,edf->bsef", x, params["fc1"]) + params["bias"])
    p = jnp.einsum("bsk,bske->bse", probs, weight_BSKE)
    return jnp.einsum("bsef,efd->bsd", h * p[..., None], params["fc2"])


def one_hot(ids: np.ndarray) -> np.ndarray:
    return (ids[..., None] == np.arange(E)).astype(np.float32)


def keep(ids: np.ndarray, probs: np.ndarray, factor: float, policy: str, cut: tuple[int, int]) -> np.ndarray:
    """`one_hot` after dropping, token after token, in each block of a [B, S] that is cut into `cut` blocks."""
    chosen = one_hot(ids)
    b, s = B // cut[0], S // cut[1]
    limit = int(np.ceil(b * s * K / E * factor))
    for i, j, e in np.ndindex(*cut, E):
        part = np.s_[i * b : (i + 1) * b, j * s : (j + 1) * s]
        queue = np.argwhere(ids[part] == e).tolist()
        if policy == "probs":
            queue.sort(key=lambda at: -probs[part][tuple(at)])
        for at in queue[limit:]:
            chosen[part][tuple(at)] = 0
    return chosen


@dataclasses.dataclass(frozen=True)
class Case:
    """A dispatcher on a mesh; tokens [B, S] are cut over (dp, ep) and `seq`."""

    name: str
    dispatcher: Dispatcher
    mesh: dict[str, int]
    seq: Axes = ()
    ep: Axes = ("ep",)
    etp: Axes = ()


def how(kind: Any, factor: float | None = None, **more: Any) -> Dispatcher:
    return Dispatcher(kind, factor, block=4, **more)


CASES = [
    Case("allgather", how("allgather"), {"dp": 2, "ep": 4}),
    Case("allgather-etp", how("allgather"), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    Case("allgather-etp-same-tokens", how("allgather"), {"ep": 2, "tp": 2}, etp=("tp",)),
    Case("allgather-folded-same-tokens", how("allgather"), {"ep": 2, "tp": 2}, ep=("ep", "tp")),
    Case("allgather-drop", how("allgather", 1.0, drop_policy="position"), {"dp": 2, "ep": 2}),
    Case("allgather-pad", how("allgather", 1.0, pad_to_capacity=True), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    Case("alltoall-drop", how("alltoall", 1.0), {"dp": 2, "ep": 4}),
    Case("alltoall-etp", how("alltoall", 1.5), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    Case("alltoall-all-fit", how("alltoall", 99.0), {"ep": 2, "tp": 2}, etp=("tp",)),
    Case("alltoall-dropless", how("alltoall"), {"dp": 2, "ep": 4}),
    Case("alltoall-dropless-etp", how("alltoall"), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    Case("alltoall-folded", how("alltoall"), {"dp": 2, "cp": 2, "tp": 2}, ("cp", "tp"), ep=("cp", "tp")),
    Case("ragged", how("ragged"), {"dp": 2, "ep": 4}),
    Case("ragged-etp", how("ragged", 1.0), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
]


def fake_ragged_all_to_all(x, out, starts, sizes, goes_to, comes, *, axis_name):
    """What the documentation of `jax.lax.ragged_all_to_all` says, by gathering everything."""
    xs, starts, sizes, goes_to = (lax.all_gather(a, axis_name) for a in (x, starts, sizes, goes_to))
    me = lax.axis_index(axis_name)
    row = jnp.arange(out.shape[0])
    for i in range(xs.shape[0]):
        inside = (row >= goes_to[i, me]) & (row < goes_to[i, me] + sizes[i, me])
        value = xs[i][jnp.clip(row - goes_to[i, me] + starts[i, me], 0, xs.shape[1] - 1)]
        out = jnp.where(inside.reshape(-1, *(1,) * (out.ndim - 1)), value, out)
    return out


@pytest.fixture
def ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", fake_ragged_all_to_all)
    monkeypatch.setattr(expert, "_check_platform", lambda *_: None)


def run(case: Case, x: Any, params: Any, ids: Any, probs: Any) -> jax.Array:
    specs = {"fc1": P(case.ep, None, case.etp), "bias": P(case.ep, case.etp), "fc2": P(case.ep, case.etp, None)}
    return dispatch(
        x,
        ids,
        probs,
        params,
        expert_fn,
        num_experts=E,
        dispatcher=case.dispatcher,
        token_spec=P(("dp", "ep"), case.seq),
        ep=case.ep,
        etp=case.etp,
        param_specs=specs,
    )


def assert_close(got: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.usefixtures("ragged_on_cpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: Case) -> None:
    x, params, ids, probs, weight = inputs()
    mesh = make_mesh(**case.mesh)
    cut = tuple(int(np.prod([mesh.shape[a] for a in axes])) for axes in (("dp", "ep"), case.seq))
    d = case.dispatcher
    chosen = keep(ids, probs, d.capacity_factor or 1e9, d.drop_policy, (cut[0], cut[1]))
    expected = jax.value_and_grad(lambda *a: (weight * dense(*a, chosen)).sum(), (0, 1, 2))(x, params, probs)
    with jax.set_mesh(mesh):
        step = jax.value_and_grad(lambda x, params, probs: (weight * run(case, x, params, ids, probs)).sum(), (0, 1, 2))
        got = jax.jit(step)(x, params, probs)
    assert_close(got, expected)
