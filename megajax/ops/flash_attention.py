"""Attention by a kernel that never holds all probabilities, with sinks, whatever the kernel."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, K head size, V head size of values
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megajax.ops import cudnn, pallas_attention
from megajax.ops.attention import AttentionMask, DropoutRecord

Array = jax.Array


class FlashKernel(NamedTuple):
    """A pair of functions, called as those of `megajax.ops.cudnn`.

    any_part: it can attend to a part of a sequence as if it saw the whole: it knows offsets, and windows, documents and
      hidden keys with them.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array, Array | None]]
    any_part: bool = False


KERNELS: Mapping[str, FlashKernel] = MappingProxyType(
    {
        "cudnn": FlashKernel(cudnn.forward, cudnn.backward),
        "pallas": FlashKernel(pallas_attention.forward, pallas_attention.backward, any_part=True),
    }
)
"""Name in `megajax.kernels` -> what computes it."""


def flash_attention(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    *,
    kernel: FlashKernel,
    mask: AttentionMask,
    scale: float,
    sink_N: Array | None = None,
    value_size: int | None = None,
    dropout: DropoutRecord | None = None,
) -> Array:
    """`dot_product_attention` by a kernel that can do this mask. Returns [B, S, N, K].

    Only inputs, output and log-sum-exp are kept for the backward pass.

    Args:
      value_size: features of v from this one on are zero, and so are the output's; the kernel is spared them.
      dropout: which probabilities are kept, for a kernel that can find out; none is dropped where no key is seen.
    """
    K, V = q_BSNK.shape[-1], value_size or v_BTGK.shape[-1]
    y_BSNV = jnp.asarray(_flash(kernel, scale, q_BSNK, k_BTGK, v_BTGK[..., :V], sink_N, mask.bias, mask, dropout))
    return y_BSNV if V == K else jnp.pad(y_BSNV, ((0, 0), (0, 0), (0, 0), (0, K - V)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(
    kernel: FlashKernel,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    sink_N: Array | None,
    bias: Array | None,
    mask: AttentionMask,
    dropout: DropoutRecord | None,
) -> Array:
    return _flash_forward(kernel, scale, q, k, v, sink_N, bias, mask, dropout)[0]


def _flash_forward(kernel, scale, q, k, v, sink_N, bias, mask, dropout):
    options = {} if dropout is None else {"dropout": dropout}
    y, lse_BSN = kernel.forward(q, k, v, bias, mask, scale, **options)
    if sink_N is not None:
        # One more logit in the denominator. In its place in log-sum-exp and output, the backward pass needs no other.
        sink_N = sink_N.astype(jnp.float32)
        y = (y.astype(jnp.float32) * jax.nn.sigmoid(lse_BSN - sink_N)[..., None]).astype(y.dtype)
        lse_BSN = jnp.logaddexp(lse_BSN, sink_N)
    elif mask.keep is not None:
        # As in Megatron, a query that sees no key attends to every one equally.
        mean_BGV = jnp.mean(v.astype(jnp.float32), axis=1)
        mean_BNV = jnp.repeat(mean_BGV, q.shape[2] // v.shape[2], axis=1).astype(y.dtype)
        y = jnp.where(jnp.isneginf(lse_BSN)[..., None], mean_BNV[:, None], y)
    return y, (q, k, v, sink_N, bias, mask, dropout, y, lse_BSN)


def _flash_backward(kernel, scale, kept, dy):
    q, k, v, sink_N, bias, mask, dropout, y, lse_BSN = kept
    options = {} if dropout is None else {"dropout": dropout}
    dq, dk, dv, dbias = kernel.backward(q, k, v, bias, mask, scale, y, lse_BSN, dy, **options)
    dsink_N = None
    if sink_N is not None:
        dsink_N = sink_gradient(sink_N, lse_BSN, y, dy)
    elif mask.keep is not None:
        blind_dy = jnp.where(jnp.isneginf(lse_BSN)[..., None], dy.astype(jnp.float32), 0.0)
        B, T, G, V = v.shape
        dmean_BGV = jnp.sum(blind_dy, axis=1).reshape(B, G, -1, V).sum(2)
        dv = (dv.astype(jnp.float32) + dmean_BGV[:, None] / T).astype(dv.dtype)
    return dq, dk, dv, dsink_N, dbias, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def sink_gradient(sink_N: Array, lse_BSN: Array, y_BSNV: Array, dy_BSNV: Array) -> Array:
    """Gradient of the sinks [N], from a log-sum-exp and an output that know of them."""
    delta_BSN = jnp.sum(dy_BSNV.astype(jnp.float32) * y_BSNV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(sink_N - lse_BSN) * delta_BSN, axis=(0, 1))
