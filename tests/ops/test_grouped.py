"""Placement, capacity and dropping against Megatron-Core's numbers; the grouped product against a loop over experts."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops import grouped
from megajax.parallel.aot import absent_gpus
from megajax.parallel.hlo import executed, flops_of

# Compiled as one program each; op by op they would be dozens.
place_grouped = jax.jit(grouped.place_grouped, static_argnums=(1, 2, 3))
drop = jax.jit(grouped.drop, static_argnums=(2, 3, 4))
permute, unpermute = jax.jit(grouped.permute), jax.jit(grouped.unpermute)


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, Any]:
    """Megatron-Core 0.16.1's moe_utils on 24 tokens, 8 experts, 2 a token."""
    folder = golden / "mcore_moe_dispatch"
    arrays: dict[str, Any] = {**np.load(folder / "inputs.npz"), **np.load(folder / "outputs.npz")}
    arrays["ids"] = np.nonzero(arrays["routing_map"])[1].reshape(24, 2).astype(np.int32)
    arrays["chosen"] = np.take_along_axis(arrays["probs"], arrays["ids"], 1)
    return arrays


def test_capacity(case: dict[str, Any]) -> None:
    """Megatron's table: tokens times top-k, experts, and ceil(tokens * K / E * factor) for three factors each."""
    for (assignments, experts, expected, _), factor in zip(case["capacity"], (0.5, 1.0, 1.25) * 6, strict=True):
        assert grouped.capacity(int(assignments), 1, int(experts), factor) == expected
    assert grouped.capacity(24, 2, 8, 6.0) == 24, "no expert gets more rows than there are tokens"


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 6.0])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping(case: dict[str, Any], factor: float, policy: grouped.DropPolicy) -> None:
    limit = grouped.capacity(24, 2, 8, factor)
    kept = np.asarray(drop(case["ids"], case["chosen"], 8, limit, policy))
    mask = np.zeros((24, 9), bool)
    np.put_along_axis(mask, kept, True, 1)
    expected = case[f"drop_cf{factor}_{policy}_pad0/map"].astype(bool)
    if policy == "probs":
        np.testing.assert_array_equal(mask[:, :8], expected)
    # Which tokens stay is the order of torch.topk's ties there; here the first ones do.
    np.testing.assert_array_equal(mask[:, :8].sum(0), expected.sum(0))
    for e in range(8):
        first = np.flatnonzero(case["routing_map"][:, e])[:limit]
        assert policy == "probs" or np.flatnonzero(mask[:, e]).tolist() == first.tolist()


def test_permutation(case: dict[str, Any]) -> None:
    ids = jnp.asarray(case["ids"])
    where, groups = place_grouped(ids, 8, 48, 1)
    np.testing.assert_array_equal(groups.sizes, case["routing_map"].sum(0))
    np.testing.assert_array_equal(np.asarray(where.source) // 2, case["permute/sorted_indices"])
    x = permute(jnp.asarray(case["tokens"]), where)
    np.testing.assert_array_equal(x, case["permute/tokens"])
    np.testing.assert_array_equal(grouped.permute_choices(jnp.asarray(case["chosen"]), where), case["permute/probs"])
    np.testing.assert_allclose(unpermute(x, where), case["unpermute/noprobs"], rtol=1e-6)


def test_groups_are_rounded_up() -> None:
    """Blocks of 4; expert 1 has no token, id 3 and -1 mean nobody."""
    ids = jnp.array([[0, 2], [2, 3], [2, -1], [2, 0], [2, 3]], jnp.int32)
    where, groups = place_grouped(ids, 3, 16, 4)
    assert groups.sizes.tolist() == [4, 0, 8]
    assert where.rows.tolist() == [[0, 4], [5, 16], [6, 16], [7, 1], [8, 16]]
    assert groups.expert_of_row(16).tolist() == [0] * 4 + [2] * 8 + [3] * 4
    assert permute(jnp.arange(1.0, 6.0), where).tolist() == [1, 4, 0, 0, 1, 2, 3, 4, 5] + [0] * 7
    bias = grouped.grouped_bias(jnp.array([[1.0], [2.0], [3.0]]), jnp.zeros((16, 1)), groups)
    assert bias[:, 0].tolist() == [1.0] * 4 + [3.0] * 8 + [0.0] * 4


@pytest.mark.parametrize(("rows", "block"), [(0, 128), (1, 128), (2047, 128), (2048, 256), (4096, 512), (10**6, 512)])
def test_blocks_grow_with_the_rows(rows: int, block: int) -> None:
    assert grouped.block_for(rows, 128, 512) == block
    assert grouped.block_for(rows, 128, 128) == 128


def test_permute_and_unpermute_are_transposes() -> None:
    r = np.random.default_rng(0)
    ids = jnp.array([r.permutation(5)[:3] for _ in range(6)], jnp.int32)
    where, _ = place_grouped(ids, 4, 40, 4)
    x, y = (jnp.array(r.normal(size=(n, 2)), jnp.float32) for n in (6, 40))
    inner = jnp.vdot(permute(x, where), y)
    np.testing.assert_allclose(inner, jnp.vdot(x, unpermute(y, where)), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(lambda a: permute(a, where), x)[1](y)[0], unpermute(y, where))
    np.testing.assert_allclose(jax.vjp(lambda a: unpermute(a, where), y)[1](x)[0], permute(x, where))


def test_grouped_matmul_and_gradients() -> None:
    """Against a loop over experts; rows behind the last group are never read, whatever they hold."""
    sizes, block = [4, 0, 8], 4
    r = np.random.default_rng(0)
    x, w, dy = (r.normal(size=size).astype(np.float32) for size in ((20, 3), (3, 3, 5), (20, 5)))
    x[12:] = np.nan
    groups = grouped.Groups(jnp.array(sizes), block)

    @jax.jit
    def product(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, groups), x, w)
        return y, *pull(dy)

    y, dx, dw = (np.asarray(a) for a in product(x, w, dy))
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        np.testing.assert_allclose(y[start:end], x[start:end] @ w[e], rtol=1e-5)
        np.testing.assert_allclose(dx[start:end], dy[start:end] @ w[e].T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dw[e], x[start:end].T @ dy[start:end], rtol=1e-5, atol=1e-6)
    assert not y[12:].any() and not dx[12:].any()
    padded = grouped.grouped_matmul(jnp.array(x[:12].reshape(3, 4, 3)), jnp.array(w), None)
    np.testing.assert_allclose(padded[1], x[4:8] @ w[1], rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
def test_the_h100_program_computes_no_row_for_another_expert() -> None:
    """Forward, and both gradients: each product is of one block of rows and one expert, in a loop over the blocks that
    hold rows. XLA's own `ragged_dot` is dense there."""
    E, R, D, F, block = 16, 1024, 256, 512, 128
    place = jax.sharding.SingleDeviceSharding(absent_gpus(1)[0])
    shapes = ((R, D), jnp.bfloat16), ((E, D, F), jnp.bfloat16), ((E,), jnp.int32), ((R, F), jnp.bfloat16)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]

    def products(function: Any) -> list[tuple[int, tuple[int | None, ...]]]:
        text = str(jax.jit(function).lower(*arguments).compile().as_text())
        found = [pair for pair in executed(text) if pair[0].opcode == "dot" or "__cublas$" in pair[0].attributes]
        return [(flops_of(instruction), where.loops) for instruction, where in found]

    def ours(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, grouped.Groups(sizes, block)), x, w)
        return y, *vjp(dy)

    def dense(x: Any, w: Any, sizes: Any, dy: Any) -> Any:
        del dy
        return jax.lax.ragged_dot(x, w, sizes)

    assert products(ours) == [(2 * block * D * F, (None,))] * 3
    assert products(dense) == [(2 * E * R * D * F, ())]
