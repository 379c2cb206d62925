"""The grouped matrix product and its gradients as GPU kernels, in Pallas, compiled by Triton.

`megajax.ops.grouped` has the same as a loop of one small product after the other, which leaves most of a GPU idle. Here
one kernel computes all of them: each of its programs, of which a GPU runs hundreds side by side, makes a tile of the
result. A tile has one expert, since groups are whole blocks of rows, and its program finds it in a table. A tile behind
the last group is filled with zeros and reads nothing.

JAX 0.12 wants kernels for Triton to move to Mosaic GPU, which begins with Hopper: an A100 would be left with the loop.
"""

# SPDX-License-Identifier: Apache-2.0
# R rows, E experts, D width of rows, F width of products; I tiles of rows
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.xla_metadata import set_xla_metadata

from megajax.ops.fp8_blocks import MX_BLOCK, TILE, Blocks
from megajax.ops.fp8_dot import fp8_dot, mx_dot
from megajax.ops.grouped import GroupedKernel
from megajax.ops.grouped_blocks import BlockParts
from megajax.ops.grouped_fp8 import Fp8Parts

Array = jax.Array
Scales = tuple[Array, ...]
Ref = Any
"""An array in the GPU's memory: indexing it loads."""

LEAST = 16
"""Rows, and columns, of the smallest of a GPU's matrix products: what all sizes must be multiples of."""

_STAGES = 4
"""Steps whose tiles are in shared memory, the one that is computed among them (before Hopper not): at most 48 KiB each,
or 32 for tiles of 128 columns. An A100 has 163 KiB, an H100 and a B200 227; GPUs that are not for servers have 99."""
_BAND = 8
"""Tiles of rows that programs which run side by side have in common, so that the cache holds what they all read."""


class Tile(NamedTuple):
    """What a program computes: rows x columns of the result, `inner` terms of each sum at a time."""

    rows: int
    columns: int
    inner: int

    @classmethod
    def of(cls, rows: int, columns: int, inner: int, most: "Tile | None" = None) -> "Tile":
        """The largest for an array of these sizes, but no larger than `most`, by default `LARGEST`: `rows` and `inner`
        divide it, of the last tile of columns at most an eighth of the array is missing."""
        most = most or LARGEST
        sizes = (256, 128, 64, 32, LEAST)
        wide = next(size for size in sizes if size <= most.columns and -columns % size <= columns / 8)
        return cls(min(most.rows, rows & -rows), wide, min(most.inner, inner & -inner))

    @property
    def params(self) -> triton.CompilerParams:
        """How many threads share it, and how many steps are on their way."""
        return triton.CompilerParams(num_warps=8 if self.rows * self.columns >= 128 * 128 else 4, num_stages=_STAGES)


LARGEST = Tile(128, 256, 64)
"""Of bf16 or fp16, on a GPU for servers."""


def largest_tile(gpu: tuple[int, int], *, fp8: bool = False) -> Tile:
    """What a GPU of this compute capability has shared memory for, and registers: beside the sum of all terms a program
    of fp8 numbers holds that of a tile (`fp8_dot`), and adds it once for `inner` terms."""
    for_servers = gpu == (8, 0) or gpu[0] in (9, 10)
    if fp8:
        return Tile(128, 128, 128 if for_servers else 64)
    return LARGEST if for_servers else LARGEST._replace(columns=128)


class _Setting(NamedTuple):
    """What does not depend on arrays. block: as in `Groups`; most: the largest tile; full: the rows are all one
    group's."""

    block: int
    most: Tile
    interpret: bool
    full: bool = False


def grouped_product(
    x_RD: Array, w_EDF: Array, sizes_E: Array, block: int, *, most: Tile = LARGEST, interpret: bool = False
) -> Array:
    """Each row times the kernel of its expert: [R, F], in x's dtype; sums are in fp32. Zero behind the last group.

    Args:
      x_RD, w_EDF: bf16 or fp16. D, F, R and block are multiples of `LEAST`.
      sizes_E: as in `megajax.ops.grouped.Groups`; so is block.
      most: the largest tile; a smaller one for a GPU with little shared memory (`kernel_for`).
      interpret: runs on any device and in any dtype, slowly: for tests.
    """
    return _product(_Setting(block, most, interpret), x_RD, w_EDF, sizes_E)


def kernel_for(gpu: tuple[int, int]) -> GroupedKernel:
    """The kernel with the tiles for a GPU of this compute capability."""
    # Its programs hold 128 rows; neighbours read an expert's kernel together, however small the blocks.
    return GroupedKernel(functools.partial(grouped_product, most=largest_tile(gpu)), most_rows=128)


def fp8_parts_for(gpu: tuple[int, int], *, interpret: bool = False) -> Fp8Parts:
    """Products of fp8 arrays for a GPU of this compute capability."""

    def setting(block: int, x: Array) -> _Setting:
        return _Setting(block, largest_tile(gpu, fp8=x.dtype.itemsize == 1), interpret)

    def rows_times(x_RK: Array, w_ENK: Array, sizes_E: Array, block: int, dtype: Any) -> Array:
        return _rows_times(setting(block, x_RK), x_RK, w_ENK, sizes_E, transposed=True, dtype=dtype)

    def outer(x_DR: Array, dy_FR: Array, sizes_E: Array, block: int) -> Array:
        return _outer(setting(block, x_DR), x_DR, dy_FR, sizes_E, jnp.float32, rows_last=True)

    return Fp8Parts(rows_times, outer, most_rows=128)


_BY_TILES = largest_tile((9, 0), fp8=True)
"""Its `inner` terms are those that share scales, its columns those of at most one square block."""


def block_parts(*, interpret: bool = False) -> BlockParts:
    """Products of arrays whose blocks have scales, for Hopper."""
    return _block_parts(lambda tiles: tiles.scales.T, lambda kernels: kernels.scales, interpret)


def mx_parts(*, interpret: bool = False) -> BlockParts:
    """The same as Blackwell's tensor cores multiply them, in blocks of `MX_BLOCK`: larger ones are several."""

    def exponents(x: Blocks) -> Array:
        """n for each scale 2^(n - 127)."""
        return jax.lax.bitcast_convert_type(x.mx_scales(), jnp.uint8)

    return _block_parts(exponents, exponents, interpret)


def _block_parts(
    of_tiles: Callable[[Blocks], Array], of_kernels: Callable[[Blocks], Array], interpret: bool
) -> BlockParts:
    """of_tiles, of_kernels: scales as the GPU's kernels want them."""
    setting = _Setting(TILE, _BY_TILES, interpret)

    def rows_times(x_RK: Blocks, w_ENK: Blocks, sizes_E: Array, dtype: Any) -> Array:
        scales = of_tiles(x_RK), of_kernels(w_ENK)
        return _rows_times(setting, x_RK.values, w_ENK.values, sizes_E, transposed=True, dtype=dtype, scales=scales)

    def outer(x_DR: Blocks, dy_FR: Blocks, sizes_E: Array) -> Array:
        scales = of_tiles(x_DR), of_tiles(dy_FR)
        return _outer(setting, x_DR.values, dy_FR.values, sizes_E, jnp.float32, rows_last=True, scales=scales)

    return BlockParts(rows_times, outer)


def block_product(a_MK: Blocks, b_NK: Blocks, dtype: Any, *, interpret: bool = False) -> Array:
    """a times b transposed, [M, N], of one expert: a in tiles, b in square blocks or in tiles."""
    setting, (M, K) = _Setting(TILE, _BY_TILES, interpret, full=True), a_MK.values.shape
    values, scales, more = a_MK.values, a_MK.scales.T, -M % TILE
    if b_NK.block == (1, TILE):
        sizes = jnp.full(1, K)
        by_tiles = (scales, b_NK.scales.T)
        return _outer(setting, values, b_NK.values, sizes, dtype, rows_last=True, scales=by_tiles)[0]
    sizes = jnp.full(1, M + more)
    values, scales = jnp.pad(values, ((0, more), (0, 0))), jnp.pad(scales, ((0, 0), (0, more)))
    by_squares = (scales, b_NK.scales[None])
    y = _rows_times(setting, values, b_NK.values[None], sizes, transposed=True, dtype=dtype, scales=by_squares)
    return y[:M]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _rows_times(setting, x_RD, w_EDF, sizes_E)


def _product_fwd(setting: _Setting, x_RD: Array, w_EDF: Array, sizes_E: Array):
    return _rows_times(setting, x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _product_bwd(setting: _Setting, saved: tuple[Array, Array, Array], dy_RF: Array):
    x_RD, w_EDF, sizes_E = saved
    dx_RD = _rows_times(setting, dy_RF, w_EDF, sizes_E, transposed=True)
    dw_EDF = _outer(setting, x_RD, dy_RF, sizes_E, w_EDF.dtype)
    return dx_RD, dw_EDF, np.zeros(sizes_E.shape, jax.dtypes.float0)


_product.defvjp(_product_fwd, _product_bwd)


def _rows_times(
    setting: _Setting,
    x_RD: Array,
    w_EDF: Array,
    sizes_E: Array,
    *,
    transposed: bool = False,
    dtype: Any = None,
    scales: Scales = (),
) -> Array:
    """[R, F]; transposed: of rows [R, F] the product with w's transpose, [R, D], for which w is only read otherwise.
    dtype: of the result, by default x's. scales: [F / TILE, R] of x, [E, ceil(D / TILE), F / TILE] of w, transposed;
    or uint8 [R, F / MX_BLOCK] and [E, D, F / MX_BLOCK]."""
    (R, inner), (E, *widths) = x_RD.shape, w_EDF.shape
    F = widths[0 if transposed else 1]
    tile = Tile.of(setting.block, F, inner, setting.most)
    ends_E = jnp.cumsum(sizes_E) // tile.rows
    expert_I = jnp.searchsorted(ends_E, jnp.arange(R // tile.rows), side="right", method="compare_all")
    call = pl.pallas_call(
        functools.partial(_rows_times_kernel, tile=tile, transposed=transposed),
        name="block_matmul" if scales else "grouped_matmul",
        grid=(R // tile.rows * pl.cdiv(F, tile.columns),),
        out_shape=jax.ShapeDtypeStruct((R, F), dtype or x_RD.dtype),
        compiler_params=tile.params,
        interpret=setting.interpret,
    )
    with _says(setting, R, inner * F, read=inner, besides=(E * inner + R) * F, itemsize=x_RD.dtype.itemsize):
        return call(expert_I.astype(jnp.int32), x_RD, w_EDF, *scales)


def _rows_times_kernel(expert_ref: Ref, x_ref: Ref, w_ref: Ref, *refs: Ref, tile: Tile, transposed: bool) -> None:
    *scale_refs, y_ref = refs
    (R, F), E, inner = y_ref.shape, w_ref.shape[0], x_ref.shape[1]
    i, j = _banded(pl.program_id(0), R // tile.rows, pl.cdiv(F, tile.columns))
    rows, columns = pl.ds(i * tile.rows, tile.rows), _Span(j * tile.columns, tile.columns, F)
    expert = expert_ref[i]

    def add(step: Array, y: Array) -> Array:
        terms = pl.ds(step * tile.inner, tile.inner)
        x = x_ref[rows, terms]
        if transposed:
            w = columns.load(w_ref.at[expert, columns.slice, terms], dim=0)
            if _in_mx(scale_refs):
                (x_scales, w_scales), blocks = scale_refs, _mx_blocks(step, tile.inner)
                w_scale = columns.load(w_scales.at[expert, columns.slice, blocks], dim=0)
                return mx_dot(y, x, x_scales[rows, blocks], w, w_scale)
            product = _dot(x, w)
            if scale_refs:
                x_scales, w_scales = scale_refs
                product *= (x_scales[step, rows] * w_scales[expert, _divided(j * tile.columns, TILE)[0], step])[:, None]
            return y + product
        return y + triton.dot(x, columns.load(w_ref.at[expert, terms, columns.slice], dim=1))

    steps = (expert < E).astype(jnp.int32) * (inner // tile.inner)
    y = lax.fori_loop(0, steps, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    mask = jnp.broadcast_to(columns.there, y.shape) if columns.cut else None
    triton.store(y_ref.at[rows, columns.slice], y.astype(y_ref.dtype), mask=mask)


def _outer(
    setting: _Setting,
    x_RD: Array,
    dy_RF: Array,
    sizes_E: Array,
    dtype: Any,
    *,
    rows_last: bool = False,
    scales: Scales = (),
) -> Array:
    """The gradient of kernels [E, D, F]: x' dy over the rows of each expert. rows_last: x [D, R] and dy [F, R], whose
    scales may be [R / TILE, D] and [R / TILE, F], or uint8 [D, R / MX_BLOCK] and [F, R / MX_BLOCK]."""
    widths = 0 if rows_last else 1
    D, F, E = x_RD.shape[widths], dy_RF.shape[widths], sizes_E.shape[0]
    tile = _outer_tile(D, F, setting)
    ends_E = jnp.cumsum(sizes_E)
    call = pl.pallas_call(
        functools.partial(_outer_kernel, tile=tile, rows_last=rows_last),
        name="block_matmul_dw" if scales else "grouped_matmul_dw",
        grid=(E * pl.cdiv(D, tile.rows) * pl.cdiv(F, tile.columns),),
        out_shape=jax.ShapeDtypeStruct((E, D, F), dtype),
        compiler_params=tile.params,
        interpret=setting.interpret,
    )
    R = x_RD.size // D
    with _says(setting, R, D * F, read=D + F, besides=E * D * F, itemsize=x_RD.dtype.itemsize):
        # Counted in tiles: of a row that need not be a multiple of anything Triton would load byte by byte.
        start_E, steps_E = ((rows // tile.inner).astype(jnp.int32) for rows in (ends_E - sizes_E, sizes_E))
        return call(start_E, steps_E, x_RD, dy_RF, *scales)


def _outer_tile(D: int, F: int, setting: _Setting) -> Tile:
    wide = Tile.of(setting.block, F, setting.block, setting.most)
    tall = next(rows for rows in (128, 64, 32, LEAST) if -D % rows <= D / 8)
    return wide._replace(rows=tall)


def _outer_kernel(
    start_ref: Ref, steps_ref: Ref, x_ref: Ref, dy_ref: Ref, *refs: Ref, tile: Tile, rows_last: bool
) -> None:
    *scale_refs, dw_ref = refs
    _, D, F = dw_ref.shape
    tall, wide = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.columns)
    program = pl.program_id(0)
    expert, inside = _divided(program, tall * wide)
    i, j = _banded(inside, tall, wide)
    down, across = _Span(i * tile.rows, tile.rows, D), _Span(j * tile.columns, tile.columns, F)
    start = start_ref[expert]

    def add(step: Array, dw: Array) -> Array:
        rows = pl.ds((start + step) * tile.inner, tile.inner)
        if rows_last:
            x, dy = down.load(x_ref.at[down.slice, rows], dim=0), across.load(dy_ref.at[across.slice, rows], dim=0)
            if _in_mx(scale_refs):
                (x_scales, dy_scales), blocks = scale_refs, _mx_blocks(start + step, tile.inner)
                x_scale = down.load(x_scales.at[down.slice, blocks], dim=0)
                return mx_dot(dw, x, x_scale, dy, across.load(dy_scales.at[across.slice, blocks], dim=0))
            product = _dot(x, dy)
            if scale_refs:
                x_scales, dy_scales = scale_refs
                x_scale = down.load(x_scales.at[start + step, down.slice], dim=0)
                dy_scale = across.load(dy_scales.at[start + step, across.slice], dim=0)
                product *= x_scale[:, None] * dy_scale[None, :]
            return dw + product
        x = down.load(x_ref.at[rows, down.slice], dim=1)
        dy = across.load(dy_ref.at[rows, across.slice], dim=1)
        return dw + triton.dot(x, dy, trans_a=True)

    dw = lax.fori_loop(0, steps_ref[expert], add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    mask = down.there[:, None] & across.there[None, :] if down.cut or across.cut else None
    triton.store(dw_ref.at[expert, down.slice, across.slice], dw.astype(dw_ref.dtype), mask=mask)


def _in_mx(scale_refs: list[Ref]) -> bool:
    return bool(scale_refs) and scale_refs[0].dtype == jnp.uint8


def _mx_blocks(tile: Array, terms: int) -> Any:
    """Those of a tile of so many terms, all of them in tiles."""
    return pl.ds(tile * (terms // MX_BLOCK), terms // MX_BLOCK)


def _dot(a: Array, b: Array) -> Array:
    """a [M, K] times b [N, K], transposed."""
    return fp8_dot(a, b) if a.dtype.itemsize == 1 else triton.dot(a, b, trans_b=True)


class _Span(NamedTuple):
    """`count` neighbours from `first` on, of a dim of `size`; the last ones may lie behind its end."""

    first: Array
    count: int
    size: int

    @property
    def slice(self) -> Any:
        return pl.ds(self.first, self.count)

    @property
    def cut(self) -> bool:
        return self.size % self.count > 0

    @property
    def there(self) -> Array:
        return self.first + jnp.arange(self.count) < self.size

    def load(self, ref: Ref, dim: int) -> Array:
        """A tile whose `dim` it is; zero behind the end."""
        if not self.cut:
            return triton.load(ref)
        others = tuple(other for other in range(len(ref.shape)) if other != dim)
        mask = jnp.broadcast_to(jnp.expand_dims(self.there, others), ref.shape)
        return triton.load(ref, mask=mask, other=0.0)


def _banded(program: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column of a program's tile: band after band of `_BAND` rows, each column after column."""
    band, inside = _divided(program, _BAND * columns)
    column, row = _divided(inside, jnp.minimum(rows - band * _BAND, _BAND))
    return band * _BAND + row, column


def _divided(number: Array, by: Array | int) -> tuple[Array, Array]:
    """(quotient, remainder) of numbers that are not negative."""
    by = jnp.asarray(by, number.dtype)
    return lax.div(number, by), lax.rem(number, by)


def _says(setting: _Setting, rows: int, products: int, *, read: int, besides: int, itemsize: int) -> Any:
    """Writes into the program's text what the kernel does, for those who count: `megajax.parallel.roofline`.

    How many of the rows are of a group is known at run time only; what depends on it is said of one row.
    """
    if setting.full:
        return set_xla_metadata(flops=2 * rows * products)
    return set_xla_metadata(
        rows_a_block=setting.block,
        flops_a_row=2 * products,
        bytes_a_row=read * itemsize,
        bytes_besides=besides * itemsize,
    )
