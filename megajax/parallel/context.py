"""Context parallelism: attention over a sequence that is divided over the mesh, as one manual region.

Two mesh axes divide the sequence, the outer first. Over `ulysses` the sequence is traded for heads (arXiv:2309.14509);
over `cp` keys and values are gathered, or travel around a ring (arXiv:2310.01889). Megatron leaves this to Transformer
Engine (`cp_comm_type`).
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, K head size
import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.config import ConfigError
from megajax.ops.attention import AttentionMask, DropoutRecord, attention_dropout_kept, dot_product_attention
from megajax.ops.flash_attention import FlashKernel, flash_attention
from megajax.parallel.mesh import CP, ULYSSES
from megajax.parallel.replicas import axes_apart, parts_apart
from megajax.parallel.ring_attention import Ring, ring_attention
from megajax.parallel.sharding import spec_of
from megajax.parallel.token_order import require_divides, zigzag_inverse

Array = jax.Array


def context_parallel_attention(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    *,
    mask: AttentionMask,
    scale: float,
    comm: Literal["p2p", "all_gather", "a2a", "a2a+p2p"],
    zigzag: bool,
    sink_N: Array | None = None,
    softmax_dtype: jnp.dtype = jnp.dtype(jnp.float32),
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    kernel: FlashKernel | None = None,
    value_size: int | None = None,
) -> Array:
    """`dot_product_attention` on the mesh in context, of global arrays laid out by the sharding table in context.

    Manual over every mesh axis that divides q, k or v, so that the local kernel sees plain arrays. Without a mesh or a
    table, and where the sequence is whole and attention is the plain one, XLA alone lays things out.

    Args:
      q_BSNK, k_BTGK, v_BTGK: S and T sharded over ("cp", "ulysses").
      mask: segment ids and `keep` in the same order of rows as q and k; a token sees itself unless `keep` forbids it.
        The offset must be 0: there is no cache under context parallelism.
      comm: between the devices of "cp", "p2p" (or "a2a+p2p") or "all_gather". Heads are traded whenever "ulysses" > 1.
      zigzag: rows are in the order of `zigzag_indices(S, size of cp)`; causality and window mean the tokens' indices.
      kernel: computes it in place of plain JAX; `megajax.kernels` knows what each can do, and is to be asked before.
      value_size: as in `flash_attention`.

    Raises:
      ConfigError: sizes that do not divide; dropout where its mask would have to differ from one device's.
    """
    layout = _Layout.in_context()
    B, N, (S, T) = q_BSNK.shape[0], q_BSNK.shape[2], (x.shape[1] * parts_apart("seq") for x in (q_BSNK, k_BTGK))
    shape = (B * parts_apart("batch"), N, S, T)
    key, apart = dropout_key if dropout_rate > 0.0 else None, parts_apart("batch") * parts_apart("seq") > 1
    told = kernel is not None or apart
    kept = DropoutRecord.of(key, dropout_rate, shape) if told and key is not None else None
    if layout is None or (layout.cp == layout.ulysses == 1 and kernel is None):
        part = None
        if kept is not None and kernel is None:
            part = kept.of_sample(_first(axes_apart("batch"), B)).kept(B, N, S)
        drop = {"dropout_rate": dropout_rate, "dropout_key": key, "dropout_kept_BNST": part}
        attend = partial(dot_product_attention, softmax_dtype=softmax_dtype, **drop)
        if kernel is not None:
            attend = partial(flash_attention, kernel=kernel, value_size=value_size, dropout=kept)
        return attend(q_BSNK, k_BTGK, v_BTGK, mask=mask, scale=scale, sink_N=sink_N)
    layout.check(q_BSNK, k_BTGK, zigzag)
    ring = comm in ("p2p", "a2a+p2p") and layout.cp > 1
    zigzag = zigzag and layout.cp > 1
    dropped = dropout_rate if key is not None else 0.0
    _refuse(layout, comm, biased=mask.bias is not None, dropped=dropped, ring=ring or zigzag)
    if key is not None and not told:
        # Outside of the manual region, where it is the same whatever the mesh; every device makes its part.
        kept = attention_dropout_kept(key, dropout_rate, shape)
    seen = AttentionMask(mask.causal, mask.window, softcap=mask.softcap)
    region = _Region(layout, ring, zigzag, seen, scale, softmax_dtype, dropout_rate, kernel, value_size)
    return region(q_BSNK, k_BTGK, v_BTGK, sink_N, mask, kept)


def _refuse(layout: "_Layout", comm: str, *, biased: bool, dropped: float, ring: bool) -> None:
    """Raises ConfigError for what would differ from one device, or is not there."""
    if layout.cp > 1 and comm == "a2a":
        raise ConfigError(f"cp_comm_type='a2a' leaves nothing to divide over {CP}={layout.cp}; use 'a2a+p2p'")
    if biased and layout.cp * layout.ulysses > 1:
        raise ConfigError(
            "a relative position bias is not possible with context_parallel_size > 1; set it to 1, or use"
            " position_embedding_type='rope'"
        )
    if dropped and ring:
        raise ConfigError(
            f"attention_dropout={dropped} with context_parallel_size > 1 needs cp_comm_type='a2a' or 'all_gather';"
            " set attention_dropout to 0"
        )


def _first(axes: tuple[str, ...], size: int) -> Array | int:
    """The index, among those of all devices of these axes, of the first of the `size` that each has."""
    return jax.lax.axis_index(axes) * size if axes else 0


def divides_keys() -> bool:
    """Whether, on the mesh in context, keys travel around a ring or are gathered."""
    layout = _Layout.in_context()
    return layout is not None and layout.cp > 1


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which mesh axes divide batch, heads and sequence, and the sizes of the latter: 1 if they do not.

    batch, seq: without those that divide them between replicas, in a region around this one.
    """

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    seq: tuple[str, ...]
    cp: int
    ulysses: int
    tp: int
    """Shards of the query heads before heads are traded."""

    @classmethod
    def in_context(cls) -> "_Layout | None":
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return None

        def axes(logical: str) -> tuple[str, ...]:
            entry = spec_of((logical,), rules, where="attention")[0] or ()
            entry = (entry,) if isinstance(entry, str) else entry
            return tuple(axis for axis in entry if axis not in mesh.manual_axes)

        heads, seq = axes("act_heads"), axes("seq")
        tp = math.prod(mesh.shape[axis] for axis in heads)
        cp, ulysses = (mesh.shape[axis] if axis in seq + axes_apart("seq") else 1 for axis in (CP, ULYSSES))
        return cls(axes("batch"), heads, axes("act_kv_heads"), seq, cp, ulysses, tp)

    @property
    def queries(self) -> tuple[str, ...]:
        """Axes that divide the queries while attention is computed: of the sequence, those that trade no heads."""
        return tuple(axis for axis in self.seq if axis != ULYSSES)

    @property
    def traded_heads(self) -> tuple[str, ...]:
        """Axes that divide the heads while attention is computed."""
        return (*self.heads, *(axis for axis in self.seq if axis == ULYSSES))

    def check(self, q_BSNK: Array, k_BTGK: Array, zigzag: bool) -> None:
        parts = parts_apart("seq")
        for length in (q_BSNK.shape[1] * parts, k_BTGK.shape[1] * parts):
            require_divides(length, self.cp * self.ulysses, "context_parallel_size")
            if zigzag and self.cp > 1:
                require_divides(length, 2 * self.cp, "twice the p2p or all_gather part of context_parallel_size")
        heads = q_BSNK.shape[2]
        if heads % (self.tp * self.ulysses):
            raise ConfigError(
                f"num_attention_heads={heads} is not divisible by tensor_model_parallel_size={self.tp} times the"
                f" {self.ulysses} of context_parallel_size that cp_comm_type trades for heads; use p2p or all_gather"
            )


@dataclasses.dataclass(frozen=True)
class _Region:
    """What runs on one device; calling it enters the manual region."""

    layout: _Layout
    ring: bool
    zigzag: bool
    seen: AttentionMask
    """What of the mask is no array."""
    scale: float
    softmax_dtype: jnp.dtype
    dropout_rate: float
    kernel: FlashKernel | None
    value_size: int | None

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        sink_N: Array | None,
        mask: AttentionMask,
        kept: Array | DropoutRecord | None,
    ) -> Array:
        to = self.layout
        mask = self._with_others(mask)
        batch, heads, traded = to.batch or None, to.heads or None, to.traded_heads or None
        seq, queries = to.seq or None, to.queries or None
        q_spec = PartitionSpec(batch, seq, heads)
        kv_spec = PartitionSpec(batch, seq, to.kv_heads or None)
        keep_spec = PartitionSpec()
        if mask.keep is not None:
            rows = (batch if mask.keep.shape[0] > 1 else None, None, queries if mask.keep.shape[2] > 1 else None)
            keep_spec = PartitionSpec(*rows)
        dtype = q.dtype
        if to.kv_heads != to.heads:  # The gradients of all copies are summed where the region begins: in fp32.
            k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        attend = jax.shard_map(
            partial(self.on_device, dtype),
            in_specs=(
                *(q_spec, kv_spec, kv_spec),
                PartitionSpec(heads),
                # Ids are small: those of the keys are collected rather than sent around.
                *(PartitionSpec(batch, queries), PartitionSpec(batch)),
                keep_spec,
                PartitionSpec() if isinstance(kept, DropoutRecord) else PartitionSpec(batch, traded, queries),
                PartitionSpec(batch if mask.bias is not None and mask.bias.shape[0] > 1 else None, heads),
            ),
            out_specs=q_spec,
            axis_names={*to.batch, *to.seq, *to.heads},
            check_vma=False,
        )
        return attend(q, k, v, sink_N, mask.q_segment_ids, mask.kv_segment_ids, mask.keep, kept, mask.bias)

    def _with_others(self, mask: AttentionMask) -> AttentionMask:
        """Where replicas have parts of a sequence: what the region reads of the mask beyond its own part. For queries
        that is what their heads are traded for."""
        everyone, traders = axes_apart("seq"), tuple(axis for axis in axes_apart("seq") if axis == ULYSSES)

        def gathered(x: Array | None, dim: int, axes: tuple[str, ...]) -> Array | None:
            if x is None or not axes or x.shape[dim] == 1:
                return x
            return jax.lax.all_gather(x, axes, axis=dim, tiled=True)

        return dataclasses.replace(
            mask,
            q_segment_ids=gathered(mask.q_segment_ids, 1, traders),
            kv_segment_ids=gathered(mask.kv_segment_ids, 1, everyone),
            keep=gathered(gathered(mask.keep, 2, traders), 3, everyone),
        )

    def on_device(
        self,
        dtype: jnp.dtype,
        q: Array,
        k: Array,
        v: Array,
        sink: Array | None,
        q_ids: Array | None,
        kv_ids: Array | None,
        keep: Array | None,
        kept: Array | DropoutRecord | None,
        bias: Array | None,
    ) -> Array:
        k, v = (self._needed_heads(x, q.shape[2]).astype(dtype) for x in (k, v))
        if self.layout.ulysses > 1:
            q, k, v, sink = self._trade_sequence_for_heads(q, k, v, sink)
        mask = dataclasses.replace(self.seen, q_segment_ids=q_ids, kv_segment_ids=kv_ids, keep=keep, bias=bias)
        if self.ring:
            ring = Ring(CP, self.layout.cp, self.zigzag, self.scale, self.softmax_dtype, self.kernel)
            sink = None if sink is None else sink.astype(self.softmax_dtype).astype(jnp.float32)
            y = jnp.asarray(ring_attention(ring, q, k, v, sink, mask))
        else:
            y = self._gathered(q, k, v, sink, mask, kept)
        if self.layout.ulysses > 1:
            y = jax.lax.all_to_all(y, ULYSSES, split_axis=1, concat_axis=2, tiled=True)
        return y

    def _needed_heads(self, x_BTGK: Array, N: int) -> Array:
        """The key/value heads of this device's N query heads, where all are held because tp does not divide them."""
        layout, G = self.layout, x_BTGK.shape[2]
        if layout.kv_heads == layout.heads:
            return x_BTGK
        group = N * layout.tp // G  # query heads that share one
        count = max(N // group, 1)
        first = jax.lax.axis_index(layout.heads) * N // group
        return jax.lax.dynamic_slice_in_dim(x_BTGK, first, count, axis=2)

    def _trade_sequence_for_heads(
        self, q: Array, k: Array, v: Array, sink: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        """q, k and v in one all-to-all. Key/value heads fewer than devices are copied to those who need them."""
        u, (B, S, N, K) = self.layout.ulysses, q.shape
        copies = u // math.gcd(u, k.shape[2])
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        if k.shape[1] == S:
            parts = [x.reshape(B, S, u, -1, K) for x in (q, k, v)]
            qkv = jax.lax.all_to_all(jnp.concatenate(parts, axis=3), ULYSSES, split_axis=2, concat_axis=1, tiled=True)
            heads, kv_heads = N // u, k.shape[2] // u
            q, k, v = jnp.split(qkv[:, :, 0], (heads, heads + kv_heads), axis=2)
        else:
            q, k, v = (jax.lax.all_to_all(x, ULYSSES, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        if sink is not None:
            sink = jax.lax.dynamic_slice_in_dim(sink, jax.lax.axis_index(ULYSSES) * (N // u), N // u)
        return q, k, v, sink

    def _own_part(self, dropout: DropoutRecord, B: int, S: int, N: int) -> DropoutRecord:
        """What is dropped of this device's samples, heads and queries, which lie in the order of the devices."""
        to, apart = self.layout, axes_apart("seq")
        traded = tuple(axis for axis in apart if axis == ULYSSES)
        kept_apart = tuple(axis for axis in apart if axis != ULYSSES)
        axes = axes_apart("batch") + to.batch, to.traded_heads + traded, kept_apart + to.queries
        sample, head, query = (_first(names, size) for names, size in zip(axes, (B, N, S), strict=True))
        dropout = dropout.of_sample(sample)
        return dataclasses.replace(dropout, first_row=dropout.first_row + head * dropout.S + query)

    def _gathered(
        self, q: Array, k: Array, v: Array, sink: Array | None, mask: AttentionMask, kept: Array | DropoutRecord | None
    ) -> Array:
        """Attention to all keys, which are collected from the devices of `cp`."""
        B, S, N = q.shape[:3]
        if self.kernel is None:
            attend = partial(dot_product_attention, softmax_dtype=self.softmax_dtype)
            if isinstance(kept, DropoutRecord):
                kept = self._own_part(kept, B, S, N).kept(B, N, S)
            if kept is not None:
                attend = partial(attend, dropout_rate=self.dropout_rate, dropout_kept_BNST=kept)
        else:
            attend = partial(flash_attention, kernel=self.kernel, value_size=self.value_size)
            if isinstance(kept, DropoutRecord):
                attend = partial(attend, dropout=self._own_part(kept, B, S, N))
        attend = partial(attend, scale=self.scale, sink_N=sink)
        if self.layout.cp == 1:
            return attend(q, k, v, mask=mask)
        n, rank = self.layout.cp, jax.lax.axis_index(CP)
        T = n * k.shape[1]
        kv = jax.lax.all_gather(jnp.stack((k, v)), CP, axis=2, tiled=True)
        if not self.zigzag:
            placed = mask.causal or mask.window is not None
            return attend(q, *kv, mask=dataclasses.replace(mask, offset=rank * S) if placed else mask)
        order = zigzag_inverse(T, n)
        kv = jnp.take(kv, order, axis=2)
        # The early chunk is in the first half of the sequence, so causality hides all that follows from it. Unless
        # `keep` hides the rest: then it attends to all keys equally.
        seen = min(T, n * S // 2) if mask.causal and mask.keep is None else T
        chunks = [(slice(0, S // 2), rank, seen), (slice(S // 2, S), 2 * n - 1 - rank, T)]
        parts = []
        for rows, chunk, keys in chunks:
            chunk_mask = dataclasses.replace(_part_of(mask, rows, order[:keys]), offset=chunk * (S // 2))
            parts.append(attend(q[:, rows], *kv[:, :, :keys], mask=chunk_mask))
        return jnp.concatenate(parts, axis=1)


def _part_of(mask: AttentionMask, rows: slice, columns: np.ndarray) -> AttentionMask:
    """The mask of some queries and some keys."""
    keep, q_ids, kv_ids = mask.keep, mask.q_segment_ids, mask.kv_segment_ids
    if keep is not None:
        keep = keep if keep.shape[2] == 1 else keep[:, :, rows]
        keep = keep if keep.shape[3] == 1 else keep[..., columns]
    return dataclasses.replace(
        mask,
        q_segment_ids=None if q_ids is None else q_ids[:, rows],
        kv_segment_ids=None if kv_ids is None else kv_ids[:, columns],
        keep=keep,
    )
