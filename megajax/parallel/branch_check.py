"""Operations that only some stages of a pipeline run, and a check that none of their collectives waits for the others.

What is written keeps collectives between stages outside of such operations; but it is XLA that places collectives, and
one that it puts in there waits for devices that never come, with no word of what is wrong. A `collective-permute` is
one meeting of all devices that it names, whoever sends to whom, so that in there even one inside of each stage is one
too many. The text of the compiled program tells before the first step.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from megajax.config import ConfigError
from megajax.parallel.census import Collective, collective_of, kind_of
from megajax.parallel.hlo import Instruction, Where, computations_of
from megajax.parallel.mesh import stem

Tree = Any

SOME_STAGES = "of_some_stages"
"""Part of the names of such operations."""
_PP = "pp"


def branch_of_some_stages(index: Any, branches: list[Callable[[], Tree]]) -> Tree:
    """`jax.lax.switch` without operands, on an index that stages do not share."""
    with jax.named_scope(SOME_STAGES):
        return jax.lax.switch(index, branches)


def run_on_some_stages(wanted: jax.Array, function: Callable[[Tree], Tree], state: Tree, name: str) -> Tree:
    """`function(state)` on the stages where it is wanted, else the state.

    A loop of one turn or none, for that writes where its state lies: each branch of a `jax.lax.cond` would return a
    copy. Has no derivative. name: of the loop, in the names of its instructions.
    """

    def turn(carry: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        return jnp.bool_(False), function(carry[1])

    with jax.named_scope(SOME_STAGES), jax.named_scope(name):
        return jax.lax.while_loop(lambda carry: carry[0], turn, (wanted, state))[1]


def require_no_meeting_of_some_stages(hlo_text: str, mesh: Mesh) -> None:
    """Reads a compiled program.

    Raises:
      ConfigError: what only some stages run has a collective that others have to come to.
    """
    for found in meetings_of_some_stages(hlo_text, mesh):
        axes = "devices of several stages" if found.axes is None else ", ".join(found.axes)
        raise ConfigError(
            f"pipeline_model_parallel_size={mesh.shape[_PP]}: the compiled step would hang in {found.kind} {found.name}"
            f" over {axes} ({found.op_name or 'of XLA'}), which only some stages run; change the mesh, the"
            " stages' layers or pipeline_engine"
        )


def meetings_of_some_stages(hlo_text: str, mesh: Mesh) -> Iterator[Collective]:
    """The collectives in operations of some stages that are for more devices than those of one stage's group."""
    if SOME_STAGES not in hlo_text:
        return
    computations, _ = computations_of(hlo_text)
    shape = tuple(mesh.shape.items())
    branching = [
        instruction
        for instructions in computations.values()
        for instruction in instructions
        if instruction.opcode in ("while", "conditional") and _is_of_some_stages(instruction)
    ]
    for instruction in _within(computations, {name for each in branching for name in each.called}):
        kind = kind_of(instruction)
        if kind is None:
            continue
        found = collective_of(kind, instruction, Where(conditional=True), shape)
        several_stages = found.axes is None or any(stem(axis) == _PP for axis in found.axes)
        if several_stages or (kind == "collective-permute" and found.group_size > 1):
            yield found


def _is_of_some_stages(instruction: Instruction) -> bool:
    """By its own name: what stands inside has the name, too, and is found with it."""
    return SOME_STAGES in instruction.op_name.split("/")


def _within(computations: Mapping[str, list[Instruction]], names: set[str]) -> Iterator[Instruction]:
    """The instructions of these computations and of those that they call, each once."""
    seen, waiting = set(names), list(names)
    while waiting:
        for instruction in computations[waiting.pop()]:
            yield instruction
            new = [name for name in instruction.called if name not in seen]
            seen.update(new)
            waiting += new


class _Kind(NamedTuple):
    """Of arguments, what a program is compiled for: shape, dtype and place of each."""

    structure: Any
    leaves: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, args: Tree) -> _Kind:
        leaves, structure = jax.tree.flatten(args)
        return cls(structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))


class CheckedStep:
    """A jitted step that is compiled once for each shape of its arguments, and read before it first runs."""

    def __init__(self, jitted: Any, mesh: Mesh) -> None:
        self._jitted, self._mesh = jitted, mesh
        self._compiled: dict[_Kind, Any] = {}

    def lower(self, *args: Tree) -> Any:
        """As the jitted step."""
        return self._jitted.lower(*args)

    def eval_shape(self, *args: Tree) -> Any:
        """As the jitted step."""
        return self._jitted.eval_shape(*args)

    def __call__(self, *args: Tree) -> Any:
        """Runs the step.

        Raises:
          ConfigError: see `require_no_meeting_of_some_stages`.
        """
        kind = _Kind.of(args)
        if kind not in self._compiled:
            compiled = self._jitted.lower(*args).compile()
            require_no_meeting_of_some_stages(compiled.as_text(), self._mesh)
            self._compiled[kind] = compiled
        return self._compiled[kind](*args)
