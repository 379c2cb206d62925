"""Masks, softmaxes and reference attention against Megatron's softmax and float64 arithmetic."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.attention import AttentionMask, dot_product_attention


def probabilities(scores: Any, mask: AttentionMask, *, scale: float = 1.0, sink: Any = None) -> Any:
    """The probabilities of `dot_product_attention` for given scores [B, N, S, T]: identity keys read them from the
    queries, identity values write them out."""
    eye = jnp.broadcast_to(jnp.eye(scores.shape[-1])[None, :, None], (scores.shape[0], scores.shape[-1], 1, 12))
    q = jnp.asarray(scores).transpose(0, 2, 1, 3)
    y = dot_product_attention(q, eye, eye, mask=mask, scale=scale, sink_N=sink)
    return y.transpose(0, 2, 1, 3)


CAUSAL = AttentionMask(causal=True)


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        ("causal", CAUSAL, {}),
        ("causal_scale3", CAUSAL, {"scale": 3.0}),
        ("nomask", AttentionMask(), {}),
        ("window_3_0", AttentionMask(window=(3, 0)), {}),
        ("window_0_0", AttentionMask(window=(0, 0)), {}),
        ("window_5_2", AttentionMask(window=(5, 2)), {}),
        ("window_11_0", AttentionMask(window=(11, 0)), {}),
        ("window_11_0", AttentionMask(causal=True, window=(-1, -1)), {}),
        ("window_3_0", AttentionMask(causal=True, window=(3, 5)), {}),
        ("causal_sink", CAUSAL, {"sink": "softmax_offset"}),
        ("window_3_0_sink", AttentionMask(window=(3, 0)), {"sink": "softmax_offset"}),
        ("causal_offbyone", CAUSAL, {"sink": 0.0}),
    ],
)
def test_masks_and_softmaxes_equal_megatrons(golden: Path, name: str, mask: AttentionMask, options: Any) -> None:
    inputs, expected = (np.load(golden / "mcore_softmax" / f"{file}.npz") for file in ("inputs", "outputs"))
    sink = options.get("sink")
    sink = jnp.asarray(inputs[sink]) if isinstance(sink, str) else None if sink is None else jnp.zeros(4)
    got = probabilities(inputs["scores"], mask, scale=options.get("scale", 1.0), sink=sink)
    np.testing.assert_allclose(got, expected[name], atol=1e-6, rtol=1e-5)


def test_padding_mask_equals_megatrons_also_where_every_key_is_masked(golden: Path) -> None:
    inputs, expected = (np.load(golden / "mcore_softmax" / f"{file}.npz") for file in ("inputs", "outputs"))
    keep = ~inputs["mask"]  # Megatron: True = masked out
    got = probabilities(inputs["scores"], AttentionMask(keep=jnp.asarray(keep)))
    assert (~keep[1, 0, 4]).all()
    np.testing.assert_allclose(got, expected["padding"], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(got[1, :, 4], 1 / 12, rtol=1e-6)


def float64_attention(q: Any, k: Any, v: Any, keep: Any, scale: float, sink: Any) -> np.ndarray:
    """Head by head, query by query."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(*q.shape[:3]):
        g = n // (q.shape[2] // k.shape[2])
        visible = np.flatnonzero(keep[b, s])
        scores = k[b, visible, g] @ q[b, s, n] * scale
        denominator = np.exp(scores).sum() + (0 if sink is None else np.exp(sink[n]))
        out[b, s, n] = np.exp(scores) / denominator @ v[b, visible, g]
    return out


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_attention_in_float64(groups: int, with_sink: bool) -> None:
    rng = np.random.default_rng(groups)
    B, S, T, N, K = 2, 5, 9, 6, 4
    q, k, v = (rng.normal(size=(B, length, heads, K)).astype(np.float32) for length, heads in
               ((S, N), (T, groups), (T, groups)))  # fmt: skip
    segments = np.sort(rng.integers(0, 2, size=(B, T)), axis=1)
    sink = rng.normal(size=N).astype(np.float32) if with_sink else None
    offset = T - S
    mask = AttentionMask(
        causal=True,
        window=(6, -1),
        q_segment_ids=jnp.asarray(segments[:, offset:]),
        kv_segment_ids=jnp.asarray(segments),
        offset=offset,
    )
    query, key = np.arange(S)[:, None] + offset, np.arange(T)[None]
    keep = (key <= query) & (key >= query - 6)
    keep = keep[None] & (segments[:, offset:, None] == segments[:, None, :])
    got = dot_product_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask=mask, scale=0.4,
        sink_N=None if sink is None else jnp.asarray(sink),
    )  # fmt: skip
    np.testing.assert_allclose(got, float64_attention(q, k, v, keep, 0.4, sink), atol=2e-6, rtol=1e-5)


def test_dropout_keeps_the_mean_and_repeats_with_its_key() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 8, 2, 4)), jnp.float32) for _ in range(3))

    def attend(seed: Any) -> Any:
        key = jax.random.key(seed)
        return dot_product_attention(q, k, v, mask=CAUSAL, scale=1.0, dropout_rate=0.5, dropout_key=key)

    np.testing.assert_array_equal(attend(0), attend(0))
    assert not np.array_equal(attend(0), attend(1))
    plain = dot_product_attention(q, k, v, mask=CAUSAL, scale=1.0)
    np.testing.assert_allclose(jnp.mean(jax.vmap(attend)(jnp.arange(4000)), axis=0), plain, atol=0.12)


def test_soft_cap_in_float64() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(1, 4, 1, 8)).astype(np.float32) for _ in range(3))
    scores = 1.5 * q[0, :, 0].astype(np.float64) @ k[0, :, 0].T
    weights = np.exp(2.0 * np.tanh(scores / 2.0))
    expected = weights / weights.sum(-1, keepdims=True) @ v[0, :, 0]
    got = dot_product_attention(*map(jnp.asarray, (q, k, v)), mask=AttentionMask(softcap=2.0), scale=1.5)
    np.testing.assert_allclose(got[0, :, 0], expected, atol=2e-6, rtol=1e-5)
