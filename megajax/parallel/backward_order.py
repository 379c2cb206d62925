"""The order of a layer's backward pass: gradients of weights are computed while gradients of inputs are on their way.

With tensor parallelism the gradient of a linear layer's input is a sum over devices, which the layers before wait for.
The gradient of its kernel waits for nothing and nothing waits for it, so that XLA's scheduler, which works from the end
of a program, puts it last, beside what happens to be there. Megatron computes it while the sum is under way
(`core/tensor_parallel/layers.py`, `LinearWithGradAccumulationAndAsyncCommunication`). Here the sum is used only once
the gradients of the kernels are there; then they are what is left to lie beside it. A gradient that sequence
parallelism gathers is used once those are there that no sum had.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.sharding import PartitionSpec

from megajax.parallel.jaxprs import named, read, run, start, without_groups
from megajax.parallel.replicas import names_of

Array = jax.Array
_Made = Mapping[Var, JaxprEqn]

_SHAPES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type"})
"""Primitives that change no number, but for its precision."""


def kernels_beside_sums(closed: ClosedJaxpr, gradients: Sequence[int]) -> Callable[..., list[Array]]:
    """A backward pass that uses the sum of the gradients of an input after it has those of the kernels it met.

    Nothing changes where no such sum crosses devices, nor where gradients of kernels do, which would be waited for,
    too; nor in layers that are computed again as a whole, whose forward pass the scheduler puts beside the sums.

    Args:
      gradients: the places, among the results, of gradients of parameters.
    """
    sums = {name for axis in ("act_heads", "act_mlp", "act_ssm_heads") for name in _dividing(axis)}
    if not sums or _dividing("batch"):
        return jaxpr_as_fun(closed)
    return partial(_run, _one_by_one(closed, gradients), gradients, sums)


def _dividing(axis: str) -> list[str]:
    """The mesh axes over which XLA divides a logical axis of activations."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    names = () if mesh.empty else rules.get(axis) or ()
    return [name for name in names if name not in mesh.manual_axes and mesh.shape[name] > 1]


def _one_by_one(closed: ClosedJaxpr, gradients: Sequence[int]) -> ClosedJaxpr:
    """A layer of which some linears are computed again together, such as an MLP, with these one by one."""
    kernels = {var for var in map(closed.jaxpr.outvars.__getitem__, gradients) if _is_matrix(var)}
    return without_groups(closed, lambda eqn: 1 < len(kernels.intersection(eqn.outvars)) < len(kernels))


def _run(closed: ClosedJaxpr, gradients: Sequence[int], sums: set[str], *args: Array) -> list[Array]:
    jaxpr, values = closed.jaxpr, start(closed, args)
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    readers = {atom: eqn for eqn in jaxpr.eqns for atom in eqn.invars if not isinstance(atom, Literal)}
    matrices = filter(_is_matrix, map(jaxpr.outvars.__getitem__, gradients))
    left = [var for var in matrices if var in made and var not in readers]
    for eqn in jaxpr.eqns:
        with named(eqn):
            values.update(zip(eqn.outvars, run(eqn, read(values, eqn.invars)), strict=True))
        if eqn.primitive.name != "sharding_constraint":
            continue
        terms, reader = list(_terms(eqn.invars[0], made)), readers.get(eqn.outvars[0])
        there = [var for var in left if var in values]
        beside = [var for var in there if _meet(terms, list(_terms(var, made)), made)]
        if not beside and reader is not None and not {*reader.outvars}.isdisjoint(left) and _is_whole(eqn, sums):
            beside = there  # an output's gradient is gathered, beside what the layers after it have left
        if beside:
            left = [var for var in left if var not in beside]
            together = [*eqn.outvars, *beside]
            values.update(zip(together, jax.lax.optimization_barrier(read(values, together)), strict=True))
    return read(values, jaxpr.outvars)


def _is_whole(constraint: JaxprEqn, axes: set[str]) -> bool:
    """Whether it leaves nothing divided over these mesh axes."""
    spec: PartitionSpec = constraint.params["sharding"].spec
    return axes.isdisjoint(name for entry in spec for name in names_of(entry))


def _is_matrix(var: Any) -> bool:
    return not isinstance(var, Literal) and len(var.aval.shape) > 1


def _terms(atom: Any, made: _Made) -> Iterator[JaxprEqn]:
    """The instructions that made the terms of a sum."""
    eqn = None if isinstance(atom, Literal) else made.get(atom)
    if eqn is None:
        return
    if eqn.primitive.name == "add_any" or eqn.primitive.name in _SHAPES:
        for term in eqn.invars:
            yield from _terms(term, made)
    else:
        yield eqn


def _meet(inputs: list[JaxprEqn], kernels: list[JaxprEqn], made: _Made) -> bool:
    """Whether the gradient of a kernel is of a linear layer whose input's is among these: they are made by one
    instruction, or by products of the same gradient of the output."""
    operands = {_origin(atom, made) for eqn in inputs for atom in _operands(eqn)}
    return any(
        any(eqn is other for other in inputs) or operands & {_origin(atom, made) for atom in _operands(eqn)}
        for eqn in kernels
    )


def _operands(eqn: JaxprEqn) -> list[Var]:
    """Of a product."""
    is_product = eqn.primitive.name == "dot_general"
    return [atom for atom in eqn.invars if not isinstance(atom, Literal)] if is_product else []


def _origin(var: Any, made: _Made) -> Any:
    """The same numbers, before they were given another shape."""
    while var in made and made[var].primitive.name in _SHAPES:
        var = made[var].invars[0]
    return var
