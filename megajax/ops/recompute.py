"""Recomputing what costs less to compute again than to keep."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def recomputed_in_backward(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, keeping only its positional arguments for the backward pass; keyword arguments are static.

    For element-wise functions: by default JAX keeps every intermediate that a derivative mentions, which for a gated
    activation is four arrays beside its two inputs, while computing them again is free next to the matrix products.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        # Forward and backward are separate loops of a scan, so there is nothing for XLA to merge them with.
        return jax.checkpoint(partial(function, **kwargs), prevent_cse=False)(*args)

    return wrapped
