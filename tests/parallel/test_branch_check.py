"""A collective that stages would wait in for others is found in the compiled program, and only such a one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from megajax.config import ConfigError
from megajax.parallel.branch_check import (
    CheckedStep,
    branch_of_some_stages,
    meetings_of_some_stages,
    run_on_some_stages,
)
from megajax.parallel.skipped import run_if


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 2), ("pp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])


def _step(mesh: Mesh, work: Callable[[Any], Any], branch: Callable[..., Any]) -> Any:
    """A program in which only the second stage runs `work`, if `branch` is right."""

    def region(x: Any) -> Any:
        return branch(jax.lax.axis_index("pp"), [lambda: x, lambda: work(x)])

    return jax.jit(jax.shard_map(region, mesh=mesh, in_specs=P("pp", "tp"), out_specs=P("pp", "tp"), check_vma=False))


def loop_of_some_stages(index: Any, branches: Any) -> Any:
    """`branch_of_some_stages` between a state and what is to become of it."""
    old, new = branches
    return run_on_some_stages(index == 1, lambda _: new(), old(), "test")


SWAP = [(0, 1), (1, 0)]
X = jnp.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize(
    ("kind", "axes", "work"),
    [
        ("collective-permute", ("tp",), partial(jax.lax.ppermute, axis_name="tp", perm=SWAP)),
        ("collective-permute", ("pp",), partial(jax.lax.ppermute, axis_name="pp", perm=SWAP)),
        ("all-reduce", ("pp",), partial(jax.lax.psum, axis_name="pp")),
        ("all-reduce", ("pp", "tp"), partial(jax.lax.psum, axis_name=("pp", "tp"))),
    ],
)
@pytest.mark.parametrize("branch", [branch_of_some_stages, loop_of_some_stages])
def test_what_others_have_to_come_to_is_refused_before_it_runs(
    mesh: Mesh, kind: str, axes: Any, work: Any, branch: Any
) -> None:
    """Run, these programs would not return."""
    step = _step(mesh, work, branch)
    [found] = meetings_of_some_stages(step.lower(X).compile().as_text(), mesh)
    assert (found.kind, found.axes) == (kind, axes)
    with pytest.raises(ConfigError, match=rf"would hang in {kind} \S+ over {', '.join(axes)} \(.*only some stages run"):
        CheckedStep(step, mesh)(X)


@pytest.mark.parametrize("axis", ["pp", "tp"])
def test_branches_that_all_take_alike_may_hold_anything(mesh: Mesh, axis: str) -> None:
    def alike(index: Any, branches: Any) -> Any:
        del index
        return jax.lax.switch(jnp.int32(jnp.sum(X) > 0), branches)

    step = CheckedStep(_step(mesh, partial(jax.lax.ppermute, axis_name=axis, perm=SWAP), alike), mesh)
    assert step(X).shape == X.shape


@pytest.mark.parametrize("branch", [branch_of_some_stages, loop_of_some_stages])
def test_the_group_of_one_stage_may_meet(mesh: Mesh, branch: Any) -> None:
    """The second stage's rows are sums over its two devices, and the first stage's are what they were."""
    step = CheckedStep(_step(mesh, partial(jax.lax.psum, axis_name="tp"), branch), mesh)
    summed = np.tile(np.asarray(X)[2:, :2] + np.asarray(X)[2:, 2:], 2)
    np.testing.assert_array_equal(step(X), np.concatenate([np.asarray(X)[:2], summed]))
    assert not list(meetings_of_some_stages(step.lower(X).compile().as_text(), mesh))


def test_layers_of_some_stages_are_such_branches(mesh: Mesh) -> None:
    """Backward, too: the transpose of a permute is one."""

    def region(x: Any) -> Any:
        def work(x: Any) -> Any:
            return jnp.tanh(jax.lax.ppermute(x, "tp", SWAP))

        return run_if(jax.lax.axis_index("pp") == 1, work, x, otherwise=x, name="rows")

    region = jax.shard_map(region, mesh=mesh, in_specs=P("pp", "tp"), out_specs=P("pp", "tp"), check_vma=False)
    text = jax.jit(jax.grad(lambda x: region(x).sum())).lower(X).compile().as_text() or ""
    assert {found.kind for found in meetings_of_some_stages(text, mesh)} == {"collective-permute"}
    assert len(list(meetings_of_some_stages(text, mesh))) == 2


def test_a_step_is_compiled_once_for_each_shape(mesh: Mesh) -> None:
    traced = []

    def work(x: Any) -> Any:
        traced.append(x.shape)
        return x + 1

    step = CheckedStep(_step(mesh, work, branch_of_some_stages), mesh)
    for x in (X, X + 1, X[:2]):
        step(x)
    assert traced == [(2, 2), (1, 2)]
