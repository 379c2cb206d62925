"""Which results of a function are only other views of arguments, and how to make them again from those."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, Var

from megajax.parallel.jaxprs import Values, read, run

Array = jax.Array

_VIEWS = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "slice", "squeeze", "transpose"}
)
"""Instructions that cost no more than a copy."""


@dataclasses.dataclass(frozen=True)
class Views:
    """The results of `function(*known, *others)` that instructions like a slice or a reshape make of `known`.

    Attributes:
      sources: of each result its place in what calling this returns, None where it is no view.
      rest: shapes of those that are none.
      reads: places of those of `known` that the views are of.
    """

    sources: tuple[int | None, ...]
    rest: tuple[jax.ShapeDtypeStruct, ...]
    reads: tuple[int, ...]
    _known: tuple[Var, ...]
    _made: tuple[JaxprEqn, ...]
    _results: tuple[Var, ...]

    @classmethod
    def of(cls, function: Callable[..., Sequence[Array]], known: Sequence[Any], others: Sequence[Any]) -> Views:
        """Traces the function."""
        closed = jax.make_jaxpr(lambda *args: list(function(*args)))(*known, *others)
        jaxpr = closed.jaxpr
        arguments = tuple(jaxpr.invars[: len(known)])
        at_hand = set(arguments)
        made = []
        for eqn in jaxpr.eqns:
            reads = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
            if eqn.primitive.name in _VIEWS and reads and at_hand.issuperset(reads):
                at_hand.update(eqn.outvars)
                made.append(eqn)
        found = [var for var in jaxpr.outvars if not isinstance(var, Literal) and var in at_hand]
        results = tuple(dict.fromkeys(found))
        made, needed = _needed(made, results)
        sources = tuple(results.index(var) if var in results else None for var in jaxpr.outvars)
        rest = [var.aval for var, source in zip(jaxpr.outvars, sources, strict=True) if source is None]
        shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in rest)  # type: ignore[attr-defined]
        reads = tuple(place for place, var in enumerate(arguments) if var in needed)
        return cls(sources, shapes, reads, arguments, made, results)

    def __call__(self, known: Sequence[Array | None]) -> list[Array]:
        """The views; of `known`, only what `reads` says is looked at."""
        values: Values = dict(zip(self._known, known, strict=True))
        for eqn in self._made:
            values.update(zip(eqn.outvars, run(eqn, read(values, eqn.invars)), strict=True))
        return [values[var] for var in self._results]


def _needed(made: Sequence[JaxprEqn], results: Sequence[Var]) -> tuple[tuple[JaxprEqn, ...], set[Any]]:
    """(the instructions that the results need, what those and the results read)."""
    needed, kept = set(results), []
    for eqn in reversed(made):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return tuple(reversed(kept)), needed
