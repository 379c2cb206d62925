"""Programs as JAX traces them: groups of instructions, programs without such, and one instruction by itself."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

Values = dict[Var, Any]

_GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "jit": "jaxpr",
        "remat2": "jaxpr",
        "closed_call": "call_jaxpr",
        "eval_jaxpr": "call_jaxpr",  # closed_call in JAX 0.12
        "custom_jvp_call": "call_jaxpr",
        "custom_vjp_call": "call_jaxpr",
    }
)
"""Primitives that run a program on their operands, and where they keep it."""


def grouped(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """What an instruction runs that only groups others, operand by operand; None: it is no such."""
    where = _GROUPS.get(eqn.primitive.name)
    if where is None:
        return None
    inner = eqn.params[where]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def scan_arguments(eqn: JaxprEqn) -> tuple[int, int, int]:
    """How many constants, carried values and scanned arrays a scan takes."""
    if "ft_in" in eqn.params:  # JAX 0.12 on
        consts, carry, xs = (len(list(part)) for part in eqn.params["ft_in"].unpack())
        return consts, carry, xs
    consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    return consts, carry, len(eqn.invars) - consts - carry


def start(closed: ClosedJaxpr, args: Sequence[Any]) -> Values:
    """The values that a program begins with."""
    return dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))


def read(values: Mapping[Var, Any], atoms: Iterable[Any]) -> list[Any]:
    """The values of variables and literals."""
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]


def run(eqn: JaxprEqn, given: Sequence[Any]) -> Sequence[Any]:
    """The results of one instruction."""
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    return result if eqn.primitive.multiple_results else [result]


def named(eqn: JaxprEqn) -> Any:
    """The names of the modules that it comes from, which a compiled program is read by: a context to run it in."""
    return jax.named_scope(str(eqn.source_info.name_stack))


def without_groups(closed: ClosedJaxpr, opens: Callable[[JaxprEqn], bool]) -> ClosedJaxpr:
    """A program with the instructions of some groups as its own, and of groups in these.

    Recomputation that a barrier keeps apart from its first time stays as it is.

    Args:
      opens: whether it is one of those groups.
    """

    def inside(eqn: JaxprEqn) -> ClosedJaxpr | None:
        return grouped(eqn) if opens(eqn) and not eqn.params.get("prevent_cse") else None

    def evaluate(closed: ClosedJaxpr, *args: Any) -> list[Any]:
        values = start(closed, args)
        for eqn in closed.jaxpr.eqns:
            inner, given = inside(eqn), read(values, eqn.invars)
            with named(eqn):
                results = run(eqn, given) if inner is None else evaluate(inner, *given)
            values.update(zip(eqn.outvars, results, strict=True))
        return read(values, closed.jaxpr.outvars)

    if all(inside(eqn) is None for eqn in closed.jaxpr.eqns):
        return closed
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
    return jax.make_jaxpr(lambda *args: evaluate(closed, *args))(*shapes)
