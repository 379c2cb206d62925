"""Reference attention in plain JAX, and the record that says which keys a query may see."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, R = N/G, K head size
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segment_ids", "kv_segment_ids", "keep", "offset"],
    meta_fields=["causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see: the conjunction of all that is given. A record, so that kernels need no dense mask.

    Attributes:
      causal: query i sees keys j <= i + offset.
      window: (left, right): keys j with i - left <= j - offset <= i + right; -1 is unlimited.
      q_segment_ids, kv_segment_ids: int [B, S] and [B, T]; only equal ids see each other.
      keep: bool, broadcastable to [B, 1, S, T]; True = attend.
      offset: index, among the keys, of query 0: the number of keys that a cache held before.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    keep: Array | None = None
    offset: Array | int = 0

    def dense(self, S: int, T: int) -> Array | None:
        """The same as bool, broadcastable to [B, 1, S, T], True = attend; None when everything is visible."""
        parts: list[Array] = []
        distance = jnp.arange(T)[None, :] - (jnp.arange(S)[:, None] + self.offset)
        if self.causal:
            parts.append(distance <= 0)
        if self.window is not None:
            left, right = self.window
            parts += [distance >= -left] if left >= 0 else []
            parts += [distance <= right] if right >= 0 else []
        parts = [part[None, None] for part in parts]
        if self.q_segment_ids is not None and self.kv_segment_ids is not None:
            parts.append((self.q_segment_ids[:, :, None] == self.kv_segment_ids[:, None, :])[:, None])
        if self.keep is not None:
            parts.append(self.keep)
        mask = None
        for part in parts:
            mask = part if mask is None else mask & part
        return mask


def softmax_with_sink(scores: Array, sink: Array | float | None) -> Array:
    """Softmax over the last dim with one more logit `sink` in the denominator, which takes weight and gives nothing.

    scores [..., T]; sink broadcastable to [..., 1] or None. 0 is "off-by-one" softmax, a parameter per head is
    "learnable" (Megatron `softmax_type`).
    """
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))


def dot_product_attention(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    sink_N: Array | None = None,
    softmax_dtype: jnp.dtype = jnp.dtype(jnp.float32),
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Scaled dot-product attention (arXiv:1706.03762) with grouped keys and values. Returns [B, S, N, K].

    Query head n reads key/value head n // (N/G). Megatron: `core/transformer/dot_product_attention.py`.
    """
    B, S, N, _ = q_BSNK.shape
    T, G = k_BTGK.shape[1:3]
    q_BGRSK = q_BSNK.reshape(B, S, G, N // G, -1).transpose(0, 2, 3, 1, 4)
    k_BGTK, v_BGTK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32)
    scores = (scores * scale).astype(softmax_dtype)
    keep = mask.dense(S, T)
    if keep is not None:
        # The lowest finite number, not -inf: a row with every key masked attends uniformly, as in Megatron, not NaN.
        scores = jnp.where(keep[:, :, None], scores, jnp.finfo(softmax_dtype).min)
    sink = None if sink_N is None else sink_N.astype(softmax_dtype).reshape(1, G, N // G, 1, 1)
    probs = softmax_with_sink(scores, sink)
    if dropout_rate > 0.0 and dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, probs.shape)
        probs = jnp.where(kept, probs / (1.0 - dropout_rate), 0.0)
    y_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", probs.astype(v_BTGK.dtype), v_BGTK)
    return y_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, S, N, -1)
