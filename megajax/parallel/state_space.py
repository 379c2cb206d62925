"""A state space over a sequence and heads that a mesh divides, as one manual region.

Heads are independent, so tensor parallelism needs no communication. Where the sequence is divided, each device runs its
part from an empty state; then all exchange what the recurrence would have carried: the last inputs of the convolution
and, for each part, the state it ends with and how much of an earlier one it keeps. From these every device works out
the state that its part begins with, and adds what follows from it, which is linear. The bytes that travel do not depend
on the length of the sequence, and the devices need not divide the heads. (Megatron trades the sequence for heads:
`core/ssm/mamba_context_parallel.py`.)
"""

# SPDX-License-Identifier: Apache-2.0
# B batch, S sequence, H heads, G groups, P head size, N state size, E = H P, M = G N, W parts of the sequence
import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from megajax.config import ConfigError
from megajax.ops.ssd import ssd_kept, ssd_of_state
from megajax.ops.state_space import Convolution, Dynamics, Projected, Sizes, Window, document_starts, mix
from megajax.parallel.mesh import CP, ULYSSES
from megajax.parallel.sharding import spec_of
from megajax.parallel.token_order import zigzag_indices

Array = jax.Array
SEQ = (CP, ULYSSES)


def state_space(
    projected: Projected,
    dynamics: Dynamics,
    sizes: Sizes,
    *,
    segment_ids: Array | None = None,
    zigzag: bool = False,
) -> Array:
    """y [B, S, H, P] of a whole sequence, on the mesh in context.

    Args:
      projected, dynamics: global arrays, laid out by the sharding table in context.
      segment_ids: int [B, S], the document of each token; None: one document.
      zigzag: rows lie in the order of `megajax.parallel.token_order.zigzag_indices`.

    Raises:
      ConfigError: the part of a device is shorter than the convolution.
    """
    layout = _Layout.in_context()
    if layout is None:
        return _mix_whole(projected, dynamics, sizes, segment_ids)
    return _Region(layout, sizes, zigzag and layout.cp > 1)(projected, dynamics, segment_ids)


def _mix_whole(projected: Projected, dynamics: Dynamics, sizes: Sizes, segment_ids: Array | None) -> Array:
    back = dynamics.x.kernel.shape[0] - 1
    starts = None if segment_ids is None else document_starts(segment_ids, back=back)
    return mix(projected, dynamics, sizes, starts=starts).y


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which mesh axes divide heads, groups and the sequence, and the sizes of those that divide the sequence.

    seq: none where replicas have parts of it, each in a region of its own already.
    """

    heads: tuple[str, ...]
    groups: tuple[str, ...]
    seq: tuple[str, ...]
    tp: int
    cp: int
    ulysses: int

    @classmethod
    def in_context(cls) -> "_Layout | None":
        """None where nothing is divided but the batch."""
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return None

        def axes(logical: str) -> tuple[str, ...]:
            entry = spec_of((logical,), rules, where="a state space")[0] or ()
            return (entry,) if isinstance(entry, str) else entry

        heads = axes("act_ssm_heads")
        tp = math.prod(mesh.shape[axis] for axis in heads)
        seq = tuple(axis for axis in SEQ if axis not in mesh.manual_axes)
        layout = cls(heads, axes("act_ssm_groups"), seq, tp, mesh.shape[CP], mesh.shape[ULYSSES])
        return None if tp * layout.cp * layout.ulysses == 1 else layout


@dataclasses.dataclass(frozen=True)
class _Region:
    """What runs on one device; calling it enters the manual region, which leaves the batch to XLA."""

    layout: _Layout
    sizes: Sizes
    zigzag: bool

    def __call__(self, projected: Projected, dynamics: Dynamics, segment_ids: Array | None) -> Array:
        to, dtype = self.layout, projected.x.dtype
        heads, groups, seq = to.heads or None, to.groups or None, to.seq or None
        if to.groups != to.heads:  # The gradients of all copies are summed where the region begins: in fp32.
            projected = projected._replace(b=projected.b.astype(jnp.float32), c=projected.c.astype(jnp.float32))
        dynamics = jax.tree.map(lambda a: a.astype(jnp.float32), dynamics)  # copies over the sequence
        of_heads, of_groups = PartitionSpec(None, seq, heads), PartitionSpec(None, seq, groups)

        def convolution(axis: Any, given: Convolution) -> Convolution:
            bias = None if given.bias is None else PartitionSpec(axis)
            return Convolution(PartitionSpec(None, None, axis), bias)  # type: ignore[arg-type]

        region = jax.shard_map(
            partial(self._on_device, dtype),
            in_specs=(
                Projected(of_heads, of_groups, of_groups, of_heads),  # type: ignore[arg-type]
                Dynamics(
                    convolution(heads, dynamics.x),
                    convolution(groups, dynamics.b),
                    convolution(groups, dynamics.c),
                    PartitionSpec(heads),  # type: ignore[arg-type]
                    PartitionSpec(heads),  # type: ignore[arg-type]
                ),
                PartitionSpec(None, seq),
            ),
            out_specs=of_heads,
            axis_names={*to.seq, *to.heads},
            check_vma=False,
        )
        return region(projected, dynamics, segment_ids)  # pyright: ignore

    def _on_device(
        self, dtype: jnp.dtype, projected: Projected, dynamics: Dynamics, segment_ids: Array | None
    ) -> Array:
        projected, dynamics, sizes = self._needed_groups(projected, dynamics)
        projected = projected._replace(b=projected.b.astype(dtype), c=projected.c.astype(dtype))
        if self.layout.cp * self.layout.ulysses == 1:
            return _mix_whole(projected, dynamics, sizes, segment_ids)
        return _Parts.of(self.layout, self.zigzag).mix(projected, dynamics, sizes, segment_ids)

    def _needed_groups(self, projected: Projected, dynamics: Dynamics) -> tuple[Projected, Dynamics, Sizes]:
        """The groups of this device's heads, where all are held because tp does not divide them."""
        layout, G = self.layout, self.sizes.groups
        if layout.groups == layout.heads:
            return projected, dynamics, self.sizes._replace(groups=G // layout.tp)
        H = projected.dt.shape[-1]  # here
        per_group = H * layout.tp // G
        first = jax.lax.axis_index(layout.heads) * H
        if H % per_group == 0 or per_group % H == 0:
            mine = first // per_group + jnp.arange(max(1, H // per_group))
        else:  # heads of one group on several devices, which hold others as well: each head has its own copy
            mine = (first + jnp.arange(H)) // per_group

        def needed(a: Array) -> Array:
            by_group = a.reshape(*a.shape[:-1], G, -1)
            return jnp.take(by_group, mine, axis=-2).reshape(*a.shape[:-1], -1)

        b, c = (Convolution(*(None if a is None else needed(a) for a in it)) for it in (dynamics.b, dynamics.c))  # type: ignore[arg-type]
        projected = projected._replace(b=needed(projected.b), c=needed(projected.c))
        return projected, dynamics._replace(b=b, c=c), self.sizes._replace(groups=len(mine))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The sequence in W parts that lie together; every device has as many of them, one after the other.

    index: int [W], which part of the sequence each row is, devices outer.
    """

    index: np.ndarray
    each: int

    @classmethod
    def of(cls, layout: _Layout, zigzag: bool) -> "_Parts":
        devices = layout.cp * layout.ulysses
        # A zigzag device of "cp" has two chunks, which the devices of "ulysses" share.
        each = 2 if zigzag and layout.ulysses % 2 else 1
        return cls(zigzag_indices(devices * each, layout.cp if zigzag else 1), each)

    def mix(self, projected: Projected, dynamics: Dynamics, sizes: Sizes, segment_ids: Array | None) -> Array:
        """y of this device's tokens."""
        B, S, _ = projected.dt.shape
        back = dynamics.x.kernel.shape[0] - 1
        if S // self.each < back:
            raise ConfigError(
                f"the {S // self.each} tokens that context_parallel_size leaves together are fewer than the {back} that"
                " a convolution looks back at; lower context_parallel_size"
            )
        projected = jax.tree.map(self._folded, projected)
        ends = [a[:, a.shape[1] - back :] for a in projected[:3]]
        window = Window(*(self._of_the_part_before(self._gathered(end)) for end in ends))
        starts = of_tokens = None
        if segment_ids is not None:
            segment_ids = self._folded(segment_ids)
            ends_here = self._gathered(segment_ids[:, -max(back, 1) :])
            starts = document_starts(segment_ids, self._of_the_part_before(ends_here), back=back)
            of_tokens = starts[:, back:]
        mixed = mix(projected, dynamics, sizes, window=window, starts=starts)
        kept = self._gathered(ssd_kept(projected.dt, dynamics.A, of_tokens))
        entering = self._entering(self._gathered(mixed.state), kept)
        y = mixed.y + ssd_of_state(projected.dt, dynamics.A, mixed.c, entering, of_tokens).astype(mixed.y.dtype)
        return y.reshape(B, S, *y.shape[2:])

    def _folded(self, a: Array) -> Array:
        """[B, S, ...] -> [B each, S / each, ...]."""
        return a.reshape(a.shape[0] * self.each, -1, *a.shape[2:])

    def _gathered(self, a: Array) -> list[Array]:
        """[B each, ...] -> of each part of the sequence, in its order, [B, ...]."""
        rows = jax.lax.all_gather(a.reshape(-1, self.each, *a.shape[1:]), SEQ, axis=0)
        by_row = [rows[device, :, part] for device in range(rows.shape[0]) for part in range(self.each)]
        return [by_row[row] for row in np.argsort(self.index)]

    def _mine(self, parts: list[Array]) -> Array:
        """What belongs to the parts of this device: [B each, ...]."""
        stacked, first = jnp.stack(parts), jax.lax.axis_index(SEQ) * self.each
        index = jnp.asarray(self.index)
        rows = [jax.lax.dynamic_index_in_dim(stacked, index[first + i], keepdims=False) for i in range(self.each)]
        mine = jnp.stack(rows, axis=1)
        return mine.reshape(-1, *mine.shape[2:])

    def _of_the_part_before(self, parts: list[Array]) -> Array:
        """What each part of this device finds before it; zeros before the first."""
        return self._mine([jnp.zeros_like(parts[0]), *parts[:-1]])

    def _entering(self, states: list[Array], kept: list[Array]) -> Array:
        """The state before each part of this device."""
        before = [jnp.zeros_like(states[0])]
        for state, part in zip(states[:-1], kept[:-1], strict=True):
            before.append(before[-1] * part[..., None, None] + state)
        return self._mine(before)
