"""Flash attention around a kernel against plain attention; and what cuDNN is asked for against what JAX asks it for."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops import cudnn
from megajax.ops.attention import AttentionMask, dot_product_attention
from megajax.ops.flash_attention import FlashKernel, flash_attention

B, S, T, N, G, K = 2, 12, 8, 4, 2, 8
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


CASES: dict[str, dict[str, Any]] = {
    "causal": {"mask": AttentionMask(causal=True)},
    "cross_with_bias": {"T": T, "bias": normal(1, N, S, T)},
    "causal_bias_of_each_sample": {"mask": AttentionMask(causal=True), "bias": normal(B, N, S, S)},
    "window_sink": {"mask": AttentionMask(causal=True, window=(4, 0)), "sink": normal(N)},
    "off_by_one": {"sink": jnp.zeros(N)},
    "narrow_values": {"mask": AttentionMask(causal=True), "value_size": 4, "sink": normal(N)},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_attention_with_gradients(name: str, reference_kernel: FlashKernel) -> None:
    case = CASES[name]
    mask, value_size = case.get("mask", AttentionMask()), case.get("value_size")
    q, k, v, dy = normal(B, S, N, K), *(normal(B, case.get("T", S), G, K) for _ in "kv"), normal(B, S, N, K)
    if value_size is not None:
        v = v.at[..., value_size:].set(0)
    arguments = {"q": q, "k": k, "v": v, "sink": case.get("sink"), "bias": case.get("bias")}

    def run(attend: Any) -> Any:
        def call(given: dict[str, Any]) -> jax.Array:
            record = AttentionMask(mask.causal, mask.window, bias=given["bias"])
            return attend(given["q"], given["k"], given["v"], mask=record, scale=0.4, sink_N=given["sink"])

        y, vjp = jax.vjp(call, arguments)
        return y, *vjp(dy)

    got = run(partial(flash_attention, kernel=reference_kernel, value_size=value_size))
    expected = run(dot_product_attention)
    if value_size is not None:  # what is known to be zero has no gradient
        expected[1]["v"] = expected[1]["v"].at[..., value_size:].set(0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


CALLS: dict[str, tuple[AttentionMask, dict[str, Any], int]] = {
    "causal": (AttentionMask(causal=True), {"is_causal": True}, G),
    "everything": (AttentionMask(), {}, N),
    "window": (
        AttentionMask(causal=True, window=(4, 0)),
        {"is_causal": True, "local_window_size": (4, 0)},
        G,
    ),
    "bias": (AttentionMask(), {"bias": jnp.ones((1, N, S, S), jnp.bfloat16)}, N),
}


def custom_calls(function: Any, *arguments: Any) -> list[tuple[str, Any, str]]:
    """(target, settings that are not XLA's defaults, types and layouts) of each custom call, lowered for a GPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = []
    for line in text.splitlines():
        match = re.search(r"custom_call @(\S+)\((.*?)\) \{(.*)\} : (.*)", line)
        if match and "cudnn" in match[1]:
            config = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"', match[3])
            assert config is not None
            settings = json.loads(config[1].replace("\\22", '"').replace('\\"', '"'))
            layouts = re.findall(r"(?:operand|result)_layouts = \[.*?\](?=[,} ]|$)", match[3])
            found.append((match[1], _plain(settings), match[4] + str(layouts)))
    return found


def _plain(value: Any) -> Any:
    """Without what a protocol buffer takes for unset; and without dropout's seed where there is no dropout."""
    if isinstance(value, dict):
        inner = {name: _plain(part) for name, part in value.items() if name != "seed"}
        return {name: part for name, part in inner.items() if part not in ([], {}, 0, "0", False, None)}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return {"PRIMITIVE_TYPE_INVALID": None}.get(value, value) if isinstance(value, str) else value


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
@pytest.mark.parametrize("name", CALLS)
def test_cudnn_is_called_as_jax_calls_it(name: str) -> None:
    mask, options, kv_heads = CALLS[name]
    shapes = [(B, S, heads, K) for heads in (N, kv_heads, kv_heads, N)]
    q, k, v, dy = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    bias = options.pop("bias", None)

    def with_gradients(attend: Any) -> Any:
        def run(q: Any, k: Any, v: Any, bias: Any, dy: Any) -> Any:
            y, vjp = jax.vjp(attend, q, k, v, bias)
            return y, vjp(dy)

        return run

    def ours(q: Any, k: Any, v: Any, bias: Any) -> Any:
        record = AttentionMask(mask.causal, mask.window, bias=bias)
        kernel = FlashKernel(cudnn.forward, cudnn.backward)
        return flash_attention(q, k, v, kernel=kernel, mask=record, scale=0.25)

    def jaxs(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=0.25, implementation="cudnn", **options)

    got, expected = (custom_calls(with_gradients(f), q, k, v, bias, dy) for f in (ours, jaxs))
    assert len(expected) == 2
    assert got == expected
