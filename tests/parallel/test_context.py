"""Attention over a divided sequence against plain attention on one device: values, gradients, collectives, balance."""

# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh, PartitionSpec

from megajax.config import ConfigError
from megajax.ops.attention import AttentionMask, dot_product_attention
from megajax.parallel.context import context_parallel_attention
from megajax.parallel.ring_attention import Ring, blocks
from megajax.parallel.token_order import zigzag_indices, zigzag_inverse

AXES = ("pp", "replica", "dp", "ep", "cp", "ulysses", "tp")
B, S, N, K = 2, 16, 4, 4
SCALE = 0.6
RNG = np.random.default_rng(0)
SINK = RNG.normal(size=N).astype(np.float32)
DOCUMENTS = np.repeat([[0, 1, 2], [3, 4, 5]], [5, 6, 5], axis=1)
KEEP = RNG.random((B, 1, S, S)) > 0.5
KEEP[0, 0, 3] = False  # a query that sees nothing
FEW_KEYS = RNG.random((B, 1, 1, S)) > 0.5
FEW_KEYS[1] = False


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is asked for; G key/value heads."""

    G: int
    causal: bool = True
    window: tuple[int, int] | None = None
    packed: bool = False
    keep: bool = False
    sink: bool = False
    few_keys: bool = False
    softcap: float | None = None

    def mask(self, order: np.ndarray) -> AttentionMask:
        ids = jnp.asarray(DOCUMENTS[:, order]) if self.packed else None
        keep = jnp.asarray(KEEP[:, :, order][..., order]) if self.keep else None
        if self.few_keys:
            keep = jnp.asarray(FEW_KEYS[..., order])
        return AttentionMask(self.causal, self.window, ids, ids, keep, softcap=self.softcap)

    def arrays(self) -> list[jax.Array]:
        """q, k, v and the cotangent of the output."""
        rng = np.random.default_rng(1)
        return [jnp.asarray(rng.normal(size=(B, S, heads, K)), jnp.float32) for heads in (N, self.G, self.G, N)]


CASES = {
    "causal": Case(2),
    "packed_sink": Case(4, packed=True, sink=True),
    "window_one_kv_head": Case(1, window=(3, 0)),
    "all_with_keep": Case(2, causal=False, keep=True),
    "soft_cap": Case(2, softcap=0.5),
}
# mesh, comm, zigzag, all-to-alls, permutes, all-gathers and reduce-scatters of a forward pass, and with its backward.
# Ring: n-1 permutes of k and v together, n-1 again in the backward and n-1 of their gradients. Ulysses: q, k and v in
# one, the output in another, and both back. Gather: k and v together, their gradients scattered.
VARIANTS = {
    "ring_of_four": ({"cp": 4, "dp": 2}, "p2p", True, (0, 3, 0, 0), (0, 9, 0, 0)),
    "ring": ({"cp": 2, "tp": 2}, "p2p", True, (0, 1, 0, 0), (0, 3, 0, 0)),
    "ring_contiguous": ({"cp": 2, "tp": 2}, "p2p", False, (0, 1, 0, 0), (0, 3, 0, 0)),
    "all_gather": ({"cp": 2, "tp": 2}, "all_gather", True, (0, 0, 1, 0), (0, 0, 1, 1)),
    "ulysses": ({"ulysses": 2, "tp": 2}, "a2a", True, (2, 0, 0, 0), (4, 0, 0, 0)),
    "ulysses_ring": ({"cp": 2, "ulysses": 2, "tp": 2}, "a2a+p2p", True, (2, 1, 0, 0), (4, 3, 0, 0)),
}


def make_mesh(**sizes: int) -> Mesh:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def rules(mesh: Mesh, G: int) -> list[tuple[str, Any]]:
    table = {"batch": ("replica", "dp", "ep"), "seq": ("cp", "ulysses"), "act_heads": ("tp",)}
    return list({**table, "act_kv_heads": ("tp",) if G % mesh.shape["tp"] == 0 else ()}.items())


def order_of(mesh: Mesh, zigzag: bool) -> np.ndarray:
    return zigzag_indices(S, mesh.shape["cp"] if zigzag else 1)


def count_all_collectives(text: str) -> tuple[int, ...]:
    found = collections.Counter(re.findall(r" = [^=\n]*? ([a-z-]+)(?:-start)?\(", text))
    kinds = ("all-to-all", "collective-permute", "all-gather", "reduce-scatter", "all-reduce")
    return tuple(found[kind] for kind in kinds)


def count_collectives(text: str) -> tuple[int, ...]:
    *found, all_reduces = count_all_collectives(text)
    assert all_reduces == 0
    return tuple(found)


@cache
def plain(case: Case) -> list[np.ndarray]:
    """Output and gradients of q, k, v and sink on one device."""
    *qkv, dy = case.arrays()
    attend = partial(dot_product_attention, mask=case.mask(np.arange(S)), scale=SCALE)

    @jax.jit
    def run(q: Any, k: Any, v: Any, sink: Any) -> Any:
        y, vjp = jax.vjp(lambda q, k, v, sink: attend(q, k, v, sink_N=sink), q, k, v, sink)
        return y, *vjp(jnp.asarray(dy))

    return jax.tree.map(np.asarray, jax.tree.leaves(run(*qkv, SINK if case.sink else None)))


def jitted(
    mesh: Mesh, case: Case, comm: Any, zigzag: bool, *, backward: bool, dtype: Any = jnp.float32, kernel: Any = None
) -> Any:
    """The program and its arguments, laid out as a model lays them out. To be used with the mesh in context."""
    order = order_of(mesh, zigzag)
    table = dict(rules(mesh, case.G))
    specs = [
        PartitionSpec(table["batch"], table["seq"], table[heads] or None) for heads in ("act_heads", "act_kv_heads")
    ]
    places = [jax.NamedSharding(mesh, spec) for spec in (specs[0], specs[1], specs[1], specs[0])]
    q, k, v, dy = (jax.device_put(x[:, order].astype(dtype), at) for x, at in zip(case.arrays(), places, strict=True))

    def attend(q: Any, k: Any, v: Any, sink: Any) -> Any:
        mask = case.mask(order)
        options = {"mask": mask, "scale": SCALE, "comm": comm, "zigzag": zigzag, "sink_N": sink, "kernel": kernel}
        return context_parallel_attention(q, k, v, **options)

    def both(q: Any, k: Any, v: Any, sink: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(attend, q, k, v, sink)
        return y, *vjp(dy)

    sink = SINK if case.sink else None
    places = (places[0], *places[:3], None if sink is None else jax.NamedSharding(mesh, PartitionSpec("tp")))
    if backward:
        return jax.jit(both, out_shardings=places), (q, k, v, sink, dy)
    return jax.jit(attend, out_shardings=places[0]), (q, k, v, sink)


# Each combination but those whose blocks another one computes: ulysses_ring has the ring with zigzag on a part of the
# heads, and without causality there is no zigzag.
PAIRS = [
    ("ring_of_four", "causal"),
    ("ring", "all_with_keep"),
    *(("ring_contiguous", name) for name in CASES if name != "all_with_keep"),
    *((variant, name) for variant in ("all_gather", "ulysses") for name in CASES),
    *(("ulysses_ring", name) for name in CASES if name != "all_with_keep"),
]


@pytest.mark.parametrize(("variant", "name"), PAIRS)
def test_equals_one_device_with_gradients(variant: str, name: str) -> None:
    sizes, comm, zigzag, _, collectives = VARIANTS[variant]
    mesh, case = make_mesh(**sizes), CASES[name]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, case.G)):
        program, arguments = jitted(mesh, case, comm, zigzag, backward=True)
        compiled = program.lower(*arguments).compile()
        got = [np.asarray(x) for x in jax.tree.leaves(compiled(*arguments))]
    if name == "causal":
        assert count_collectives(compiled.as_text()) == collectives
    inverse = zigzag_inverse(S, mesh.shape["cp"] if zigzag else 1)
    for mine, expected in zip(got, plain(CASES[name]), strict=True):
        mine = mine[:, inverse] if mine.ndim == 4 else mine
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("variant", ["ring_of_four", "all_gather", "ulysses"])
def test_collectives_of_a_forward_pass(variant: str) -> None:
    sizes, comm, zigzag, collectives, _ = VARIANTS[variant]
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 2)):
        program, arguments = jitted(mesh, CASES["causal"], comm, zigzag, backward=False)
        assert count_collectives(program.lower(*arguments).compile().as_text()) == collectives


def test_bf16() -> None:
    mesh, case = make_mesh(cp=2, tp=2), Case(1)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, case.G)):
        program, arguments = jitted(mesh, case, "p2p", False, backward=True, dtype=jnp.bfloat16)
        got = program(*arguments)
    for mine, expected in zip(jax.tree.leaves(got), plain(case), strict=True):
        assert mine.dtype == jnp.bfloat16
        mine = np.asarray(mine.astype(jnp.float32))
        np.testing.assert_allclose(mine, expected, rtol=0.05, atol=0.05)


def test_inside_pipeline_scan_and_checkpoint() -> None:
    mesh, order = make_mesh(pp=2, cp=2, tp=2), zigzag_indices(S, 2)
    *qkv, dy = (jnp.stack([x, x[:, ::-1]]) for x in Case(2).arrays())  # for each of two stages
    weights = jnp.asarray(RNG.normal(size=(2, 2)) + 1.0, jnp.float32)  # stages, layers
    options: dict[str, Any] = {"mask": AttentionMask(True), "scale": SCALE}

    def stage(attend: Any, weights: Any, q: Any, k: Any, v: Any) -> Any:
        layer = jax.checkpoint(lambda q, w: (attend(q * w, k, v * w, **options), None))
        return jax.lax.scan(layer, q, weights)[0]

    def with_gradients(stages: Any) -> Any:
        @jax.jit
        def run(dy: Any, *arguments: Any) -> Any:
            y, vjp = jax.vjp(stages, *arguments)
            return y, *vjp(dy)

        return run

    def one_of_pipeline(*arguments: Any) -> Any:
        attend = partial(context_parallel_attention, comm="p2p", zigzag=True)
        return stage(attend, *(x[0] for x in arguments))[None]

    specs = {"in_specs": PartitionSpec("pp"), "out_specs": PartitionSpec("pp"), "axis_names": {"pp"}}
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 2)):
        pipeline = jax.shard_map(one_of_pipeline, check_vma=False, **specs)
        got = with_gradients(pipeline)(*(x if x.ndim == 2 else x[:, :, order] for x in (dy, weights, *qkv)))
    expected = with_gradients(jax.vmap(partial(stage, dot_product_attention)))(dy, weights, *qkv)
    for mine, theirs in zip(got, expected, strict=True):
        mine = mine if mine.ndim == 2 else mine[:, :, zigzag_inverse(S, 2)]
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=5e-6)


def test_other_keys_than_the_queries_own() -> None:
    mesh = make_mesh(cp=2, ulysses=2)
    q, k, v, _ = Case(2).arrays()
    k, v = k[:, :8], v[:, :8]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 2)):
        attend = partial(context_parallel_attention, mask=AttentionMask(), scale=SCALE, comm="p2p", zigzag=False)
        got = jax.jit(attend)(q, k, v)
    expected = dot_product_attention(q, k, v, mask=AttentionMask(), scale=SCALE)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(
    ("sizes", "comm"), [({"dp": 2, "ulysses": 2, "tp": 2}, "a2a"), ({"cp": 2, "ulysses": 2}, "all_gather")]
)
def test_dropout_is_the_one_of_one_device(
    sizes: dict[str, int], comm: Any, by_kernel: bool, pallas_kernel: Any
) -> None:
    mesh = make_mesh(**sizes)
    q, k, v, _ = Case(2).arrays()
    options: dict[str, Any] = {
        "mask": AttentionMask(True),
        "scale": SCALE,
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(3),
    }
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 2)):
        options |= {"kernel": pallas_kernel} if by_kernel else {}
        got = jax.jit(partial(context_parallel_attention, comm=comm, zigzag=False, **options))(q, k, v)
    options.pop("kernel", None)
    np.testing.assert_allclose(got, dot_product_attention(q, k, v, **options), rtol=2e-5, atol=2e-6)


KERNEL_PAIRS: list[tuple[dict[str, int], Any, Case]] = [
    ({"dp": 2, "tp": 4}, "p2p", Case(1, window=(3, 0), sink=True)),
    ({"cp": 4}, "p2p", Case(2, sink=True)),
    ({"cp": 2, "tp": 2}, "p2p", Case(1, causal=False)),
    ({"ulysses": 2, "tp": 2}, "a2a", Case(1, window=(3, 0), packed=True)),
    ({"cp": 2, "ulysses": 2, "tp": 2}, "a2a+p2p", Case(2)),
    ({"cp": 2, "tp": 2}, "all_gather", Case(2, causal=False)),
]


@pytest.mark.parametrize(("sizes", "comm", "case"), KERNEL_PAIRS)
def test_kernel_on_every_device_equals_plain_attention_on_one(
    sizes: Any, comm: Any, case: Case, reference_kernel: Any
) -> None:
    mesh, zigzag = make_mesh(**sizes), comm != "all_gather"
    seen = []

    def forward(q: Any, k: Any, v: Any, bias: Any, mask: AttentionMask, scale: float) -> Any:
        seen.append((q.shape[1], k.shape[1], mask.causal))
        assert q.shape[0] * mesh.shape["dp"] == B
        assert q.shape[2] * mesh.shape["tp"] * mesh.shape["ulysses"] == N
        return reference_kernel.forward(q, k, v, bias, mask, scale)

    kernel = reference_kernel._replace(forward=forward)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, case.G)):
        program, arguments = jitted(mesh, case, comm, zigzag, backward=True, kernel=kernel)
        got = [np.asarray(x) for x in jax.tree.leaves(program(*arguments))]
    inverse = zigzag_inverse(S, mesh.shape["cp"] if zigzag else 1)
    for mine, expected in zip(got, plain(case), strict=True):
        mine = mine[:, inverse] if mine.ndim == 4 else mine
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6)
    if comm == "p2p" and mesh.shape["cp"] == 4:  # squares, of which the two on the diagonal are causal
        assert seen == [(2, 2, True), (2, 2, False), (2, 2, True), *[(2, 2, False)] * 6]


# As in VARIANTS, and all-reduces: one for sinks, one for the gradients of key/value heads that tp does not divide.
PART_PAIRS: dict[str, tuple[dict[str, int], Any, bool, Case, tuple[int, ...]]] = {
    "ring": ({"cp": 2, "tp": 2}, "p2p", True, Case(2, window=(5, 0), packed=True), (0, 3, 0, 0, 0)),
    "ring_contiguous": ({"cp": 2, "tp": 2}, "p2p", False, Case(1, packed=True, sink=True), (0, 3, 0, 0, 2)),
    "ring_hidden_keys": ({"cp": 2}, "p2p", True, Case(2, few_keys=True), (0, 3, 0, 0, 1)),
    "ring_soft_cap": ({"cp": 2}, "p2p", True, Case(2, softcap=0.5), (0, 3, 0, 0, 0)),
    "ring_window_both_ways": ({"cp": 2}, "p2p", True, Case(2, causal=False, window=(3, 2)), (0, 3, 0, 0, 0)),
    "gather": ({"cp": 2, "tp": 2}, "all_gather", True, Case(2, window=(5, 0), packed=True), (0, 0, 1, 1, 0)),
    "gather_contiguous": ({"cp": 2, "tp": 2}, "all_gather", False, Case(1, packed=True, sink=True), (0, 0, 1, 1, 2)),
    "gather_hidden_keys": ({"cp": 2}, "all_gather", True, Case(2, few_keys=True), (0, 0, 1, 1, 0)),
    "ulysses_ring": ({"cp": 2, "ulysses": 2}, "a2a+p2p", True, Case(2, packed=True), (4, 3, 0, 0, 0)),
    "whole": ({"dp": 2, "tp": 2}, "p2p", False, Case(2, packed=True, few_keys=True), (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", PART_PAIRS)
def test_kernel_for_any_part_takes_windows_documents_and_hidden_keys(name: str, pallas_kernel: Any) -> None:
    sizes, comm, zigzag, case, collectives = PART_PAIRS[name]
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, case.G)):
        program, arguments = jitted(mesh, case, comm, zigzag, backward=True, kernel=pallas_kernel)
        compiled = program.lower(*arguments).compile()
        got = [np.asarray(x) for x in jax.tree.leaves(compiled(*arguments))]
    assert count_all_collectives(compiled.as_text()) == collectives
    inverse = zigzag_inverse(S, mesh.shape["cp"] if zigzag else 1)
    for mine, expected in zip(got, plain(case), strict=True):
        mine = mine[:, inverse] if mine.ndim == 4 else mine
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_cover_what_is_visible_once_and_evenly(n: int, causal: bool) -> None:
    ring, length = Ring("cp", n, True, 1.0, jnp.dtype(jnp.float32)), 4
    order = zigzag_indices(n * length, n).reshape(n, length)
    for rank in range(n):
        count, area = np.zeros((length, n * length), int), 0
        for step in range(n):
            keys = order[(rank - step) % n]
            for block in blocks(ring, AttentionMask(causal), step, rank, length, length):
                q0, k0 = int(block.q_start), int(block.k_start)
                columns = keys[k0 : k0 + block.k_size]
                count[q0 : q0 + block.q_size, columns] += 1
                area += block.q_size * block.k_size
                if causal and not block.causal:
                    assert order[rank][q0] >= columns.max()
        visible = (order[rank][:, None] >= np.arange(n * length)) | (not causal)
        assert (count[visible] == 1).all()
        assert count.max() == 1
        assert area * 4 * n == n * length**2 * ((2 * n + 1) if causal else 4 * n)
        np.testing.assert_array_equal(ring.index(rank, length), order[rank])


def dot_flops(jaxpr: Any) -> int:
    """Multiplications of all matrix products; fails where devices could take different branches."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name not in ("cond", "while")
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += int(np.prod(eqn.outvars[0].aval.shape) * np.prod([shape[dim] for dim in contracted]))
        total += sum(dot_flops(sub) for sub in subjaxprs(eqn.params))
    return total


def subjaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if isinstance(leaf, ClosedJaxpr):
                yield leaf.jaxpr
            elif isinstance(leaf, Jaxpr):
                yield leaf


@pytest.mark.parametrize("backward", [False, True])
def test_every_device_computes_the_same_half_of_the_square(backward: bool) -> None:
    """The program is one for all devices and has no branches, so its products are what each of them computes."""
    mesh, flops = make_mesh(cp=4), {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 2)):
        for causal in (True, False):
            program, arguments = jitted(mesh, Case(2, causal=causal), "p2p", True, backward=backward)
            flops[causal] = dot_flops(jax.make_jaxpr(program)(*arguments).jaxpr)
    # Scores and outputs; backward scores again, and gradients of q, k, v and probabilities.
    assert flops[False] == (7 if backward else 2) * B * N * S * (S // 4) * K
    assert flops[True] * 16 == flops[False] * 9


def test_zigzag_order() -> None:
    assert zigzag_indices(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_inverse(8, 2).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    assert zigzag_indices(5, 1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"12 tokens is not divisible by 8 .*cp_comm_type.*context_parallel_size"):
        zigzag_indices(12, 4)


@pytest.mark.parametrize("shards", [2, 4])
def test_zigzag_gives_every_device_the_tokens_that_megatron_gives_it(golden: Path, shards: int) -> None:
    expected = np.load(golden / "mcore_cp_slices" / "outputs.npz")
    for rank, tokens in enumerate(zigzag_indices(32, shards).reshape(shards, -1)):
        np.testing.assert_array_equal(tokens, expected[f"cp{shards}_rank{rank}"])


@pytest.mark.parametrize(
    ("sizes", "shape", "options", "message"),
    [
        ({"cp": 4}, (B, 12, N, K), {}, "12 tokens is not divisible by 8 .*cp_comm_type.*context_parallel_size"),
        ({"cp": 2, "ulysses": 2}, (B, 14, N, K), {"zigzag": False}, "14 tokens is not divisible by 4 .*cp_comm_type"),
        ({"ulysses": 4, "tp": 2}, (B, 16, 4, K), {}, "num_attention_heads=4 .* context_parallel_size .*cp_comm_type"),
        ({"cp": 2}, (B, S, N, K), {"comm": "a2a"}, "cp_comm_type='a2a' leaves nothing"),
        ({"cp": 2}, (B, S, N, K), {"dropout_rate": 0.1}, "attention_dropout=0.1 .*context_parallel_size"),
    ],
)
def test_mistakes_are_one_line(sizes: Any, shape: Any, options: Any, message: str) -> None:
    mesh, x = make_mesh(**sizes), np.zeros(shape, np.float32)
    options = {"comm": "p2p", "zigzag": True, "dropout_key": jax.random.key(0), **options}
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh, 8)), pytest.raises(ConfigError, match=message) as error:
        jax.eval_shape(partial(context_parallel_attention, mask=AttentionMask(True), scale=1.0, **options), x, x, x)
    assert "\n" not in str(error.value)


def test_without_a_mesh_it_is_plain_attention() -> None:
    q, k, v, _ = Case(2).arrays()
    got = context_parallel_attention(q, k, v, mask=AttentionMask(True), scale=SCALE, comm="p2p", zigzag=True)
    np.testing.assert_array_equal(got, dot_product_attention(q, k, v, mask=AttentionMask(True), scale=SCALE))
