"""Two chains of work and messages in one computation: one's messages travel while the other computes.

A compiler that sees both chains runs one after the other as it likes, and each waits for its own messages. Here they
take turns. A chain is cut into legs, each of which needs messages that the one before has sent; a leg of one begins
when the leg of the other is done, whose messages travel meanwhile. Only what is sent and what has arrived is held to
that order: gradients of weights, for one, run wherever there is room.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from megajax.parallel.jaxprs import Values, named, read, run, start, without_groups

_MESSAGES = frozenset({"all_gather", "reduce_scatter", "all_to_all", "ragged_all_to_all"})
_WORK = frozenset({"dot_general", "ragged_dot_general", "scan", "while", "pallas_call", "ffi_call", "custom_vjp_call"})


def take_turns(first: Chain, second: Chain) -> None:
    """Runs both to their end. The second is a leg ahead: it had better be the one with more messages."""
    for chain in (first, second):
        chain.run(chain.legs[0])
        _meet((chain, chain.sent(0)), (chain, _made_by(chain.early)))  # the early ones travel during the first leg
    for leg in range(1, max(len(first.legs), len(second.legs))):
        for ahead, other, done in ((second, first, leg - 1), (first, second, leg)):
            ahead.run(ahead.messages_behind(leg - 1))
            _meet((other, other.sent(done)), (ahead, ahead.arrived(leg)))
            ahead.run(ahead.legs[leg] if leg < len(ahead.legs) else ())


@dataclasses.dataclass
class Chain:
    """A program in legs, under way.

    legs: the instructions of each. messages: those behind each leg. early: of the first leg, messages that need no work
    to be sent.
    """

    outvars: Sequence[Any]
    values: Values
    legs: list[list[JaxprEqn]]
    messages: list[list[JaxprEqn]]
    early: list[JaxprEqn]

    @classmethod
    def of(cls, closed: ClosedJaxpr, args: Sequence[Any]) -> Chain:
        """A program with its arguments."""
        flat = without_groups(closed, lambda eqn: _contains(eqn, _MESSAGES))
        chain = cls(flat.jaxpr.outvars, start(flat, args), [[]], [[]], [])
        leg: dict[Var, int] = {}
        worked: set[Var] = set()
        for eqn in flat.jaxpr.eqns:
            inputs = _variables(eqn)
            at = max((leg.get(var, 0) for var in inputs), default=0)
            travels, is_late = _travels(eqn), not worked.isdisjoint(inputs)
            is_early = travels and at == 0 and not is_late
            if is_early:
                chain.early.append(eqn)
            (chain.messages if travels and not is_early else chain.legs)[at].append(eqn)
            if is_late or _contains(eqn, _WORK):
                worked.update(eqn.outvars)
            leg.update(dict.fromkeys(eqn.outvars, at + travels))
            if at + travels == len(chain.legs):
                chain.legs.append([])
                chain.messages.append([])
        return chain

    def run(self, eqns: Iterable[JaxprEqn]) -> None:
        """Some of its instructions."""
        for eqn in eqns:
            with named(eqn):
                results = run(eqn, read(self.values, eqn.invars))
            self.values.update(zip(eqn.outvars, results, strict=True))

    def messages_behind(self, leg: int) -> list[JaxprEqn]:
        """Those that leave when a leg is done."""
        return self.messages[leg] if leg < len(self.messages) else []

    def sent(self, leg: int) -> list[Var]:
        """What the messages behind a leg are made of."""
        return [var for eqn in self.messages_behind(leg) for var in _variables(eqn)]

    def arrived(self, leg: int) -> list[Var]:
        """What the messages before a leg have brought."""
        return _made_by([*(self.early if leg == 1 else ()), *self.messages_behind(leg - 1)])

    @property
    def results(self) -> list[Any]:
        """When all has run."""
        return read(self.values, self.outvars)


def _meet(done: tuple[Chain, list[Var]], begins: tuple[Chain, list[Var]]) -> None:
    """What one chain has done, and what another begins with, are there together."""
    places = [(chain.values, var) for chain, found in (done, begins) for var in dict.fromkeys(found)]
    if not done[1] or not begins[1]:
        return
    together = jax.lax.optimization_barrier([values[var] for values, var in places])
    for (values, var), value in zip(places, together, strict=True):
        values[var] = value


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [atom for atom in eqn.invars if not isinstance(atom, Literal)]


def _made_by(eqns: Iterable[JaxprEqn]) -> list[Var]:
    return [var for eqn in eqns for var in eqn.outvars]


def _travels(eqn: JaxprEqn) -> bool:
    """Whether an instruction is a message, or a region that does little but send."""
    return _contains(eqn, _MESSAGES) and not _contains(eqn, _WORK)


def _contains(eqn: JaxprEqn, names: frozenset[str]) -> bool:
    return eqn.primitive.name in names or any(
        _contains(inner, names) for program in _programs(eqn) for inner in program.eqns
    )


def _programs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """What an instruction holds."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
