"""A pipeline stage cut into forward and backward, so that a ring between them holds what its derivative needs."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from megajax.parallel.pipeline_pieces import Batch, Work
from megajax.parallel.split_backward import Split, split
from megajax.parallel.views import Views

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Residuals:
    """A stage cut into forward and backward at what its derivative keeps.

    The function that `jax.vjp` returns is a pytree: its leaves are the residuals. Those that are the stage's own
    parameters, or the microbatch, or views of them (a slice of the stack of layers, say), are at hand in the backward
    tick and need not wait in the ring.
    """

    stage: Callable[[Tree, Tree, Array, Batch, Array, Array | None], Array]
    structure: Any
    views: Views

    @classmethod
    def of(cls, stage: Any, chunk: tuple[Tree, Tree], x_like: Any, work: Work) -> Residuals:
        """Traces the stage to see what it keeps."""
        found: dict[str, Any] = {}
        known, structure = jax.tree.flatten((chunk, work))

        def trace(*args: Array) -> list[Array]:
            chunk, work = jax.tree.unflatten(structure, args[:-1])
            _, leaves, found["structure"] = _pull_apart(stage, chunk, args[-1], work)
            return leaves

        views = Views.of(trace, known, [x_like])
        return cls(stage, found["structure"], views)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the leaves that have to be kept."""
        return self.views.rest

    def forward(self, chunk: tuple[Tree, Tree], x: Array, work: Work) -> tuple[Array, list[Array]]:
        """(y, what to keep)."""
        y, leaves, _ = _pull_apart(self.stage, chunk, x, work)
        return y, [leaf for leaf, source in zip(leaves, self.views.sources, strict=True) if source is None]

    def backward(self, chunk: tuple[Tree, Tree], kept: list[Array], work: Work, g: Array) -> tuple[Tree, Array]:
        """(gradient of the parameters, gradient of x)."""
        at_hand, rest = self.views(jax.tree.leaves((chunk, work))), iter(kept)
        leaves = [next(rest) if source is None else at_hand[source] for source in self.views.sources]
        return jax.tree.unflatten(self.structure, leaves)(g)


def _pull_apart(stage: Any, chunk: tuple[Tree, Tree], x: Array, work: Work) -> tuple[Array, list[Array], Any]:
    params, rows = chunk
    y, pullback = jax.vjp(lambda params, x: stage(params, rows, x, work.batch, work.weights, work.key), params, x)
    return y, *jax.tree.flatten(pullback)


@dataclasses.dataclass(frozen=True)
class SplitResiduals:
    """`Residuals` whose backward is cut once more: the gradient of x now, those of the parameters later."""

    whole: Residuals
    cut: Split
    """`cut.aside`: shapes of what `input_gradient` sets aside."""

    @classmethod
    def of(cls, whole: Residuals, chunk: tuple[Tree, Tree], x_like: Any, work: Work) -> SplitResiduals:
        """Traces the backward pass to see which part needs what."""
        known, structure = jax.tree.flatten((chunk, work))

        def backward(*args: Array) -> list[Array]:
            chunk, work = jax.tree.unflatten(structure, args[: len(known)])
            d_params, dx = whole.backward(chunk, list(args[len(known) : -1]), work, args[-1])
            return [dx, *jax.tree.leaves(d_params)]

        args = (*known, *whole.shapes, x_like)
        is_first = [True] + [False] * len(jax.tree.leaves(chunk[0]))
        at_hand = [True] * (len(args) - 1) + [False]
        return cls(whole, split(backward, *args, is_first=is_first, at_hand=at_hand))

    @property
    def longer(self) -> tuple[bool, ...]:
        """Of each array that the forward keeps whether the gradients of the parameters need it."""
        return self.cut.later_arguments[-1 - len(self.whole.shapes) : -1]

    def input_gradient(
        self, chunk: tuple[Tree, Tree], kept: list[Array], work: Work, g: Array
    ) -> tuple[Array, list[Array]]:
        """(gradient of x, what to set aside)."""
        [dx], aside = self.cut.first(*jax.tree.leaves((chunk, work)), *kept, g)
        return dx, aside

    def parameter_gradients(
        self, chunk: tuple[Tree, Tree], kept: list[Array | None], work: Work, aside: list[Array]
    ) -> Tree:
        """Gradients of the parameters; of `kept`, only the `longer` ones are read."""
        gradients = self.cut.second(*jax.tree.leaves((chunk, work)), *kept, None, aside=aside)
        return jax.tree.unflatten(jax.tree.structure(chunk[0]), gradients)
