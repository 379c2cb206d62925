"""Dispatchers on eight devices against a dense sum over all experts on one: outputs, gradients, collectives."""

# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from megajax.config import ConfigError
from megajax.ops import grouped
from megajax.ops.grouped_kernel import grouped_product
from megajax.parallel import expert
from megajax.parallel.expert import Dispatcher, ExpertFn, dispatch

AXES = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")
B, S, D, F, E, K = 8, 4, 3, 4, 8, 2
Axes = tuple[str, ...]


def make_mesh(**sizes: int) -> Mesh:
    """The trainer's seven axes, those not named of size 1."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inputs(D: int = D, F: int = F) -> tuple[Any, dict[str, Any], Any, Any, Any]:
    """x, params, ids, probs, and the weights of a loss. Everybody's first choice is expert 5, no one chooses 2."""
    r = np.random.default_rng(0)
    second = r.choice([0, 1, 3, 4, 6, 7], (B, S))
    ids = np.stack([np.where(np.arange(S) % 3 == 1, second, 5), np.full((B, S), 5)], -1)
    ids[..., 1] = np.where(ids[..., 0] == 5, second, 5)
    f32 = [r.normal(size=size).astype(np.float32) for size in ((B, S, D), (E, D, F), (E, F), (E, F, D), (B, S, D))]
    probs = r.uniform(0.1, 1, (B, S, K)).astype(np.float32)
    return f32[0], dict(zip(("fc1", "bias", "fc2"), f32[1:4], strict=True)), ids.astype(np.int32), probs, f32[4]


def expert_fn(
    params: Any, x: jax.Array, probs: jax.Array, groups: grouped.Groups | None, kernel: Any = grouped.LOOP
) -> jax.Array:
    h = grouped.grouped_matmul(x, params["fc1"], groups, kernel) + grouped.grouped_bias(params["bias"], x, groups)
    return grouped.grouped_matmul(jnp.tanh(h) * probs[..., None], params["fc2"], groups, kernel)


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
    """A dispatcher on a mesh; tokens [B, S] are cut over (dp, ep) and `seq`. forward: collectives of whole tokens."""

    name: str
    dispatcher: Dispatcher
    mesh: dict[str, int]
    seq: Axes = ()
    ep: Axes = ("ep",)
    etp: Axes = ()
    forward: dict[str, int] | None = None


def how(kind: Any, factor: float | None = None, **more: Any) -> Dispatcher:
    return Dispatcher(kind, factor, block=4, **more)


CASES = [
    Case("allgather", how("allgather"), {"dp": 2, "ep": 4}, forward={"all-gather": 1, "reduce-scatter": 1}),
    Case("allgather-etp-same-tokens", how("allgather"), {"ep": 2, "tp": 2}, etp=("tp",)),
    Case("allgather-folded", how("allgather", 1.0, drop_policy="position"), {"ep": 2, "tp": 2}, ep=("ep", "tp")),
    Case("allgather-pad", how("allgather", 1.0, pad_to_capacity=True), {"ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    Case("alltoall-drop", how("alltoall", 1.0), {"dp": 2, "ep": 4}, forward={"all-to-all": 2}),
    Case(
        "alltoall-etp",
        how("alltoall", 1.5),
        {"ep": 2, "tp": 2},
        ("tp",),
        etp=("tp",),
        forward={"all-to-all": 2, "all-gather": 1, "reduce-scatter": 1},
    ),
    Case(
        "alltoall-folded",
        how("alltoall"),
        {"dp": 2, "cp": 2, "tp": 2},
        ("cp", "tp"),
        ep=("cp", "tp"),
        forward={"all-to-all": 2},
    ),
    Case("ragged", how("ragged", 1.5), {"ep": 4, "tp": 2}, ("tp",), etp=("tp",)),
]


def fake_ragged_all_to_all(x, out, starts, sizes, goes_to, comes, *, axis_name):
    """What the documentation of `jax.lax.ragged_all_to_all` says, by gathering everything."""
    xs, starts, sizes, goes_to = (lax.all_gather(a, axis_name) for a in (x, starts, sizes, goes_to))
    me = lax.axis_index(axis_name)
    row = jnp.arange(out.shape[0])
    begin = goes_to[:, me, None]
    source, position = jnp.nonzero((row >= begin) & (row < begin + sizes[:, me, None]), size=row.size, fill_value=-1)
    value = xs[source, position - begin[source, 0] + starts[source, me]]
    return out.at[jnp.where(position < 0, row.size, position)].set(value, mode="drop")


@pytest.fixture
def ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", fake_ragged_all_to_all)
    monkeypatch.setattr(expert, "_check_platform", lambda *_: None)


def param_specs(case: Case) -> dict[str, P]:
    return {"fc1": P(case.ep, None, case.etp), "bias": P(case.ep, case.etp), "fc2": P(case.ep, case.etp, None)}


def run(
    case: Case, x: Any, params: Any, ids: Any, probs: Any, num_experts: int = E, fn: ExpertFn = expert_fn
) -> jax.Array:
    return dispatch(
        x,
        ids,
        probs,
        params,
        fn,
        num_experts=num_experts,
        dispatcher=case.dispatcher,
        token_spec=P(("dp", "ep"), case.seq),
        ep=case.ep,
        etp=case.etp,
        param_specs=param_specs(case),
    )


def collectives(text: str) -> dict[str, int]:
    """Of [..., D] in a compiled program."""
    found = re.findall(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    return dict(collections.Counter(name for shape, name in found if f",{D}]" in shape))


def assert_close(got: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.usefixtures("ragged_on_cpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: Case) -> None:
    text = assert_equals_one_device(case, expert_fn, *inputs())
    if case.forward is not None:
        # The gradient of each exchange is the opposite one. Replicated experts sum their gradient of fc2, [E, F, D].
        twice = {name: 2 * count for name, count in case.forward.items()}
        copies = {"all-reduce": 1} if "dp" in case.mesh else {}
        assert collectives(text) == twice | copies


@pytest.mark.parametrize("name", ["allgather", "allgather-etp-same-tokens", "alltoall-folded"])
def test_the_grouped_kernel_on_a_mesh(name: str) -> None:
    """Interpreted, with what it asks of sizes."""
    case = next(case for case in CASES if case.name == name)
    case = dataclasses.replace(case, dispatcher=dataclasses.replace(case.dispatcher, block=16, most_rows=128))
    kernel = grouped.GroupedKernel(partial(grouped_product, interpret=True), most_rows=128)
    assert_equals_one_device(case, partial(expert_fn, kernel=kernel), *inputs(16, 32))


def assert_equals_one_device(case: Case, fn: ExpertFn, x: Any, params: Any, ids: Any, probs: Any, weight: Any) -> str:
    """Output and gradients; returns the compiled program."""
    mesh = make_mesh(**case.mesh)
    cut = tuple(int(np.prod([mesh.shape[a] for a in axes])) for axes in (("dp", "ep"), case.seq))
    d = case.dispatcher
    chosen = keep(ids, probs, d.capacity_factor or 1e9, d.drop_policy, (cut[0], cut[1]))
    expected = jax.value_and_grad(lambda x, w, p: (weight * dense(x, w, p, chosen)).sum(), (0, 1, 2))(x, params, probs)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (P(("dp", "ep"), case.seq), param_specs(case)))
    shardings = (*placed, placed[0])
    with jax.set_mesh(mesh):
        f = jax.value_and_grad(lambda x, w, probs: (weight * run(case, x, w, ids, probs, fn=fn)).sum(), (0, 1, 2))
        step = jax.jit(f, in_shardings=shardings, out_shardings=(None, shardings)).lower(x, params, probs).compile()
        got = step(*jax.device_put((x, params, probs), shardings))
    assert_close(got, expected)
    return step.as_text() or ""


@pytest.mark.parametrize(
    "case",
    [
        Case("allgather", how("allgather"), {"pp": 2, "ep": 2}),
        Case("alltoall", how("alltoall", 1.0), {"pp": 2, "ep": 2, "tp": 2}, ("tp",), etp=("tp",)),
    ],
    ids=lambda case: case.name,
)
def test_inside_a_pipeline_stage(case: Case) -> None:
    """Two checkpointed layers in a scan, in a region that is manual over pp and takes its gradients inside."""
    x, params, ids, probs, weight = inputs()
    scale = np.array([[1.0, 0.5], [-1.0, 2.0]], np.float32)  # [stage, layer]
    stages = {name: scale[..., *(None,) * a.ndim] * a for name, a in params.items()}
    mesh = make_mesh(**case.mesh)
    cut = (mesh.shape["ep"], mesh.shape["tp"])
    chosen = keep(ids, probs, case.dispatcher.capacity_factor or 1e9, "probs", cut)

    def loss(layer: Any, stage: Any, x: Any, probs: Any) -> Any:
        x, _ = lax.scan(jax.checkpoint(lambda x, p: (x + layer(x, p, probs), None)), x, stage)
        return (weight * x).sum()

    def body(stage: Any, x: Any, probs: Any) -> Any:
        mine = jax.tree.map(lambda a: a[0], stage)
        layer = lambda x, p, probs: run(case, x, p, ids, probs)  # noqa: E731
        out = jax.value_and_grad(loss, (1, 2, 3))(layer, mine, x, probs)
        return jax.tree.map(lambda a: a[None], out)

    with jax.set_mesh(mesh):
        f = jax.shard_map(body, in_specs=(P("pp"), P(), P()), out_specs=P("pp"), axis_names={"pp"}, check_vma=False)
        got = jax.jit(f)(stages, x, probs)
    on_one = jax.jit(jax.value_and_grad(lambda *a: loss(lambda x, p, q: dense(x, p, q, chosen), *a), (0, 1, 2)))
    expected = [on_one({name: a[i] for name, a in stages.items()}, x, probs) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *a: np.stack(a), *expected))


def test_bf16() -> None:
    """Gradients in bf16, summed over devices."""
    x, params, ids, probs, weight = inputs()
    case = next(case for case in CASES if case.name == "allgather-pad")
    chosen = keep(ids, probs, 1.0, "probs", (2, 2))
    expected = jax.grad(lambda x, w: (weight * dense(x, w, probs, chosen)).sum(), (0, 1))(x, params)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, params))
    with jax.set_mesh(make_mesh(**case.mesh)):
        got = jax.jit(jax.grad(lambda x, w: (weight * run(case, x, w, ids, probs)).sum(), (0, 1)))(*half)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g.astype(np.float32), e, rtol=0.1, atol=0.15), got, expected)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(got))


def test_without_a_mesh() -> None:
    """One device: an expert that everybody chooses, others that nobody does, and a choice that counts for nothing."""
    x, params, ids, probs, _ = inputs()
    ids = np.stack([np.full((B, S), 5), np.where(ids[..., 0] == 5, ids[..., 1], E)], -1).astype(np.int32)
    expected = dense(x, params, probs, one_hot(ids))
    for dispatcher in (how("allgather"), how("alltoall", 99.0)):
        f = jax.jit(lambda x, i, p, w, d=dispatcher: dispatch(x, i, p, w, expert_fn, num_experts=E, dispatcher=d))
        assert_close(f(x, ids, probs, params), expected)


def test_many_rows_are_read_in_larger_blocks() -> None:
    """256 rows an expert on average, some have thousands and one none: the same tokens, many times."""
    x, params, ids, probs, _ = inputs()
    expected = dense(x, params, probs, one_hot(ids))
    many = [np.tile(array, (1, 64, 1)) for array in (x, ids, probs)]
    case = CASES[0]
    with jax.set_mesh(make_mesh(**case.mesh)):
        step = jax.jit(lambda x, ids, probs: run(case, x, params, ids, probs)).lower(*many).compile()
        got = step(*many)
    assert_close(got, np.tile(expected, (1, 64, 1)))
    rows_of_products = re.findall(rf"f32\[(\d+),{F}\]\S* dot\(", step.as_text() or "")
    assert set(rows_of_products) == {"32"}


def test_ragged_lowers_for_a_gpu() -> None:
    """Two exchanges of rows and one of probabilities, and as many for the gradients."""
    case = next(case for case in CASES if case.name == "ragged")
    x, params, ids, probs, _ = inputs()
    device = AbstractDevice("NVIDIA H100", None, "cuda")
    shape = tuple(case.mesh.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)

    def abstract(a: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("ep")))

    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.grad(lambda x, params, ids, probs: (run(case, x, params, ids, probs) ** 2).sum(), (0, 1, 3))
        traced = jax.jit(step).trace(*jax.tree.map(abstract, (x, params, ids, probs)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 6


@pytest.mark.parametrize(
    ("case", "experts", "message"),
    [
        (Case("", how("ragged"), {"ep": 2}), 8, "moe_token_dispatcher_type=ragged needs a GPU, this is cpu"),
        (
            Case("", how("allgather"), {"ep": 4}),
            6,
            "num_moe_experts=6 is not divisible by expert_model_parallel_size=4",
        ),
        (
            Case("", how("alltoall"), {"tp": 2}, ep=("tp",)),
            8,
            "alltoall needs tokens cut over every axis .* not over tp",
        ),
        (Case("", how("allgather"), {"cp": 8}, ("cp",)), 8, "dim 1 has size 4, not divisible by the 8 devices"),
    ],
)
def test_mistakes_are_one_line(case: Case, experts: int, message: str) -> None:
    x, params, ids, probs, _ = inputs()
    with jax.set_mesh(make_mesh(**case.mesh)), pytest.raises(ConfigError, match=message) as error:
        run(case, x, params, ids, probs, experts)
    assert "\n" not in str(error.value)


def test_padding_needs_a_capacity() -> None:
    with pytest.raises(ConfigError, match="moe_pad_expert_input_to_capacity=True needs a moe_expert_capacity_factor"):
        how("alltoall", pad_to_capacity=True)
    with pytest.raises(ConfigError, match="has no use with moe_token_dispatcher_type=ragged"):
        how("ragged", 1.0, pad_to_capacity=True)
