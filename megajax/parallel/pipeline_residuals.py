"""A pipeline stage cut into forward and backward, so that a ring between them holds what its derivative needs."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from megajax.parallel.in_place import Row, Target, in_place, shape_of, whole
from megajax.parallel.pipeline_pieces import BlockFn, Work
from megajax.parallel.split_backward import Split, split
from megajax.parallel.views import Views

Array = jax.Array
Tree = Any
Targets = Sequence[Target | None]


@dataclasses.dataclass(frozen=True)
class Residuals:
    """Layers of a block cut into forward and backward at what their derivative keeps.

    Of a chunk, and of what was kept, leaves may be `Row`s: layers read theirs where they lie. Results go into targets,
    which are returned instead, layer by layer.

    The function that `jax.vjp` returns is a pytree: its leaves are the residuals. Those that are the layers' own
    parameters, or the microbatch, or views of them (a slice of the stack of layers, say), are at hand in the backward
    tick and need not wait in the ring.
    """

    block: BlockFn
    structure: Any
    views: Views

    @classmethod
    def of(cls, block: BlockFn, chunk: tuple[Tree, Tree], x_like: Tree, work: Work) -> Residuals:
        """Traces the layers to see what they keep."""
        found: dict[str, Any] = {}
        known = [shape_of(leaf) for leaf in jax.tree.leaves((chunk, work))]
        structure = jax.tree.structure((chunk, work, x_like))

        def trace(*args: Array) -> list[Array]:
            chunk, work, x = jax.tree.unflatten(structure, args)
            _, leaves, found["structure"] = _pull_apart(block, chunk, x, work)
            return leaves

        views = Views.of(trace, known, jax.tree.leaves(x_like))
        return cls(block, found["structure"], views)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the leaves that have to be kept."""
        return self.views.rest

    def forward(
        self, chunk: tuple[Tree, Tree], x: Tree, work: Work, into: Targets | None = None
    ) -> tuple[Tree, list[Array]]:
        """(y, what to keep)."""
        given, structure = jax.tree.flatten((chunk, work, x))
        stream = jax.tree.structure(x)

        def run(*given: Array) -> list[Array]:
            chunk, work, x = jax.tree.unflatten(structure, given)
            y, leaves, _ = _pull_apart(self.block, chunk, x, work)
            kept = [leaf for leaf, source in zip(leaves, self.views.sources, strict=True) if source is None]
            return [*jax.tree.leaves(y), *kept]

        targets = [None] * len(self.shapes) if into is None else into
        results = in_place(run, given, [*[None] * stream.num_leaves, *targets])
        return jax.tree.unflatten(stream, results[: stream.num_leaves]), results[stream.num_leaves :]

    def backward(
        self, chunk: tuple[Tree, Tree], kept: Sequence[Array | Row], work: Work, g: Tree, into: Tree = None
    ) -> tuple[Tree, Tree]:
        """(gradient of the parameters, gradient of x).

        Args:
          into: a tree of targets like the parameters.
        """
        given, structure = jax.tree.flatten((chunk, work, list(kept), g))
        params = jax.tree.structure(chunk[0])

        def run(*given: Array) -> list[Array]:
            return jax.tree.leaves(self._backward(*jax.tree.unflatten(structure, given)))

        targets = [None] * params.num_leaves if into is None else params.flatten_up_to(into)
        results = in_place(run, given, [*targets, *[None] * len(jax.tree.leaves(g))])
        d_params, dx = results[: params.num_leaves], results[params.num_leaves :]
        return jax.tree.unflatten(params, d_params), jax.tree.unflatten(jax.tree.structure(g), dx)

    def _backward(self, chunk: tuple[Tree, Tree], work: Work, kept: list[Array], g: Tree) -> tuple[Tree, Tree]:
        at_hand, rest = self.views(jax.tree.leaves((chunk, work))), iter(kept)
        leaves = [next(rest) if source is None else at_hand[source] for source in self.views.sources]
        return jax.tree.unflatten(self.structure, leaves)(g)


def _pull_apart(block: BlockFn, chunk: tuple[Tree, Tree], x: Tree, work: Work) -> tuple[Tree, list[Array], Any]:
    params, rows = chunk
    y, pullback = jax.vjp(lambda params, x: block(params, rows, x, work.batch, work.weights, work.key), params, x)
    return y, *jax.tree.flatten(pullback)


@dataclasses.dataclass(frozen=True)
class SplitResiduals:
    """`Residuals` whose backward is cut once more: the gradient of x now, those of the parameters later."""

    cut: Split
    """`cut.aside`: shapes of what `input_gradient` sets aside."""
    longer: tuple[bool, ...]
    """Of each array that the forward keeps whether the gradients of the parameters need it."""
    stream: Any
    """The structure of x."""

    @classmethod
    def of(cls, residuals: Residuals, chunk: tuple[Tree, Tree], x_like: Tree, work: Work) -> SplitResiduals:
        """Traces the backward pass to see which part needs what."""
        known, stream = jax.tree.leaves((chunk, work)), jax.tree.leaves(x_like)
        args, structure = jax.tree.flatten((chunk, work, list(residuals.shapes), x_like))

        def backward(*args: Array) -> list[Array]:
            chunk, work, kept, g = jax.tree.unflatten(structure, args)
            d_params, dx = residuals.backward(chunk, kept, work, g)
            return jax.tree.leaves((dx, d_params))

        is_first = [True] * len(stream) + [False] * len(jax.tree.leaves(chunk[0]))
        at_hand = [True] * (len(args) - len(stream)) + [False] * len(stream)
        cut = split(backward, *map(shape_of, args), is_first=is_first, at_hand=at_hand)
        longer = cut.later_arguments[len(known) : len(known) + len(residuals.shapes)]
        return cls(cut, longer, jax.tree.structure(x_like))

    def input_gradient(
        self, chunk: tuple[Tree, Tree], kept: list[Array], work: Work, g: Tree
    ) -> tuple[Tree, list[Array]]:
        """(gradient of x, what to set aside)."""
        dx, aside = self.cut.first(*map(whole, jax.tree.leaves((chunk, work))), *kept, *jax.tree.leaves(g))
        return jax.tree.unflatten(self.stream, dx), aside

    def parameter_gradients(
        self, chunk: tuple[Tree, Tree], kept: list[Array | None], work: Work, aside: list[Array]
    ) -> Tree:
        """Gradients of the parameters; of `kept`, only the `longer` ones are read."""
        nothing = [None] * self.stream.num_leaves
        gradients = self.cut.second(*map(whole, jax.tree.leaves((chunk, work))), *kept, *nothing, aside=aside)
        return jax.tree.unflatten(jax.tree.structure(chunk[0]), gradients)
