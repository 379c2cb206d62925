"""Parameters in the dtype that a model computes in, cast once a step instead of wherever they are read.

With mixed precision a model casts its fp32 matrices at each use: for every microbatch, in the forward pass and again in
the backward pass. A copy that is made before the first microbatch saves the reading of fp32, and gradients of a
microbatch arrive in the copy's dtype, half as large; they are still added up in fp32. Megatron keeps such a copy for
good (`core/optimizer/optimizer.py`, `Float16OptimizerWithFloat16Params`).

Only parameters are copied of which a model reads nothing but that cast, and once: then every number, that of gradients
too, is the same as without. The program of the model says so itself, whatever its modules are.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from megajax.parallel.jaxprs import grouped, scan_arguments

Tree = Any

_WHOLE = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "sharding_constraint", "copy"})
"""Primitives that give all numbers of their operand in another form."""
_PARTS = frozenset({"slice", "dynamic_slice"})


def cast_once(forward: Callable[[Tree], Any], params: Tree, dtype: Any) -> Tree:
    """A tree of bools: whether all that `forward` does with a parameter is to cast it to `dtype`, once.

    Args:
      forward: of the parameters alone; traced, not run.
      params: arrays or shapes.
    """
    leaves, tree = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(lambda *leaves: forward(tree.unflatten(leaves)))(*leaves).jaxpr
    dtype = jnp.dtype(dtype)
    wider = (leaf.dtype.itemsize > dtype.itemsize for leaf in leaves)
    return tree.unflatten(
        [wide and _casts(jaxpr, var, dtype) == 1 for wide, var in zip(wider, jaxpr.invars, strict=True)]
    )


def cast(params: Tree, chosen: Tree, dtype: Any) -> Tree:
    """Parameters, the chosen ones in `dtype`."""
    return jax.tree.map(lambda leaf, yes: leaf.astype(dtype) if yes else leaf, params, chosen)


def _casts(jaxpr: Jaxpr, var: Any, dtype: Any) -> float:
    """How often numbers of a variable are cast to `dtype`; infinity: something else is done with them as well."""
    total, of_parts = 0.0, 0.0
    if any(out is var for out in jaxpr.outvars):
        return float("inf")
    for equation in jaxpr.eqns:
        for at, operand in enumerate(equation.invars):
            if operand is var:
                name = equation.primitive.name
                if name in _PARTS and at == 0:  # parts that do not overlap, as stacks of layers are cut
                    of_parts = max(of_parts, _casts(jaxpr, equation.outvars[0], dtype))
                elif name in _WHOLE:
                    total += _casts(jaxpr, equation.outvars[0], dtype)
                elif name == "convert_element_type" and equation.params["new_dtype"] == dtype:
                    total += 1
                else:
                    total += max(_inside(equation, at, dtype), default=float("inf"))
    return total + of_parts


def _inside(equation: Any, at: int, dtype: Any) -> Iterator[float]:
    """`_casts` of operand `at` in the programs that an equation calls; none: it is no call that is known."""
    name, params = equation.primitive.name, equation.params
    # What has a derivative of its own may count on the dtype of its operand.
    body = None if name.startswith("custom_") else params["jaxpr"] if name == "shard_map" else grouped(equation)
    if body is not None:
        inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        yield _casts(inner, inner.invars[at], dtype)
    elif name == "cond" and at > 0:
        for branch in params["branches"]:
            yield _casts(branch.jaxpr, branch.jaxpr.invars[at - 1], dtype)
    elif name == "scan" and at >= sum(scan_arguments(equation)[:2]):  # what all turns read is read often
        inner = params["jaxpr"].jaxpr
        yield _casts(inner, inner.invars[at], dtype)
