"""Recomputing what costs less to compute again than to keep, and not taking it from the forward pass after all."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

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


def backward_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of arrays in positional arguments, whose backward pass XLA cannot merge with its forward pass, as it
    cannot where these are two loops. It has no forward-mode derivative."""

    def call(*args: Any) -> Any:
        # What the function closes over has gradients, too.
        pure, closed_over = jax.closure_convert(function, *args)
        return _apart(pure, *args, *closed_over)

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apart(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _apart_forward(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    return jax.vjp(function, *args)


def _apart_backward(function: Callable[..., Any], pullback: Any, gradient: Any) -> Any:
    return jax.lax.optimization_barrier(pullback)(gradient)


_apart.defvjp(_apart_forward, _apart_backward)
