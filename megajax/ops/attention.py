"""Reference attention in plain JAX, and the record that says which keys a query may see."""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, R = N/G, K head size
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from megajax.ops.threefry import bits_of_rows, threshold, words_of

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segment_ids", "kv_segment_ids", "keep", "offset", "bias"],
    meta_fields=["causal", "window", "softcap"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see: the conjunction of all that is given. A record, so that kernels need no dense mask.

    And what else is done to their scores, which has no other place to go along.

    Attributes:
      causal: query i sees keys j <= i + offset.
      window: (left, right): keys j with i - left <= j - offset <= i + right; -1 is unlimited.
      q_segment_ids, kv_segment_ids: int [B, S] and [B, T]; only equal ids see each other.
      keep: bool, broadcastable to [B, 1, S, T]; True = attend.
      offset: index, among the keys, of query 0: the number of keys that a cache held before; None is 0, known before
        the program runs.
      bias: broadcastable to [B, N, S, T]; added to the scaled scores (arXiv:1910.10683).
      softcap: scaled scores, before the bias, become `softcap * tanh(scores / softcap)` (arXiv:2408.00118).
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    keep: Array | None = None
    offset: Array | int | None = None
    bias: Array | None = None
    softcap: float | None = None

    @property
    def start(self) -> Array | int:
        """The offset as a number."""
        return 0 if self.offset is None else self.offset

    def without_cache(self) -> "AttentionMask | None":
        """The mask among the queries' own keys, where it is known before the program runs that no others are to be
        seen: then a cache need not be read, and flash kernels can do it. None where it is not.
        """
        first = isinstance(self.offset, int) and self.offset == 0 and self.causal
        of_all_keys = self.keep is not None or self.bias is not None
        return dataclasses.replace(self, offset=None) if first and not of_all_keys else None

    def dense(self, S: int, T: int) -> Array | None:
        """The same as bool, broadcastable to [B, 1, S, T], True = attend; None when everything is visible."""
        return self.between(jnp.arange(S) + self.start, jnp.arange(T))

    def between(self, q_index_S: Array, k_index_T: Array) -> Array | None:
        """`dense` for queries and keys with these indices in the sequence; ids and `keep` are of just these, too."""
        parts: list[Array] = []
        distance = k_index_T[None, :] - q_index_S[:, None]
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


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`: within (-cap, cap), and almost x where that is small. None leaves x alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Array, cap: float) -> Array:
    """The derivative of `soft_cap`, from its value."""
    return 1.0 - jnp.square(capped / cap)


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
    dropout_kept_BNST: Array | None = None,
) -> Array:
    """Scaled dot-product attention (arXiv:1706.03762) with grouped keys and values. Returns [B, S, N, K].

    Query head n reads key/value head n // (N/G). Megatron: `core/transformer/dot_product_attention.py`.

    Args:
      dropout_kept_BNST: bool, what `attention_dropout_kept` returns; then `dropout_key` is not used.
    """
    B, S, N, _ = q_BSNK.shape
    T, G = k_BTGK.shape[1:3]
    q_BGRSK = q_BSNK.reshape(B, S, G, N // G, -1).transpose(0, 2, 3, 1, 4)
    k_BGTK, v_BGTK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, mask.softcap)
    if mask.bias is not None:
        scores += mask.bias.reshape(-1, G, N // G, S, T)
    scores = scores.astype(softmax_dtype)
    keep = mask.dense(S, T)
    if keep is not None:
        # The lowest finite number, not -inf: a row with every key masked attends uniformly, as in Megatron, not NaN.
        scores = jnp.where(keep[:, :, None], scores, jnp.finfo(softmax_dtype).min)
    sink = None if sink_N is None else sink_N.astype(softmax_dtype).reshape(1, G, N // G, 1, 1)
    probs = softmax_with_sink(scores, sink)
    if dropout_rate > 0.0 and dropout_key is not None and dropout_kept_BNST is None:
        dropout_kept_BNST = attention_dropout_kept(dropout_key, dropout_rate, (B, N, S, T))
    if dropout_kept_BNST is not None:
        probs = jnp.where(dropout_kept_BNST.reshape(probs.shape), probs / (1.0 - dropout_rate), 0.0)
    y_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", probs.astype(v_BTGK.dtype), v_BGTK)
    return y_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, S, N, -1)


@partial(
    jax.tree_util.register_dataclass, data_fields=["key_data", "first_row"], meta_fields=["rate", "heads", "S", "T"]
)
@dataclasses.dataclass(frozen=True)
class DropoutRecord:
    """Which attention probabilities dropout keeps, for kernels that find it out themselves: the rows of what
    `attention_dropout_kept` returns for a shape [B, heads, S, T], read as [B heads S, T], from one on.

    Attributes:
      key_data: uint32 [2], of a key of JAX's threefry2x32.
      first_row: of the first sample, head and query that is at hand.
    """

    key_data: Array
    first_row: Array | int
    rate: float
    heads: int
    S: int
    T: int

    @classmethod
    def of(
        cls, key: Array, rate: float, shape: tuple[int, int, int, int], first_row: Array | int = 0
    ) -> "DropoutRecord":
        """Of an array of this shape.

        Raises:
          ValueError: the key is of another generator.
        """
        if str(jax.random.key_impl(key)) != "threefry2x32":
            raise ValueError(f"attention dropout in a kernel needs a threefry2x32 key, not {jax.random.key_impl(key)}")
        return cls(jax.random.key_data(key), first_row, rate, *shape[1:])

    def of_sample(self, sample: Array | int) -> "DropoutRecord":
        """From this sample on."""
        return dataclasses.replace(self, first_row=sample * self.heads * self.S)

    def kept(self, B: int, N: int, S: int) -> Array:
        """What it says of so many samples, heads and queries from the first row on: bool [B, N, S, T]."""
        sample, head, query, key = jnp.ix_(*(jnp.arange(size, dtype=jnp.int32) for size in (B, N, S, self.T)))
        row = self.first_row + (sample * self.heads + head) * self.S + query
        return bits_of_rows(words_of(self.key_data), row, self.T, key) < threshold(1.0 - self.rate)


def attention_dropout_kept(key: Array, rate: float, shape: tuple[int, int, int, int]) -> Array:
    """Which attention probabilities dropout keeps: bool [B, N, S, T]."""
    return jax.random.bernoulli(key, 1.0 - rate, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Attention to a part of the keys, and its gradients: what ring attention is made of (FlashAttention's recurrences,
# arXiv:2307.08691). `keep` is bool, broadcastable to [B, 1, S, T], or None; outputs and gradients are fp32.


def attention_block(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    keep: Array | None,
    *,
    scale: float,
    softmax_dtype: jnp.dtype,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Attention to these keys alone: output [B, S, N, K] and log-sum-exp of the scores [B, S, N].

    Where no key is visible the output is 0 and the log-sum-exp -inf. Blocks are put together by `merge_blocks`.
    """
    scores_BGRST = _block_scores(q_BSNK, k_BTGK, scale, softcap).astype(softmax_dtype).astype(jnp.float32)
    if keep is not None:
        scores_BGRST = jnp.where(keep[:, :, None], scores_BGRST, -jnp.inf)
    top = jnp.max(scores_BGRST, axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(scores_BGRST - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0.0, 1.0, total)).astype(v_BTGK.dtype)
    y_BSGRK = jnp.einsum("BGRST,BTGK->BSGRK", weights, v_BTGK, preferred_element_type=jnp.float32)
    lse_BGRS = (top + jnp.log(total))[..., 0]
    B, S, N, K = q_BSNK.shape
    return y_BSGRK.reshape(B, S, N, K), lse_BGRS.transpose(0, 3, 1, 2).reshape(B, S, N)


def merge_blocks(y_BSNK: Array, lse_BSN: Array, other_y_BSNK: Array, other_lse_BSN: Array) -> tuple[Array, Array]:
    """Attention to the keys of two blocks, from the results of each. A sink is a block of output 0."""
    lse_BSN, first_lse_BSN = jnp.logaddexp(lse_BSN, other_lse_BSN), lse_BSN
    top_BSN = jnp.where(jnp.isneginf(lse_BSN), 0.0, lse_BSN)
    first_BSN1, other_BSN1 = (jnp.exp(part - top_BSN)[..., None] for part in (first_lse_BSN, other_lse_BSN))
    return y_BSNK * first_BSN1 + other_y_BSNK * other_BSN1, lse_BSN


def attention_block_gradients(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    keep: Array | None,
    *,
    dy_BSNK: Array,
    lse_BSN: Array,
    delta_BSN: Array,
    scale: float,
    softmax_dtype: jnp.dtype,
    softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    """What one block of keys adds to the gradients of q, and the gradients of its k and v; the block is recomputed.

    Args:
      dy_BSNK: cotangent of the output of attention to all keys.
      lse_BSN: fp32 log-sum-exp of the scores of all keys, and of the sink if there is one.
      delta_BSN: fp32, sum over K of dy * output.
    """
    B, S, N, K = q_BSNK.shape
    G = k_BTGK.shape[2]

    def grouped(x_BSN: Array) -> Array:
        return x_BSN.reshape(B, S, G, N // G).transpose(0, 2, 3, 1)[..., None]

    scores = _block_scores(q_BSNK, k_BTGK, scale, softcap)
    probs = jnp.exp(scores.astype(softmax_dtype).astype(jnp.float32) - grouped(lse_BSN))
    if keep is not None:
        probs = jnp.where(keep[:, :, None], probs, 0.0)
    q_BSGRK, dy_BSGRK = (x.reshape(B, S, G, N // G, K) for x in (q_BSNK, dy_BSNK))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv_BTGK = product("BGRST,BSGRK->BTGK", probs.astype(dy_BSNK.dtype), dy_BSGRK)
    dprobs = product("BSGRK,BTGK->BGRST", dy_BSGRK, v_BTGK)
    dscores = probs * (dprobs - grouped(delta_BSN)) * scale
    dscores = dscores if softcap is None else dscores * soft_cap_slope(scores, softcap)
    dscores = dscores.astype(q_BSNK.dtype)
    dq_BSGRK = product("BGRST,BTGK->BSGRK", dscores, k_BTGK)
    dk_BTGK = product("BGRST,BSGRK->BTGK", dscores, q_BSGRK)
    return dq_BSGRK.reshape(B, S, N, K), dk_BTGK, dv_BTGK


def _block_scores(q_BSNK: Array, k_BTGK: Array, scale: float, softcap: float | None) -> Array:
    B, S, N, K = q_BSNK.shape
    G = k_BTGK.shape[2]
    q_BSGRK = q_BSNK.reshape(B, S, G, N // G, K)
    scores = jnp.einsum("BSGRK,BTGK->BGRST", q_BSGRK, k_BTGK, preferred_element_type=jnp.float32)
    return soft_cap(scores * scale, softcap)
