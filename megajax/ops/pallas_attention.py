"""Flash attention in Pallas, compiled by Triton: for what cuDNN lacks, above all masks, in memory that grows as S.

What a block computes is in `megajax.ops.flash_kernels`, which blocks there are to visit in `megajax.ops.block_reach`;
here are their sizes, and which part of each array a block reads.
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S query length, T key length, N query heads, G key/value heads, R = N/G, K head size, V head size of values
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.xla_metadata import set_xla_metadata

from megajax.ops.attention import AttentionMask, DropoutRecord
from megajax.ops.block_reach import pairs_of, reach, segment_ids, visible_blocks
from megajax.ops.flash_kernels import (
    Dropout,
    Inputs,
    Problem,
    Upstream,
    attention_backward_bias,
    attention_backward_kv,
    attention_backward_q,
    attention_forward,
)
from megajax.ops.threefry import threshold, words_of

Array = jax.Array

_LEAST = 16
"""Rows and features of the smallest of Triton's matrix products."""


class Blocks(NamedTuple):
    """Queries and keys that a kernel holds at once, powers of two; and Triton's settings."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2

    def fitting(self, S: int, T: int) -> "Blocks":
        """No larger than sequences of these lengths."""
        rows, columns = (max(_LEAST, pl.next_power_of_2(length)) for length in (S, T))
        return self._replace(queries=min(self.queries, rows), keys=min(self.keys, columns))


class Tuning(NamedTuple):
    """Blocks of each kernel: keys stay in `backward_kv` while queries pass by, and the reverse in the others."""

    forward: Blocks
    backward_q: Blocks
    backward_kv: Blocks
    backward_bias: Blocks


_TUNING = {
    64: Tuning(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2), Blocks(64, 64, 4, 2)),
    128: Tuning(Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 128, 8, 2), Blocks(64, 64, 8, 1)),
    256: Tuning(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 8, 1)),
    512: Tuning(Blocks(32, 16, 8, 1), Blocks(32, 16, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1)),
}
"""Largest head size -> blocks that fit into the shared memory of an A100 (163 KiB a block of threads; H100: 227)."""


class Work(NamedTuple):
    """FLOPs for a pair of a query and a key, and those of them that another kernel has done before."""

    flops: int
    again: int = 0


def tuning_for(head_dim: int) -> Tuning:
    """The blocks for heads of this size."""
    return _TUNING[min(size for size in _TUNING if size >= head_dim)]


def forward(
    q_BSNK: Array,
    k_BTGK: Array,
    v_BTGV: Array,
    bias_BNST: Array | None,
    mask: AttentionMask,
    scale: float,
    *,
    dropout: DropoutRecord | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Output [B, S, N, V] and fp32 log-sum-exp of the scores [B, S, N]: 0 and -inf where a query sees no key.

    Args:
      bias_BNST: [1 or B, N, S, T].
      mask: `keep` is of keys, [1 or B, 1, 1, 1 or T]; the offset may be negative; the bias in it is not used.
      interpret: runs on any device, slowly: for tests.
    """
    (B, S, N, K), V = q_BSNK.shape, v_BTGV.shape[-1]
    blocks = (tuning or tuning_for(max(K, V))).forward
    call = _Call.of(attention_forward, blocks, q_BSNK, k_BTGK, v_BTGV, bias_BNST, mask, scale, dropout, interpret)
    specs, rows, values = call.query_specs(), call.inputs.q.shape[1], call.inputs.v.shape[-1]
    y_BSNV, lse_BNS = call.run(
        (rows // call.problem.own, N, B),
        [(call.inputs, specs.inputs)],
        [
            (jax.ShapeDtypeStruct((B, rows, N, values), q_BSNK.dtype), specs.upstream.dy),
            (jax.ShapeDtypeStruct((B, N, rows), jnp.float32), specs.upstream.lse),
        ],
        Work(2 * (K + V)),
    )
    return y_BSNV[:, :S, :, :V], lse_BNS[:, :, :S].transpose(0, 2, 1)


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
    *,
    dropout: DropoutRecord | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and the bias, each in its dtype; arguments as of `megajax.ops.cudnn.backward`."""
    (B, S, N, K), (_, T, G, _), V = q_BSNK.shape, k_BTGK.shape, v_BTGV.shape[-1]
    blocks, upstream = tuning or tuning_for(max(K, V)), _upstream(y_BSNV, lse_BSN, dy_BSNV.astype(q_BSNK.dtype))
    arguments = q_BSNK, k_BTGK, v_BTGV, bias_BNST, mask, scale, dropout, interpret

    call = _Call.of(attention_backward_q, blocks.backward_q, *arguments)
    specs, q = call.query_specs(), call.inputs.q
    [dq_BSNK] = call.run(
        (q.shape[1] // call.problem.own, N, B),
        [(call.inputs, specs.inputs), (call.filled(upstream), specs.upstream)],
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), specs.inputs.q)],
        Work(2 * (2 * K + V), again=2 * K),
    )
    call = _Call.of(attention_backward_kv, blocks.backward_kv, *arguments)
    specs, k, v = call.key_specs(), call.inputs.k, call.inputs.v
    dk_BTGK, dv_BTGV = call.run(
        (k.shape[1] // call.problem.own, G, B),
        [(call.inputs, specs.inputs), (call.filled(upstream), specs.upstream)],
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), spec) for x, spec in ((k, specs.inputs.k), (v, specs.inputs.v))],
        Work(4 * (K + V), again=2 * (K + V)),
    )
    dbias_BNST = None
    if bias_BNST is not None:
        call = _Call.of(attention_backward_bias, blocks.backward_bias, *arguments)
        specs, bias = call.bias_specs(), call.inputs.bias
        (samples, _, rows, columns), (own, other) = bias.shape, (call.problem.own, call.problem.other)
        [dbias_BNST] = call.run(
            (rows // own, columns // other, samples * N),
            [(call.inputs, specs.inputs), (call.filled(upstream), specs.upstream)],
            [(jax.ShapeDtypeStruct(bias.shape, bias.dtype), specs.inputs.bias)],
            Work(2 * (K + V), again=2 * (K + V)),
        )
        dbias_BNST = dbias_BNST[:, :, :S, :T]
    return dq_BSNK[:, :S, :, :K], dk_BTGK[:, :T, :, :K], dv_BTGV[:, :T, :, :V], dbias_BNST


def _upstream(y_BSNV: Array, lse_BSN: Array, dy_BSNV: Array) -> Upstream:
    delta_BSN = jnp.sum(dy_BSNV.astype(jnp.float32) * y_BSNV.astype(jnp.float32), axis=-1)
    # Where no key was visible, all probabilities are 0.
    lse_BSN = jnp.where(jnp.isneginf(lse_BSN), jnp.inf, lse_BSN)
    return Upstream(dy_BSNV, lse_BSN.transpose(0, 2, 1), delta_BSN.transpose(0, 2, 1))


class _Specs(NamedTuple):
    """Which part of each array a block of threads reads; outputs are divided as one of these."""

    inputs: Inputs
    upstream: Upstream


@dataclasses.dataclass(frozen=True)
class _Call:
    """A kernel and its inputs, filled up to whole blocks and to sizes that Triton takes.

    Attributes:
      pairs: of queries and keys that it computes, of all heads and samples, as if there were one document.
    """

    kernel: Callable[..., None]
    problem: Problem
    inputs: Inputs
    blocks: Blocks
    pairs: int
    interpret: bool

    @classmethod
    def of(
        cls, kernel: Callable[..., None], blocks: Blocks, q: Array, k: Array, v: Array, bias: Array | None,
        mask: AttentionMask, scale: float, dropout: DropoutRecord | None, interpret: bool,
    ) -> "_Call":  # fmt: skip
        lengths = q.shape[1], k.shape[1]
        blocks = blocks.fitting(*lengths)
        rows, columns = sizes = blocks.queries, blocks.keys
        q, k, v = (_fill(_fill(x, 1, size), 3, _LEAST) for x, size in ((q, rows), (k, columns), (v, columns)))
        bias = None if bias is None else _fill(_fill(bias, 2, rows), 3, columns)
        filled = q.shape[1], k.shape[1]
        ids = segment_ids(mask, lengths, filled)
        visible = visible_blocks(mask, ids, filled, sizes)
        own, other = sizes
        if kernel is attention_backward_kv:
            visible, own, other = visible.swapaxes(1, 2), columns, rows
        return cls(
            kernel,
            Problem(
                scale, mask.causal, *(mask.window or (-1, -1)), q.shape[2], own, other, _static(dropout), mask.softcap
            ),
            Inputs(reach(visible, mask.start), q, k, v, *(ids or (None, None)), bias, _words(dropout)),
            blocks,
            q.shape[0] * q.shape[2] * pairs_of(mask, filled, sizes),
            interpret,
        )

    def filled(self, upstream: Upstream) -> Upstream:
        """As the inputs are."""
        rows, (dy, lse, delta) = self.blocks.queries, upstream
        return Upstream(_fill(_fill(dy, 1, rows), 3, _LEAST), _fill(lse, 2, rows, jnp.inf), _fill(delta, 2, rows))

    def query_specs(self) -> _Specs:
        """For a block of queries of one head: all keys of the head that it reads."""
        inputs, rows = self.inputs, self.blocks.queries
        (_, T, G, K), V = inputs.k.shape, inputs.v.shape[-1]
        group = inputs.q.shape[2] // G
        numbers = pl.BlockSpec((None, None, rows), lambda i, n, b: (b, n, i))
        return _Specs(
            Inputs(
                reach=_spec(inputs.reach, (None, 3), lambda i, n: (i, 0)),
                q=_spec(inputs.q, (rows, None, K), lambda i, n: (i, n, 0)),
                k=_spec(inputs.k, (T, None, K), lambda i, n: (0, jax.lax.div(n, group), 0)),
                v=_spec(inputs.v, (T, None, V), lambda i, n: (0, jax.lax.div(n, group), 0)),
                q_ids=_spec(inputs.q_ids, (rows,), lambda i, n: (i,)),
                k_ids=_spec(inputs.k_ids, (T,), lambda i, n: (0,)),
                bias=_spec(inputs.bias, (None, rows, T), lambda i, n: (n, i, 0)),
                dropout=None if inputs.dropout is None else _WORDS,
            ),
            Upstream(pl.BlockSpec((None, rows, None, V), lambda i, n, b: (b, i, n, 0)), numbers, numbers),
        )

    def key_specs(self) -> _Specs:
        """For a block of keys of one head: all queries of the heads that read it."""
        inputs, columns = self.inputs, self.blocks.keys
        (_, S, N, K), V = inputs.q.shape, inputs.v.shape[-1]
        group = N // inputs.k.shape[2]
        numbers = pl.BlockSpec((None, group, S), lambda j, g, b: (b, g, 0))
        return _Specs(
            Inputs(
                reach=_spec(inputs.reach, (None, 3), lambda j, g: (j, 0)),
                q=_spec(inputs.q, (S, group, K), lambda j, g: (0, g, 0)),
                k=_spec(inputs.k, (columns, None, K), lambda j, g: (j, g, 0)),
                v=_spec(inputs.v, (columns, None, V), lambda j, g: (j, g, 0)),
                q_ids=_spec(inputs.q_ids, (S,), lambda j, g: (0,)),
                k_ids=_spec(inputs.k_ids, (columns,), lambda j, g: (j,)),
                bias=_spec(inputs.bias, (group, S, columns), lambda j, g: (g, 0, j)),
                dropout=None if inputs.dropout is None else _WORDS,
            ),
            Upstream(pl.BlockSpec((None, S, group, V), lambda j, g, b: (b, 0, g, 0)), numbers, numbers),
        )

    def bias_specs(self) -> _Specs:
        """For a block of the bias of one head: its queries and keys in all samples that share it."""
        inputs, rows, columns = self.inputs, self.blocks.queries, self.blocks.keys
        (B, _, N, K), V = inputs.q.shape, inputs.v.shape[-1]
        samples, group = B // inputs.bias.shape[0], N // inputs.k.shape[2]

        def spec(array: Array | None, block: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> Any:
            if array is None:
                return None
            shared = array.shape[0] == 1

            def where(i: Any, j: Any, pair: Any) -> tuple[Any, ...]:
                return 0 if shared else jax.lax.div(pair, N), *index(i, j, jax.lax.rem(pair, N))

            return pl.BlockSpec((1 if shared else samples, *block), where)

        return _Specs(
            Inputs(
                reach=spec(inputs.reach, (None, 3), lambda i, j, n: (i, 0)),
                q=spec(inputs.q, (rows, None, K), lambda i, j, n: (i, n, 0)),
                k=spec(inputs.k, (columns, None, K), lambda i, j, n: (j, jax.lax.div(n, group), 0)),
                v=spec(inputs.v, (columns, None, V), lambda i, j, n: (j, jax.lax.div(n, group), 0)),
                q_ids=spec(inputs.q_ids, (rows,), lambda i, j, n: (i,)),
                k_ids=spec(inputs.k_ids, (columns,), lambda i, j, n: (j,)),
                bias=pl.BlockSpec(
                    (None, None, rows, columns), lambda i, j, pair: (jax.lax.div(pair, N), jax.lax.rem(pair, N), i, j)
                ),
                dropout=None if inputs.dropout is None else _WORDS,
            ),
            Upstream(
                pl.BlockSpec(
                    (samples, rows, None, V), lambda i, j, pair: (jax.lax.div(pair, N), i, jax.lax.rem(pair, N), 0)
                ),
                *[
                    pl.BlockSpec(
                        (samples, None, rows), lambda i, j, pair: (jax.lax.div(pair, N), jax.lax.rem(pair, N), i)
                    )
                ]
                * 2,
            ),
        )

    def run(
        self, grid: tuple[int, int, int], inputs: list[tuple[Any, Any]], outputs: list[tuple[Any, Any]], work: Work
    ) -> Any:
        """Outputs, given as (shape, spec), of inputs, given as (arrays, specs), from a grid of blocks of threads.

        The program's text names the kernel and says how much it does, for those who count.
        """
        call = pl.pallas_call(
            partial(self.kernel, problem=self.problem),
            name=self.kernel.__name__,
            grid=grid,
            in_specs=tuple(specs for _, specs in inputs),
            out_specs=tuple(spec for _, spec in outputs),
            out_shape=tuple(shape for shape, _ in outputs),
            compiler_params=triton.CompilerParams(num_warps=self.blocks.warps, num_stages=self.blocks.stages),
            interpret=self.interpret,
        )
        with set_xla_metadata(flops=work.flops * self.pairs, flops_again=work.again * self.pairs):
            return call(*(arrays for arrays, _ in inputs))


def _spec(array: Any, block: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> Any:
    """Of one sample; all share the first of an array that has only one. None for no array."""
    if array is None:
        return None
    shared = array.shape[0] == 1
    return pl.BlockSpec((None, *block), lambda block, head, sample: (0 if shared else sample, *index(block, head)))


def _static(dropout: DropoutRecord | None) -> Dropout | None:
    if dropout is None:
        return None
    return Dropout(threshold(1.0 - dropout.rate), 1.0 / (1.0 - dropout.rate), dropout.heads, dropout.S, dropout.T)


def _words(dropout: DropoutRecord | None) -> Array | None:
    if dropout is None:
        return None
    row = jnp.asarray(dropout.first_row).astype(jnp.int32)
    return jnp.append(words_of(dropout.key_data), row)


_WORDS = pl.BlockSpec((3,), lambda *_: (0,))


def _fill(x: Array, dim: int, multiple: int, value: float = 0) -> Array:
    """x with so many more rows that their number is a multiple."""
    missing = -x.shape[dim] % multiple
    widths = [(0, missing if d == dim else 0) for d in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x
