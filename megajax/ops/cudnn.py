"""cuDNN's flash attention, forward and backward, as XLA:GPU calls it.

Not by `jax.nn.dot_product_attention`, which makes the same calls: it keeps to itself the fp32 log-sum-exp, which sinks
and the parts of a ring need; it takes no other head size for values, and it looks at the GPU of this machine where the
program may be for another. What is called, with which settings, is XLA's `CudnnfMHABackendConfig`, in
xla/service/gpu/backend_configs.proto; tests compare it with JAX's own calls.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, K head size, V head size of values
import json
from typing import Any

import jax
import jax.numpy as jnp

from megajax.ops.attention import AttentionMask

Array = jax.Array

_ELEMENT_TYPES = {"bfloat16": "BF16", "float16": "F16"}
_HEADS_SECOND = (0, 2, 1, 3)
"""How cuDNN leaves [B, N, S, K] in memory, major to minor: as [B, S, N, K]."""


def forward(
    q_BSNK: Array, k_BTGK: Array, v_BTGV: Array, bias_BNST: Array | None, mask: AttentionMask, scale: float
) -> tuple[Array, Array]:
    """Output [B, S, N, V] and fp32 log-sum-exp of the scores [B, S, N]. bf16 or fp16; bias [1 or B, N, S, T].

    Of the mask, causality counts, and with it a window to the left; `megajax.kernels` refuses the rest.
    """
    B, S, N, _ = q_BSNK.shape
    results = (
        jax.ShapeDtypeStruct((B, N, S, v_BTGV.shape[-1]), q_BSNK.dtype),
        jax.ShapeDtypeStruct((B, N, S), jnp.float32),
        jax.ShapeDtypeStruct((0,), jnp.uint8),  # grows to the workspace that cuDNN wants
    )
    bias = [] if bias_BNST is None else [bias_BNST.astype(q_BSNK.dtype)]
    y_BNSV, lse_BNS, _ = jax.ffi.ffi_call(
        "__cudnn$fmhaScaleBiasSoftmax" if bias else "__cudnn$fmhaSoftmax",
        results,
        output_layouts=(_HEADS_SECOND, (0, 1, 2), (0,)),
        custom_call_api_version=2,
        legacy_backend_config=_settings(q_BSNK, k_BTGK.shape[1], mask, scale, _FORWARD_PRODUCTS),
    )(q_BSNK, k_BTGK, v_BTGV, *bias)
    return y_BNSV.transpose(0, 2, 1, 3), lse_BNS.transpose(0, 2, 1)


def backward(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGV: Array,
    bias_BNST: Array | None,
    mask: AttentionMask,
    scale: float,
    y_BSNV: Array,
    lse_BSN: Array,
    dy_BSNV: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v, each in its dtype, and of the bias.

    y, lse: of attention to all keys and the sink, where these keys are a part of them: cuDNN reads from them what each
    probability was, so the gradients of the parts add up (arXiv:2307.08691).
    """
    like = [
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)
        for x in (q_BSNK, k_BTGK, v_BTGV)
    ]
    layouts: list[tuple[int, ...]] = [_HEADS_SECOND] * 3
    bias = []
    if bias_BNST is not None:
        bias = [bias_BNST.astype(q_BSNK.dtype)]
        like.append(jax.ShapeDtypeStruct(bias[0].shape, bias[0].dtype))
        layouts.append((0, 1, 2, 3))
    lse_BNS = lse_BSN.transpose(0, 2, 1)
    dq, dk, dv, *rest = jax.ffi.ffi_call(
        "__cudnn$fmhaScaleBiasSoftmaxBackward" if bias else "__cudnn$fmhaSoftmaxBackward",
        (*like, jax.ShapeDtypeStruct((0,), jnp.uint8)),
        output_layouts=(*layouts, (0,)),
        custom_call_api_version=2,
        legacy_backend_config=_settings(q_BSNK, k_BTGK.shape[1], mask, scale, _BACKWARD_PRODUCTS),
    )(q_BSNK, k_BTGK, v_BTGV, lse_BNS, dy_BSNV.astype(q_BSNK.dtype), *bias, y_BSNV)
    dbias = rest[0].astype(bias_BNST.dtype) if bias_BNST is not None else None
    return dq.transpose(0, 2, 1, 3), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), dbias


# Product -> contracted dims of left and right, and their batch dims. Heads are dim 2 of q, k, v and dim 1 of scores.
_FORWARD_PRODUCTS = {
    "bmm1_dot_dimension_numbers": (3, 3, (0, 2), (0, 2)),  # q k -> scores
    "bmm2_dot_dimension_numbers": (3, 1, (0, 1), (0, 2)),  # probabilities v -> y
}
_BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1_dot_dimension_numbers": (2, 1, (0, 1), (0, 2)),  # dscores q -> dk
    "bmm1_grad_gemm2_dot_dimension_numbers": (3, 1, (0, 1), (0, 2)),  # dscores k -> dq
    "bmm2_grad_gemm1_dot_dimension_numbers": (2, 1, (0, 1), (0, 2)),  # probabilities dy -> dv
    "bmm2_grad_gemm2_dot_dimension_numbers": (3, 3, (0, 2), (0, 2)),  # dy v -> dprobabilities
}


def _settings(q_BSNK: Array, T: int, mask: AttentionMask, scale: float, products: dict[str, Any]) -> str:
    B, S, N, _ = q_BSNK.shape
    left = -1 if mask.window is None else mask.window[0]
    config = {
        # The numbers that XLA looks for; cuDNN itself picks the algorithm.
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
        },
        "fmha_scale": float(scale),
        "intermediate_tensor_shape": {
            "element_type": _ELEMENT_TYPES[q_BSNK.dtype.name],
            "dimensions": [str(size) for size in (B, N, S, T)],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL" if mask.causal else "NO_MASK",
        "sliding_window_length": left + 1,  # counts the query's own key; 0 is no window
        "max_seg_per_batch": 1,
    }
    for name, (left_dim, right_dim, left_batch, right_batch) in products.items():
        config[name] = {
            "lhs_contracting_dimensions": [str(left_dim)],
            "rhs_contracting_dimensions": [str(right_dim)],
            "lhs_batch_dimensions": [str(dim) for dim in left_batch],
            "rhs_batch_dimensions": [str(dim) for dim in right_batch],
        }
    return json.dumps({"cudnn_fmha_backend_config": config})
