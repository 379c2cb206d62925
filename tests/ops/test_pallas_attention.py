"""The Pallas kernels, interpreted, against plain attention: outputs and gradients for every mask that they know."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from megajax.ops.attention import AttentionMask, DropoutRecord, dot_product_attention
from megajax.ops.block_reach import pairs_of, reach, segment_ids, visible_blocks
from megajax.ops.flash_attention import FlashKernel, flash_attention
from megajax.ops.threefry import threefry2x32, times

B, S, N, G, K = 2, 72, 4, 2, 16
RNG = np.random.default_rng(0)
DOCUMENTS = jnp.asarray(np.repeat([[3, 5, 4], [7, 1, 2]], [30, 9, 33], axis=1))
PADDED = jnp.arange(S) < jnp.array([[40], [11]])


def keys(keep: Any) -> jax.Array:
    return jnp.asarray(keep)[:, None, None, :]


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is asked for."""

    mask: AttentionMask
    T: int = S
    G: int = G
    K: int = K
    value_size: int | None = None
    sink: str = ""
    dropout: float = 0.0
    bias: int | None = None
    """Number of samples that the bias is for."""


packed = partial(AttentionMask, q_segment_ids=DOCUMENTS, kv_segment_ids=DOCUMENTS)
CASES = {
    "causal": Case(AttentionMask(causal=True)),
    "everything": Case(AttentionMask(), G=4),
    "one_kv_head": Case(AttentionMask(causal=True), G=1),
    "packed": Case(packed(causal=True)),
    "packed_both_ways": Case(packed()),
    "packed_window_sink": Case(packed(causal=True, window=(12, 0)), sink="learned"),
    "padded": Case(AttentionMask(keep=keys(PADDED))),
    "one_mask_for_all_samples": Case(AttentionMask(keep=keys(PADDED[:1]))),
    "padded_on_the_left": Case(AttentionMask(causal=True, keep=keys(~PADDED))),
    "nothing_to_see": Case(AttentionMask(keep=keys(PADDED & jnp.array([[True], [False]])))),
    "nothing_to_see_sink": Case(AttentionMask(keep=keys(PADDED & jnp.array([[False], [True]]))), sink="learned"),
    "scattered_keys": Case(packed(causal=True, keep=keys(RNG.random((B, S)) > 0.4))),
    "window_both_ways": Case(AttentionMask(window=(20, 3))),
    "window_ahead": Case(AttentionMask(window=(-1, 5))),
    "later_queries": Case(AttentionMask(causal=True, offset=24), T=96),
    "later_queries_window": Case(AttentionMask(causal=True, window=(30, 0), offset=jnp.int32(20)), T=96),
    "keys_from_before": Case(AttentionMask(causal=True, window=(90, 0), offset=jnp.int32(31)), T=32),
    "cross": Case(AttentionMask(keep=keys(jnp.arange(40) < jnp.array([[33], [7]]))), T=40),
    "off_by_one": Case(AttentionMask(causal=True), sink="zero"),
    "heads_of_80": Case(AttentionMask(causal=True), K=80),
    "heads_of_20": Case(packed(causal=True), K=20),
    "bias": Case(AttentionMask(keep=keys(PADDED)), G=4, bias=1),
    "causal_bias": Case(packed(causal=True), bias=1, sink="learned"),
    "bias_of_each_sample": Case(AttentionMask(causal=True), bias=B),
    "cross_bias": Case(AttentionMask(keep=keys(jnp.arange(40)[None] < 23)), T=40, bias=B),
    "dropout": Case(AttentionMask(causal=True), dropout=0.3),
    "dropout_packed_sink": Case(packed(causal=True), sink="learned", dropout=0.1),
    "dropout_bias_cross": Case(AttentionMask(keep=keys(jnp.arange(40)[None] < 23)), T=40, bias=1, dropout=0.5),
    "soft_cap": Case(packed(causal=True, softcap=0.7)),
    "soft_cap_bias_sink": Case(AttentionMask(causal=True, window=(12, 0), softcap=1.1), bias=B, sink="learned"),
    "narrow_values": Case(packed(causal=True), K=24, value_size=16),
}


def normal_of(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


normal = partial(normal_of, RNG)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_attention_with_gradients(name: str, pallas_kernel: FlashKernel) -> None:
    case = CASES[name]
    seed = list(CASES).index(name)
    normal = partial(normal_of, np.random.default_rng(seed))
    q, k, v, dy = normal(B, S, N, case.K), *(normal(B, case.T, case.G, case.K) for _ in "kv"), normal(B, S, N, case.K)
    if case.value_size is not None:
        v = v.at[..., case.value_size :].set(0)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "sink": {"": None, "zero": jnp.zeros(N), "learned": normal(N)}[case.sink],
        "bias": None if case.bias is None else normal(case.bias, N, S, case.T),
    }

    @partial(jax.jit, static_argnums=0)
    def run(attend: Any, arrays: dict[str, Any]) -> Any:
        def call(given: dict[str, Any]) -> jax.Array:
            mask = dataclasses.replace(case.mask, bias=given["bias"])
            options = {"mask": mask, "scale": 1.6 * case.K**-0.5, "sink_N": given["sink"]}
            return attend(given["q"], given["k"], given["v"], **options)

        y, vjp = jax.vjp(call, arrays)
        return y, *vjp(dy)

    flash, plain = partial(flash_attention, kernel=pallas_kernel, value_size=case.value_size), dot_product_attention
    if case.dropout:
        key = jax.random.key(seed)
        flash = partial(flash, dropout=DropoutRecord.of(key, case.dropout, (B, N, S, case.T)))
        plain = partial(plain, dropout_rate=case.dropout, dropout_key=key)
    got, expected = run(flash, arrays), run(plain, arrays)
    if case.value_size is not None:  # what is known to be zero has no gradient
        expected[1]["v"] = expected[1]["v"].at[..., case.value_size :].set(0)
    jax.tree.map(assert_equal, got, expected)


def assert_equal(got: jax.Array, expected: jax.Array) -> None:
    """But for roundings of sums, whose parts are as large as the largest result; plain attention's are as large."""
    largest = max(1.0, float(jnp.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6 * largest)


def test_what_is_dropped_far_into_a_large_array_is_what_jax_drops() -> None:
    """Where an element's index no longer fits into 32 bits."""
    key, T, rows = jax.random.key(5), 2**20 + 3, np.array([0, 1, 4095, 4096, 10**6, 2**31 - 1, 2**31, 2**32 - 1])
    words = jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32)
    high, low = times(jnp.asarray(rows.astype(np.uint32).view(np.int32)), T)
    products = rows.astype(object) * T
    assert [int(x) for x in np.asarray(high).view(np.uint32)] == [x >> 32 for x in products]
    assert [int(x) for x in np.asarray(low).view(np.uint32)] == [x % 2**32 for x in products]
    got = np.stack(threefry2x32(words[0], words[1], high, low)).view(np.uint32)
    counters = jnp.concatenate([high, low]).view(jnp.uint32)
    np.testing.assert_array_equal(got.reshape(-1), threefry_2x32(jax.random.key_data(key), counters))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_inputs_and_results_only(dtype: Any, pallas_kernel: FlashKernel) -> None:
    q, k, v = (normal(B, S, heads, K).astype(dtype) for heads in (N, G, G))
    mask = packed(causal=True)
    got = flash_attention(q, k, v, kernel=pallas_kernel, mask=mask, scale=0.4)
    assert got.dtype == dtype
    expected = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask=mask, scale=0.4)
    np.testing.assert_allclose(got, expected, atol=2 * float(jnp.finfo(dtype).eps) * float(jnp.abs(v).max()))


def test_where_a_part_sees_nothing_it_says_so(pallas_kernel: FlashKernel) -> None:
    """A ring puts parts together by their log-sum-exp."""
    q, k = normal(1, 32, N, K), normal(1, 32, G, K)
    y, lse = pallas_kernel.forward(q, k, k, None, AttentionMask(causal=True, offset=jnp.int32(-20)), 0.4)
    assert (np.asarray(lse) == -np.inf).all(axis=2).sum() == 20
    assert (np.asarray(y)[0, :20] == 0).all()
    dq, dk, dv, _ = pallas_kernel.backward(
        q, k, k, None, AttentionMask(causal=True, offset=jnp.int32(-20)), 0.4, y, lse, jnp.ones_like(y)
    )
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))
    assert (np.asarray(dq)[0, :20] == 0).all()
    assert (np.asarray(dk)[0, 12:] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_are_skipped_hold_nothing_visible(name: str) -> None:
    mask, T = CASES[name].mask, CASES[name].T
    rows, columns = 8, 4
    visible = np.asarray(visible_blocks(mask, segment_ids(mask, (S, T), (S, T)), (S, T), (rows, columns)))
    dense = mask.dense(S, T)
    dense = np.ones((1, 1, S, T), bool) if dense is None else np.broadcast_to(dense, (*dense.shape[:2], S, T))
    needed = dense[:, 0].reshape(-1, S // rows, rows, T // columns, columns).any((2, 4))
    assert (visible >= needed).all()
    first, end = np.moveaxis(np.asarray(reach(visible, mask.start)), -1, 0)[:2]
    between = (np.arange(T // columns) >= first[..., None]) & (np.arange(T // columns) < end[..., None])
    assert (between >= needed).all()


def visited(mask: AttentionMask) -> int:
    """Blocks of 8 queries and 8 keys of one sample."""
    visible = visible_blocks(mask, segment_ids(mask, (64, 64), (64, 64)), (64, 64), (8, 8))
    first, end = np.moveaxis(np.asarray(reach(visible, 0)), -1, 0)[:2]
    return int((end - first).sum())


def test_work_is_that_of_what_is_visible() -> None:
    documents = jnp.repeat(jnp.arange(4), 16)[None]
    assert visited(AttentionMask()) == 8 * 8
    assert visited(AttentionMask(causal=True)) == 8 * 9 // 2
    assert visited(AttentionMask(causal=True, window=(8, 0))) == 1 + 7 * 2
    assert visited(AttentionMask(False, None, documents, documents)) == 4 * 2 * 2
    assert visited(AttentionMask(True, None, documents, documents)) == 4 * 3
    assert pairs_of(AttentionMask(causal=True), (64, 64), (8, 8)) == 64 * visited(AttentionMask(causal=True))
    assert pairs_of(AttentionMask(causal=True, offset=jnp.int32(3)), (64, 64), (8, 8)) == 64 * 64 // 2
    assert visited(AttentionMask(keep=(jnp.arange(64) < 20)[None, None, None])) == 8 * 3
