"""A chunk of layers whose forward pass of one microbatch runs beside the backward pass of another.

The two depend on nothing of each other, and stand in one scan in the order in which Megatron issues them: while tokens
of one travel to their experts and back, the other has attention and experts to compute, and a compiler that schedules
for latency puts one under the other. Megatron: `core/models/common/model_chunk_schedule_plan.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.parallel.pipeline_pieces import at_index, put_at
from megajax.parallel.views import Views

Array = jax.Array
Tree = Any

Piece = Callable[[Tree, Tree, Tree, Array | None], Tree]
"""`(parameters, state, inputs, key) -> state`: a part of a layer; key None turns dropout off."""


class LayerPieces(NamedTuple):
    """A layer in the parts that a schedule moves about: the first's state is what the layer reads, the last's what it
    returns."""

    attn: Piece
    moe_dispatch: Piece
    mlp: Piece
    moe_combine: Piece
    mtp_post_process: Piece


FORWARD_BESIDE_BACKWARD = (
    ("B", "mtp_post_process"), ("B", "moe_combine"), ("F", "attn"),
    ("B", "mlp"), ("F", "moe_dispatch"),
    ("B", "moe_dispatch"), ("F", "mlp"),
    ("F", "moe_combine"), ("B", "attn"), ("F", "mtp_post_process"),
)  # fmt: skip
"""Of a layer of each, Megatron's order (`TransformerLayerSchedulePlan.run`): each exchange beside what hides it."""


class Microbatch(NamedTuple):
    """x: what the first layer reads. inputs: what all layers read beside it. key: dropout's, folded with the layer's
    index; None: no dropout."""

    x: Tree
    inputs: Tree
    key: Array | None


class Kept(NamedTuple):
    """What a backward pass needs of its forward pass. leaves: for each piece its arrays [L, ...]. inputs, key: those of
    the microbatch."""

    leaves: tuple[list[Array], ...]
    inputs: Tree
    key: Array | None


@dataclasses.dataclass(frozen=True)
class ModelChunkSchedulePlan:
    """Layers of one kind, their parameters stacked [L, ...], for microbatches of one shape.

    Attributes:
      parts: the pieces with what each keeps for its derivative. Parameters, and what all layers read, are at hand in
        the backward pass, too, and are not kept.
      num_layers: L. first: index of the first layer, for dropout.
    """

    parts: tuple[_Part, ...]
    num_layers: int
    first: int = 0

    @classmethod
    def of(cls, pieces: LayerPieces, params: Tree, microbatch: Microbatch, *, first: int = 0) -> ModelChunkSchedulePlan:
        """Traces one layer. params [L, ...] and microbatch may be shapes."""
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
        known, state, parts = (like, microbatch.inputs, microbatch.key), microbatch.x, []
        for piece in pieces:
            part, state = _Part.of(piece, known, state)
            parts.append(part)
        return cls(tuple(parts), jax.tree.leaves(params)[0].shape[0], first)

    def forward(self, params: Tree, microbatch: Microbatch) -> tuple[Tree, Kept]:
        """(what the last layer returns, what `backward` needs)."""

        def layer(x: Tree, index: Array) -> tuple[Tree, tuple[list[Array], ...]]:
            run = _Forward(self.parts, self._known(params, microbatch.inputs, microbatch.key, index), x)
            for place in range(len(self.parts)):
                run.step(place)
            return run.state, tuple(run.kept)

        x, leaves = jax.lax.scan(layer, microbatch.x, jnp.arange(self.num_layers))
        return x, Kept(leaves, microbatch.inputs, microbatch.key)

    def backward(self, params: Tree, kept: Kept, g: Tree) -> tuple[Tree, Tree]:
        """(gradients of the parameters in fp32, gradient of x), from that of what the last layer returned."""

        def layer(carry: tuple[Tree, Tree], index: Array) -> tuple[tuple[Tree, Tree], None]:
            totals, g = carry
            run = self._backward(params, kept, g, index)
            for place in reversed(range(len(self.parts))):
                run.step(place)
            return (put_at(totals, run.gradients, index), run.state), None

        start = (_fp32(params), g)
        (totals, g), _ = jax.lax.scan(layer, start, jnp.arange(self.num_layers), reverse=True)
        return totals, g

    def forward_backward(
        self, params: Tree, microbatch: Microbatch, kept: Kept, g: Tree
    ) -> tuple[Tree, Kept, Tree, Tree]:
        """`forward` of a microbatch beside `backward` of an earlier one: the results of both, one after the other."""
        names = LayerPieces._fields

        def pair(carry: tuple[Tree, Tree, Tree], index: Array) -> tuple[tuple[Tree, Tree, Tree], Any]:
            x, totals, g = carry
            at = self.num_layers - 1 - index
            forward = _Forward(self.parts, self._known(params, microbatch.inputs, microbatch.key, index), x)
            backward = self._backward(params, kept, g, at)
            for kind, name in FORWARD_BESIDE_BACKWARD:
                (forward if kind == "F" else backward).step(names.index(name))
            return (forward.state, put_at(totals, backward.gradients, at), backward.state), tuple(forward.kept)

        start = (microbatch.x, _fp32(params), g)
        (x, totals, g), leaves = jax.lax.scan(pair, start, jnp.arange(self.num_layers))
        return x, Kept(leaves, microbatch.inputs, microbatch.key), totals, g

    def _known(self, params: Tree, inputs: Tree, key: Array | None, index: Array) -> tuple[Tree, Tree, Array | None]:
        key = None if key is None else jax.random.fold_in(key, self.first + index)
        return at_index(params, index), inputs, key

    def _backward(self, params: Tree, kept: Kept, g: Tree, index: Array) -> _Backward:
        known = self._known(params, kept.inputs, kept.key, index)
        return _Backward(self.parts, known, at_index(list(kept.leaves), index), g)


def _fp32(params: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), params)


class _Forward:
    """A layer's forward pass, a piece at a time."""

    def __init__(self, parts: tuple[_Part, ...], known: Tree, state: Tree) -> None:
        self._parts, self._known = parts, known
        self.state: Tree = state
        self.kept: list[list[Array]] = []

    def step(self, place: int) -> None:
        """Runs the piece, whose turn it has to be."""
        assert place == len(self.kept)
        self.state, kept = self._parts[place].forward(self._known, self.state)
        self.kept.append(kept)


class _Backward:
    """A layer's backward pass, a piece at a time, the last first."""

    def __init__(self, parts: tuple[_Part, ...], known: Tree, kept: list[list[Array]], g: Tree) -> None:
        self._parts, self._known, self._kept, self._next = parts, known, kept, len(parts) - 1
        self._g = parts[-1].cotangents(g)
        self.gradients: Tree = None

    def step(self, place: int) -> None:
        """Runs the piece, whose turn it has to be."""
        assert place == self._next
        gradients, self._g = self._parts[place].backward(self._known, self._kept[place], self._g)
        added = gradients if self.gradients is None else jax.tree.map(jnp.add, self.gradients, gradients)
        self.gradients, self._next = added, place - 1

    @property
    def state(self) -> Tree:
        """The gradient of what the layer read, whose arrays are all floating-point."""
        return jax.tree.unflatten(self._parts[0].reads, self._g)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A piece cut into forward and backward at what its derivative keeps.

    State may hold whole numbers, such as where a token went; they have no gradient and are left out of what flows back.
    """

    piece: Piece
    pullback: Any
    views: Views
    reads: Any
    """Structure of the state that it reads."""

    @classmethod
    def of(cls, piece: Piece, known: Tree, state: Tree) -> tuple[_Part, Tree]:
        """(the part, shapes of the state that it returns). Arguments may be shapes."""
        found: dict[str, Any] = {}
        structure = jax.tree.structure((known, state))

        def trace(*args: Array) -> list[Array]:
            known, state = jax.tree.unflatten(structure, args)
            found["out"], leaves, found["pullback"] = _pull_apart(piece, known, state)
            found["out"] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), found["out"])
            return leaves

        views = Views.of(trace, jax.tree.leaves(known), jax.tree.leaves(state))
        return cls(piece, found["pullback"], views, jax.tree.structure(state)), found["out"]

    def forward(self, known: Tree, state: Tree) -> tuple[Tree, list[Array]]:
        """(state, what to keep)."""
        out, leaves, _ = _pull_apart(self.piece, known, state)
        return out, [leaf for leaf, source in zip(leaves, self.views.sources, strict=True) if source is None]

    def backward(self, known: Tree, kept: list[Array], g: list[Array]) -> tuple[Tree, list[Array]]:
        """(gradients of the parameters in fp32, those of the floating-point leaves of the state that it read)."""
        at_hand, rest = self.views(jax.tree.leaves(known)), iter(kept)
        leaves = [next(rest) if source is None else at_hand[source] for source in self.views.sources]
        d_params, d_state = jax.tree.unflatten(self.pullback, leaves)(g)
        return jax.tree.map(lambda d: d.astype(jnp.float32), d_params), d_state

    @staticmethod
    def cotangents(g: Tree) -> list[Array]:
        """A gradient of the state as `backward` takes it."""
        return _floating(jax.tree.leaves(g))


def _floating(leaves: list[Any]) -> list[Any]:
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _pull_apart(piece: Piece, known: Tree, state: Tree) -> tuple[Tree, list[Array], Any]:
    """(state, leaves of the derivative, its structure)."""
    params, inputs, key = known
    leaves, structure = jax.tree.flatten(state)

    def run(params: Tree, floating: list[Array]) -> tuple[list[Array], Tree]:
        given = iter(floating)
        whole = [next(given) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves]
        out = piece(params, jax.tree.unflatten(structure, whole), inputs, key)
        return _floating(jax.tree.leaves(out)), out

    _, pullback, out = jax.vjp(run, params, _floating(leaves), has_aux=True)
    return out, *jax.tree.flatten(pullback)
