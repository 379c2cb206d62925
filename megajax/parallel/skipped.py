"""A part of a program that runs only where it is wanted, forward and backward: a branch with its own derivative."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from megajax.parallel.branch_check import branch_of_some_stages
from megajax.parallel.views import Views

Array = jax.Array
Tree = Any
Flat = Callable[..., Sequence[Array]]
"""A function of arrays that closes over none."""


def run_if(wanted: Array, function: Callable[..., Tree], *args: Tree, otherwise: Tree, name: str) -> Tree:
    """`where(wanted, function(*args), otherwise)`, but the function runs only where `wanted` is True, and so does its
    derivative.

    `jax.lax.cond` says as much; but differentiated it hands copies of all that the derivative reads from forward to
    backward, the parameters among them. Here arguments, and views of them, are read again where they are, and backward
    is one branch, inside of which runs what is recomputed.

    In a manual region `wanted` may differ between devices, as long as all that take part in a collective of the
    function agree.

    Args:
      wanted: bool, scalar.
      function: what it closes over is differentiated as well.
      otherwise: a tree like the function's result.
      name: what the branches are called in a compiled program, in the names of their operations.
    """
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    jaxpr, flat, instead = closed.jaxpr, jax.tree.leaves(args), jax.tree.leaves(otherwise)
    assert [a.shape for a in jax.tree.leaves(shape)] == [a.shape for a in instead], "otherwise has other shapes"

    def alone(*known: Array) -> Sequence[Array]:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, known[len(flat) :]))(*known[: len(flat)])

    results = _run_if(alone, len(instead), name)(wanted, *instead, *flat, *closed.consts)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _run_if(function: Flat, results: int, name: str) -> Callable[..., list[Array]]:
    """(wanted, what to return otherwise, arguments) -> results."""

    @jax.custom_vjp
    def run(wanted: Array, *given: Array) -> list[Array]:
        instead, known = given[:results], given[results:]
        return _branch(name, wanted, lambda: list(function(*known)), lambda: list(instead))

    def forward(wanted: Any, *given: Any) -> tuple[list[Array], Tree]:
        instead, known = ([each.value for each in part] for part in (given[:results], given[results:]))
        moves = tuple(each.perturbed and jnp.issubdtype(each.value.dtype, jnp.inexact) for each in given[results:])
        derivative = _Derivative(function, known, moves, name)
        nothing = [jnp.zeros(shape.shape, shape.dtype) for shape in derivative.kept]
        result, kept = _branch(name, wanted.value, lambda: derivative.forward(known), lambda: (instead, nothing))
        # Arguments that are kept as they are take no room of their own.
        read = {place: known[place] for place in derivative.reads}
        return result, jax.tree_util.Partial(derivative.backward, wanted.value, read, kept)

    def backward(pullback: Callable[..., list[Array | None]], given: Sequence[Any]) -> tuple[Any, ...]:
        gradients = [jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in given]  # type: ignore[arg-type]
        wanted, *_ = pullback.args  # type: ignore[attr-defined]
        of_instead = [jnp.where(wanted, jnp.zeros_like(g), g) for g in gradients]
        return None, *of_instead, *pullback(gradients)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _branch(name: str, wanted: Array, inside: Callable[[], Tree], outside: Callable[[], Tree]) -> Tree:
    with jax.named_scope(name):
        return branch_of_some_stages(wanted.astype(jnp.int32), [outside, inside])


class _Derivative:
    """How a function is differentiated with respect to those of its arguments that `moves` names.

    kept: shapes of what backward needs of forward, beside arguments. reads: places of the arguments that it needs.
    """

    def __init__(self, function: Flat, known: Sequence[Array], moves: tuple[bool, ...], name: str) -> None:
        self._function, self._moves, self._name = function, moves, name
        self._like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a, moved in zip(known, moves, strict=True) if moved]
        found: dict[str, Any] = {}

        def trace(*known: Array) -> list[Array]:
            _, leaves, found["structure"] = self._pull_apart(known)
            return leaves

        self._views = Views.of(trace, known, ())
        self._structure = found["structure"]
        self.kept, self.reads = self._views.rest, self._views.reads

    def _pull_apart(self, known: Sequence[Array]) -> tuple[list[Array], list[Array], Any]:
        def of_moving(*moving: Array) -> list[Array]:
            rest = iter(moving)
            return list(self._function(*(next(rest) if m else k for k, m in zip(known, self._moves, strict=True))))

        result, pullback = jax.vjp(of_moving, *(k for k, m in zip(known, self._moves, strict=True) if m))
        return result, *jax.tree.flatten(pullback)

    def forward(self, known: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """(results, what to keep)."""
        result, leaves, _ = self._pull_apart(known)
        return result, [leaf for leaf, source in zip(leaves, self._views.sources, strict=True) if source is None]

    def backward(
        self, wanted: Array, read: dict[int, Array], kept: Sequence[Array], gradients: Sequence[Array]
    ) -> list[Array | None]:
        """Gradients of the arguments, None where nobody asks."""

        def inside() -> list[Array]:
            at_hand, rest = self._views([read.get(i) for i in range(len(self._moves))]), iter(kept)
            leaves = [next(rest) if source is None else at_hand[source] for source in self._views.sources]
            return list(jax.tree.unflatten(self._structure, leaves)(list(gradients)))

        def outside() -> list[Array]:
            return [jnp.zeros(like.shape, like.dtype) for like in self._like]

        found = iter(_branch(self._name, wanted, inside, outside))
        return [next(found) if moved else None for moved in self._moves]
