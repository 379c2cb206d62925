"""A function cut in two by its outputs: what some of them need, and the rest, which runs later.

The backward pass of a stage gives the gradient of its input, which the stage before waits for, and the gradients of its
weights, which nobody waits for. Zero-bubble schedules (arXiv:2401.10241) run the second part later. Which instruction
belongs to which part is read from the jaxpr, so layers need not be written in two parts, and nothing is computed twice.
A scan over layers becomes two: one with the carry, one over what the first has set aside.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from megajax.parallel.jaxprs import Values, grouped, read, run, scan_arguments, start

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Split:
    """`function` in two parts. Arguments and results are flat lists.

    later_arguments: of each argument whether the second part reads it. aside: shapes of what the first part sets aside.
    """

    later_arguments: tuple[bool, ...]
    aside: tuple[jax.ShapeDtypeStruct, ...]
    _cut: _Cut

    def first(self, *args: Array) -> tuple[list[Array], list[Array]]:
        """(the results marked as first, what the second part needs of this one)."""
        cut = self._cut
        values = _run(cut.first, cut.start(args))
        return read(values, cut.first_outputs), read(values, cut.aside)

    def second(self, *args: Array | None, aside: Sequence[Array]) -> list[Array]:
        """The other results. Arguments that `later_arguments` does not name may be None."""
        cut = self._cut
        values = _run(cut.second, cut.start(args) | dict(zip(cut.aside, aside, strict=True)))
        return read(values, cut.second_outputs)


def split(
    function: Callable[..., Sequence[Array]], *args: Any, is_first: Sequence[bool], at_hand: Sequence[bool]
) -> Split:
    """Cuts `function(*args)`.

    Args:
      is_first: of each result whether the first part has to give it.
      at_hand: of each argument whether the second part gets it again; the others it gets from the first part, as far as
        it needs them.
    """
    closed = _flat(jax.make_jaxpr(lambda *args: list(function(*args)))(*args))
    cut = _cut(closed.jaxpr, closed.consts, is_first, at_hand)
    read_later = cut.read_later()
    aside = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in cut.aside)  # type: ignore[attr-defined]
    return Split(tuple(v in read_later for v in closed.jaxpr.invars), aside, cut)


@dataclasses.dataclass(frozen=True)
class _Step:
    """An instruction, or one of the two scans that a scan became."""

    run: Callable[[list[Any]], Sequence[Any]]
    reads: tuple[Any, ...]
    writes: tuple[Var, ...]


@dataclasses.dataclass(frozen=True)
class _Cut:
    consts: Mapping[Var, Any]
    arguments: tuple[Var, ...]
    first: tuple[_Step, ...]
    second: tuple[_Step, ...]
    first_outputs: tuple[Any, ...]
    second_outputs: tuple[Any, ...]
    aside: tuple[Var, ...]

    def start(self, args: Sequence[Any]) -> Values:
        return dict(self.consts) | dict(zip(self.arguments, args, strict=True))

    def read_later(self) -> set[Var]:
        """What the second part reads."""
        return _variables(v for step in self.second for v in step.reads) | _variables(self.second_outputs)


def _cut(jaxpr: Jaxpr, consts: Sequence[Any], is_first: Sequence[bool], at_hand: Sequence[bool]) -> _Cut:
    first_outputs = tuple(v for v, first in zip(jaxpr.outvars, is_first, strict=True) if first)
    second_outputs = tuple(v for v, first in zip(jaxpr.outvars, is_first, strict=True) if not first)
    needed_first = _needed(jaxpr.eqns, first_outputs)
    needed = _needed(jaxpr.eqns, jaxpr.outvars)
    first: list[_Step] = []
    second: list[_Step] = []
    for eqn in jaxpr.eqns:
        if needed.isdisjoint(eqn.outvars):
            continue
        if needed_first.isdisjoint(eqn.outvars):
            second.append(_plain(eqn))
        elif eqn.primitive.name == "scan":
            one, other = _cut_scan(eqn, needed_first, needed)
            first.append(one)
            second.extend(other)
        else:
            first.append(_plain(eqn))
    wanted = _variables(second_outputs)
    kept: list[_Step] = []
    for step in reversed(second):
        if not wanted.isdisjoint(step.writes):
            kept.append(step)
            wanted |= _variables(step.reads)
    second = kept[::-1]
    known = {*jaxpr.constvars, *(v for v, has in zip(jaxpr.invars, at_hand, strict=True) if has)}
    known |= {v for step in second for v in step.writes}
    produced = [*jaxpr.invars, *(v for step in first for v in step.writes)]
    aside = tuple(v for v in dict.fromkeys(produced) if v in wanted and v not in known)
    return _Cut(
        dict(zip(jaxpr.constvars, consts, strict=True)),
        tuple(jaxpr.invars),
        tuple(first),
        tuple(second),
        first_outputs,
        second_outputs,
        aside,
    )


def _cut_scan(eqn: JaxprEqn, needed_first: set[Var], needed: set[Var]) -> tuple[_Step, list[_Step]]:
    """A scan of which the first part needs some results. Its carry belongs to the first part."""
    closed, length, reverse = eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"]
    num_consts, num_carry, num_xs = scan_arguments(eqn)
    rows = eqn.outvars[num_carry:]
    later = [row in needed and row not in needed_first for row in rows]
    body = _flat(closed)
    at_hand = [True] * num_consts + [False] * num_carry + [True] * num_xs
    cut = _cut(body.jaxpr, body.consts, [True] * num_carry + [not late for late in later], at_hand)
    now = [row for row, late in zip(rows, later, strict=True) if not late]
    read_later = cut.read_later()
    again = [at for at, v in enumerate(cut.arguments) if v in read_later and at_hand[at]]
    consts_again, xs_again = ([at for at in again if (at < num_consts) == is_const] for is_const in (True, False))
    stacked = [
        Var(jax.core.ShapedArray((length, *v.aval.shape), v.aval.dtype))  # type: ignore[attr-defined]
        for v in cut.aside
    ]

    def run_first(args: list[Any]) -> list[Any]:
        consts, carry, xs = args[:num_consts], args[num_consts:][:num_carry], args[num_consts + num_carry :]

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            values = _run(cut.first, cut.start([*consts, *carry, *xs]))
            outputs = read(values, (*cut.first_outputs, *cut.aside))
            return outputs[:num_carry], outputs[num_carry:]

        carry, ys = jax.lax.scan(step, carry, xs, length=length, reverse=reverse)
        return [*carry, *ys]

    def run_second(args: list[Any]) -> list[Any]:
        consts, rows = args[: len(consts_again)], args[len(consts_again) :]
        names = [*(cut.arguments[at] for at in xs_again), *cut.aside]

        def step(_: None, row: list[Any]) -> tuple[None, list[Any]]:
            values = dict(cut.consts) | dict(zip((cut.arguments[at] for at in consts_again), consts, strict=True))
            values = _run(cut.second, values | dict(zip(names, row, strict=True)))
            return None, read(values, cut.second_outputs)

        return jax.lax.scan(step, None, rows, length=length, reverse=reverse)[1]

    first = _Step(run_first, tuple(eqn.invars), (*eqn.outvars[:num_carry], *now, *stacked))
    if not any(later):
        return first, []
    reads = (*(eqn.invars[at] for at in (*consts_again, *xs_again)), *stacked)
    writes = tuple(row for row, late in zip(rows, later, strict=True) if late)
    return first, [_Step(run_second, reads, writes)]


def _needed(eqns: Sequence[JaxprEqn], outputs: Iterable[Any]) -> set[Var]:
    wanted = _variables(outputs)
    for eqn in reversed(eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            wanted |= _variables(eqn.invars)
    return wanted


def _variables(atoms: Iterable[Any]) -> set[Var]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _plain(eqn: JaxprEqn) -> _Step:
    return _Step(partial(run, eqn), tuple(eqn.invars), tuple(eqn.outvars))


def _run(steps: Sequence[_Step], values: Values) -> Values:
    for step in steps:
        values.update(zip(step.writes, step.run(read(values, step.reads)), strict=True))
    return values


def _flat(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Without calls that only group instructions. Recomputation is one: what it computes again for the first part is
    set aside for the second."""

    def evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        values = start(closed, args)
        for eqn in closed.jaxpr.eqns:
            given, inner = read(values, eqn.invars), grouped(eqn)
            results = run(eqn, given) if inner is None else evaluate(inner, given)
            values.update(zip(eqn.outvars, results, strict=True))
        return read(values, closed.jaxpr.outvars)

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]  # type: ignore[attr-defined]
    return jax.make_jaxpr(lambda *args: evaluate(closed, args))(*avals)
