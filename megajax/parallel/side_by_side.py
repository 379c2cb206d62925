"""Two functions that need nothing of each other in one computation: their loops become one, and so do their branches.

A compiler puts work beside a collective only within a computation, and a loop's body is one of its own. The forward
pass of a microbatch is a loop over layers, the backward pass of another one too: one after the other, each waits for
its own exchange of tokens; as one loop, of a layer of each a turn, one's exchange runs beside the other's arithmetic,
for which they take turns (`megajax.parallel.in_turns`).
Which loops fit each other is read from the jaxprs, so a model needs to know nothing of it.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from megajax.parallel.in_turns import Chain, take_turns
from megajax.parallel.jaxprs import Values, named, read, run, scan_arguments, start
from megajax.parallel.pipeline_pieces import at_index, put_at, room

Array = jax.Array
Tree = Any


def side_by_side(
    first: Callable[..., Tree], first_args: tuple[Tree, ...], second: Callable[..., Tree], second_args: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """`(first(*first_args), second(*second_args))`, with loops over as many turns, and branches in these, as one."""
    one, other = _Half.of(first, first_args), _Half.of(second, second_args)
    _run(one.half, other.half, ("scan", "cond"))
    return one.result(), other.result()


class _Body(NamedTuple):
    """Of a loop or a branch, with its arguments."""

    closed: ClosedJaxpr
    args: Sequence[Any]


class _Traced(NamedTuple):
    half: _Half
    structure: Any

    def result(self) -> Tree:
        return jax.tree.unflatten(self.structure, self.half.results)


@dataclasses.dataclass
class _Half:
    """A function under way. done: how many of its instructions have run."""

    closed: ClosedJaxpr
    values: Values
    done: int = 0

    @classmethod
    def of(cls, function: Callable[..., Tree], args: tuple[Tree, ...]) -> _Traced:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        return _Traced(cls.start(closed, jax.tree.leaves(args)), jax.tree.structure(shape))

    @classmethod
    def start(cls, closed: ClosedJaxpr, args: Sequence[Any]) -> _Half:
        return cls(closed, start(closed, args))

    @property
    def eqns(self) -> Sequence[JaxprEqn]:
        return self.closed.jaxpr.eqns

    @property
    def results(self) -> list[Any]:
        return self.read(self.closed.jaxpr.outvars)

    def read(self, atoms: Sequence[Any]) -> list[Any]:
        return read(self.values, atoms)

    def run_to(self, place: int) -> None:
        """The instructions before this place."""
        for eqn in self.eqns[self.done : place]:
            with named(eqn):
                results = run(eqn, self.read(eqn.invars))
            self.finish(eqn, results)

    def finish(self, eqn: JaxprEqn, results: Sequence[Any]) -> None:
        """Takes note of what an instruction has given."""
        self.values.update(zip(eqn.outvars, results, strict=True))
        self.done += 1


def _run(one: _Half, other: _Half, kinds: tuple[str, ...]) -> None:
    """Both to their end. kinds: of instructions to join here, inside of those, and so on."""
    kind, *inside = kinds
    join = {"scan": _join_scans, "cond": _join_branches}[kind]
    for place, its_place in _pairs(_turns(one.eqns, kind), _turns(other.eqns, kind)):
        one.run_to(place)
        other.run_to(its_place)
        join(one, other, tuple(inside))
    one.run_to(len(one.eqns))
    other.run_to(len(other.eqns))


def _run_bodies(mine: _Body, its: _Body, kinds: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
    """The results of both."""
    if kinds and _pairs(*(_turns(body.closed.jaxpr.eqns, kinds[0]) for body in (mine, its))):
        halves = _Half.start(*mine), _Half.start(*its)
        _run(*halves, kinds)
        return halves[0].results, halves[1].results
    chains = Chain.of(*mine), Chain.of(*its)
    take_turns(*chains)
    return chains[0].results, chains[1].results


def _turns(eqns: Sequence[JaxprEqn], kind: str) -> list[tuple[int, int]]:
    """(place, number of turns) of the instructions of a kind."""
    return [(place, eqn.params.get("length", 1)) for place, eqn in enumerate(eqns) if eqn.primitive.name == kind]


def _pairs(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places with as many turns, without crossing; the longest loops first, for what they cover is worth most."""
    fitting = [(turns, -i, -j) for i, (_, turns) in enumerate(one) for j, (_, its) in enumerate(other) if turns == its]
    if not fitting:
        return []
    _, i, j = max(fitting)
    i, j = -i, -j
    return [*_pairs(one[:i], other[:j]), (one[i][0], other[j][0]), *_pairs(one[i + 1 :], other[j + 1 :])]


class _Loop(NamedTuple):
    """A scan over rows that are looked up by turn."""

    body: ClosedJaxpr
    consts: list[Array]
    carry: list[Array]
    rows: list[Array]
    written: list[Array]
    last: int
    reverse: bool

    @classmethod
    def of(cls, half: _Half, eqn: JaxprEqn) -> _Loop:
        num_consts, num_carry, _ = scan_arguments(eqn)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        given = half.read(eqn.invars)
        consts, carry, rows = given[:num_consts], given[num_consts:][:num_carry], given[num_consts + num_carry :]
        written = room(length, [out.aval for out in body.jaxpr.outvars[num_carry:]])
        return cls(body, consts, carry, rows, written, length - 1, eqn.params["reverse"])

    def turn(self, carry: list[Array], index: Array) -> _Body:
        rows = at_index(self.rows, self.at(index))
        return _Body(self.body, [*self.consts, *carry, *rows])

    def after(self, results: list[Array], written: list[Array], index: Array) -> tuple[list[Array], list[Array]]:
        """(carry, rows written)."""
        count = len(self.carry)
        return results[:count], put_at(written, results[count:], self.at(index))

    def at(self, index: Array) -> Array:
        """The row of a turn."""
        return self.last - index if self.reverse else index


def _join_scans(one: _Half, other: _Half, inside: tuple[str, ...]) -> None:
    eqn, its_eqn = one.eqns[one.done], other.eqns[other.done]
    mine, its = _Loop.of(one, eqn), _Loop.of(other, its_eqn)

    def turn(state: Tree, index: Array) -> tuple[Tree, None]:
        (carry, written), (its_carry, its_written) = state
        results, its_results = _run_bodies(mine.turn(carry, index), its.turn(its_carry, index), inside)
        return (mine.after(results, written, index), its.after(its_results, its_written, index)), None

    with named(eqn):
        start = (mine.carry, mine.written), (its.carry, its.written)
        state, _ = jax.lax.scan(turn, start, jnp.arange(mine.last + 1))
    for half, joined, (carry, written) in zip((one, other), (eqn, its_eqn), state, strict=True):
        half.finish(joined, [*carry, *written])


def _join_branches(one: _Half, other: _Half, inside: tuple[str, ...]) -> None:
    """A branch for each pair of branches."""
    eqn, its_eqn = one.eqns[one.done], other.eqns[other.done]
    (index, *given), (its_index, *its_given) = one.read(eqn.invars), other.read(its_eqn.invars)
    branches, its_branches = eqn.params["branches"], its_eqn.params["branches"]

    def both(mine: ClosedJaxpr, its: ClosedJaxpr, given: list[Array], its_given: list[Array]) -> Tree:
        return _run_bodies(_Body(mine, given), _Body(its, its_given), inside)

    pairs = [partial(both, mine, its) for mine in branches for its in its_branches]
    with named(eqn):
        results, its_results = jax.lax.switch(index * len(its_branches) + its_index, pairs, given, its_given)
    one.finish(eqn, results)
    other.finish(its_eqn, its_results)
