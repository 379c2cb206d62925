"""A function whose loops read and write rows of larger arrays where these lie, instead of copies of their own.

A scan over layers takes stacked arrays and gives stacked arrays. Where what it takes is a slot of a buffer, XLA cuts
the slot out first; where what it gives belongs into a slot, or is to be added to a sum, all layers of it exist beside
the buffer until the loop is done. Of the fp32 gradients of a pipeline stage that is a second copy, of the activations
of its microbatches one more. Here the loop carries the buffer along, and each turn reads and writes its own row. Which
loops these are is read from the jaxpr, so it holds for whatever autodiff makes of a model.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from megajax.parallel.backward_order import kernels_beside_sums
from megajax.parallel.gradient_sums import combine
from megajax.parallel.jaxprs import grouped, named, read, run, scan_arguments, start

Array = jax.Array
Tree = Any
Combine = Callable[[Array, Array], Array]
"""`(what is there, what is new) -> what is to be there`, number by number."""


@dataclasses.dataclass(frozen=True)
class Row:
    """`array[index]`, where it lies, or of that `count` rows from the `first` on. To `jax.tree` it is a leaf."""

    array: Array
    index: tuple[Array, ...] = ()
    first: int = 0
    count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the row."""
        whole = self.array.shape[len(self.index) :]
        return whole if self.count is None else (self.count, *whole[1:])

    @property
    def dtype(self) -> Any:
        """Of the row."""
        return self.array.dtype

    def at(self, index: Array) -> Row:
        """A row of the row."""
        return Row(self.array, (*self.index, self.first + index if self.first else index))

    def part(self, first: int, count: int) -> Row:
        """Some of the rows of a whole one."""
        assert self.count is None
        return dataclasses.replace(self, first=first, count=count)

    def read(self) -> Array:
        """A copy."""
        if self._is_all:
            return self.array
        sizes = (1,) * len(self.index) + self.shape
        return jax.lax.dynamic_slice(self.array, self._start, sizes).reshape(self.shape)

    def written(self, value: Array) -> Array:
        """The array with another row."""
        value = value.astype(self.dtype)
        if self._is_all:
            return value
        value = value.reshape((1,) * len(self.index) + self.shape)
        return jax.lax.dynamic_update_slice(self.array, value, self._start)

    def reshaped(self, shape: tuple[int, ...]) -> Row | None:
        """As a row of this shape; None: rows that are left out do not have it."""
        outer = self.array.shape[: len(self.index)]
        if self.count is None:
            return Row(self.array.reshape(*outer, *shape), self.index)
        if shape[:1] != (self.count,):
            return None
        whole = self.array.reshape(*outer, self.array.shape[len(outer)], *shape[1:])
        return dataclasses.replace(self, array=whole)

    @property
    def _is_all(self) -> bool:
        return not self.index and self.count is None

    @property
    def _start(self) -> tuple[Any, ...]:
        rest = (self.first, *(0 for _ in self.shape[1:])) if self.shape else ()
        # All of one type, also where plain numbers have 64 bits.
        return tuple(jnp.asarray(at, jnp.int32) for at in (*self.index, *rest))


class Target(NamedTuple):
    """Where a result goes. combine: with what is there; None: it takes its place."""

    row: Row
    combine: Combine | None = None

    def with_value(self, value: Array) -> Array:
        """The row's array with the result."""
        return self.row.written(value if self.combine is None else self.combine(self.row.read(), value))


def shape_of(value: Array | Row) -> Any:
    """What a function may be traced with instead."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if isinstance(value, Row) else value


def whole(value: Array | Row) -> Array:
    """A copy of a row; else the array."""
    return value.read() if isinstance(value, Row) else value


def is_target(value: Any) -> bool:
    """For `jax.tree`."""
    return isinstance(value, Target)


def in_place(
    function: Callable[..., Sequence[Array]], args: Sequence[Array | Row], into: Sequence[Target | None]
) -> list[Array]:
    """`function(*args)`: of each result that has a target, the target's array with it instead."""
    closed = jax.make_jaxpr(lambda *args: list(function(*args)))(*map(shape_of, args))
    results = _evaluate(closed, args, into)
    return [_finished(*pair) for pair in zip(results, into, strict=True)]


def added_in_place(
    function: Callable[..., tuple[Tree, Array]], args: tuple[Any, ...], totals: Tree
) -> tuple[Tree, Array]:
    """`function(*args) -> (gradients, a scalar)`: fp32 totals with the gradients, layer by layer, and the scalar."""
    given, structure = jax.tree.flatten(args)

    def run(*given: Array) -> list[Array]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, given)))

    paths, of_totals = jax.tree_util.tree_flatten_with_path(totals)
    *sums, scalar = in_place(run, given, [*(Target(Row(total), partial(adding, path)) for path, total in paths), None])
    return jax.tree.unflatten(of_totals, sums), scalar


def adding(path: Any, total: Array, gradient: Array) -> Array:
    """The fp32 sum of the gradients of the parameter with this path, with one more of any dtype."""
    return combine(path, total, gradient.astype(jnp.float32))


class _Written(NamedTuple):
    """Instead of a result: the array that it was written into."""

    array: Array


def _finished(result: Any, target: Target | None) -> Array:
    if target is None:
        return result
    if isinstance(result, _Written):
        return result.array.reshape(target.row.array.shape)
    return target.with_value(result)


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any], into: Sequence[Target | None]) -> list[Any]:
    """The results; `_Written` where a target was reached on the way."""
    values, wanted = start(closed, args), _wanted(closed.jaxpr, into)
    for eqn in closed.jaxpr.eqns:
        targets = {place: wanted[var] for place, var in enumerate(eqn.outvars) if var in wanted}
        with named(eqn), eqn.ctx.manager:
            results = _results(eqn, read(values, eqn.invars), targets)
        values.update(zip(eqn.outvars, results, strict=True))
    return read(values, closed.jaxpr.outvars)


def _wanted(jaxpr: Jaxpr, into: Sequence[Target | None]) -> dict[Any, Target]:
    """Variables that nothing reads but what goes into a target, perhaps in another shape: where they belong."""
    atoms = [*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars]
    uses = Counter(atom for atom in atoms if not isinstance(atom, Literal))
    pairs = zip(jaxpr.outvars, into, strict=True)
    wanted: dict[Any, Target] = {
        var: target for var, target in pairs if target is not None and not isinstance(var, Literal) and uses[var] == 1
    }
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name == "reshape" and eqn.outvars[0] in wanted:
            target, before = wanted[eqn.outvars[0]], eqn.invars[0]
            if not isinstance(before, Literal) and uses[before] == 1:
                shape = before.aval.shape  # type: ignore[attr-defined]
                row = target.row.reshaped(shape)
                if row is not None:
                    wanted[before] = target._replace(row=row)
    return wanted


def _results(eqn: JaxprEqn, given: list[Any], targets: Mapping[int, Target]) -> Sequence[Any]:
    if eqn.primitive.name == "reshape" and isinstance(given[0], _Written):
        return given
    rows = any(isinstance(value, Row) for value in given)
    if eqn.primitive.name == "scan" and (rows or targets):
        return _scan(eqn, given, targets)
    # Recomputation only groups where nothing keeps the compiler from sharing it with the first time.
    inner = None if eqn.params.get("prevent_cse") else grouped(eqn)
    if inner is not None and (rows or targets):
        return _evaluate(inner, given, [targets.get(place) for place in range(len(eqn.outvars))])
    return run(eqn, [whole(value) for value in given])


def _scan(eqn: JaxprEqn, given: list[Any], targets: Mapping[int, Target]) -> list[Any]:
    num_consts, num_carry, _ = scan_arguments(eqn)
    consts, carry = [[whole(v) for v in part] for part in (given[:num_consts], given[num_consts:][:num_carry])]
    xs, length, reverse = given[num_consts + num_carry :], eqn.params["length"], eqn.params["reverse"]
    placed = {place: target for place, target in targets.items() if place >= num_carry}
    body = kernels_beside_sums(eqn.params["jaxpr"], [place for place in placed if placed[place].combine is not None])

    def turn(state: Any, row: Any) -> Any:
        (carry, arrays), (scanned, index) = state, row
        rest = iter(scanned)
        rows = [x.at(index).read() if isinstance(x, Row) else next(rest) for x in xs]
        results = body(*consts, *carry, *rows)
        for place, target in placed.items():
            here = dataclasses.replace(target.row, array=arrays[place]).at(index)
            arrays = arrays | {place: target._replace(row=here).with_value(results[place])}
        ys = [y for place, y in enumerate(results) if place >= num_carry and place not in placed]
        return (list(results[:num_carry]), arrays), ys

    start = carry, {place: target.row.array for place, target in placed.items()}
    scanned = [x for x in xs if not isinstance(x, Row)]
    (carry, arrays), ys = jax.lax.scan(turn, start, (scanned, jnp.arange(length)), reverse=reverse)
    rest = iter(ys)
    stacked = range(num_carry, len(eqn.outvars))
    return [*carry, *(_Written(arrays[place]) if place in placed else next(rest) for place in stacked)]
