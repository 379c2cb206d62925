"""Work that belongs to one stage of a pipeline, though what it reads and makes lies on all of them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from megajax.parallel.pipeline_pieces import PP, broadcast_from
from megajax.parallel.skipped import run_if

Array = jax.Array
Tree = Any

ON_LAST_STAGE = "on_last_stage"
"""Name of the branch, in the names of its operations."""


def on_last_stage(function: Callable[..., Tree], params: Tree, *args: Tree) -> Tree:
    """`function(params, *args)` in a pipeline, computed by the last stage alone, which tells the others.

    The arguments, of floats, must be the same on every stage. So is the gradient of `args`; that of `params` is the
    last stage's, and zero on the others: they are `Pieces.apart`. The function may close over nothing that has a
    gradient.
    """
    last = jax.lax.axis_size(PP) - 1
    args = jax.tree.map(lambda leaf: _with_gradient_of(leaf, last), args)
    shapes = jax.eval_shape(function, params, *args)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    here = jax.lax.axis_index(PP) == last
    y = run_if(here, function, params, *args, otherwise=zeros, name=ON_LAST_STAGE)
    return jax.tree.map(partial(_from_stage, stage=last), y)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_gradient_of(x: Array, stage: int) -> Array:
    """x, of whose gradients that of one stage counts, for all stages."""
    return x


_with_gradient_of.defvjp(lambda x, stage: (x, None), lambda stage, _, g: (broadcast_from(g, stage),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _from_stage(x: Array, stage: int) -> Array:
    """x of one stage, on every stage. The gradient, which is the same on all, is taken for what it is."""
    return broadcast_from(x, stage)


_from_stage.defvjp(lambda x, stage: (broadcast_from(x, stage), None), lambda stage, _, g: (g,))
