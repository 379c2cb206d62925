"""Gradients that replicas add up by themselves are those of all samples together."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from megajax.parallel.census import census
from megajax.parallel.replicas import Replicas, across, axes_between_replicas
from megajax.parallel.sharding import constrain

M, B, S, D, F = 4, 4, 4, 16, 32
RULES = (("batch", ("replica", "dp", "ep")), ("seq", ("cp", "ulysses")), ("mlp", ("tp",)), ("embed", ()))
AXES = ("replica", "dp", "ep", "cp", "ulysses", "tp")


def _accumulate(params, inputs, key):
    """Each part of a sequence has its own row of one parameter, as experts have; one loss is of all tokens together."""

    def loss(params, microbatch):
        x, weights = microbatch
        hidden = constrain(jnp.tanh(x @ params["up"]), "batch", "seq", "mlp")
        rows = params["of_part"][jnp.arange(x.shape[1]) // (x.shape[1] // params["of_part"].shape[0])]
        each = jnp.sum((hidden + rows) ** 2 * params["scale"] * weights[..., None]) * key
        return each + jnp.sum(weights) * across().mean_of_tokens(jnp.sum(hidden, -1)) ** 2

    def add(total, microbatch):
        value, gradients = jax.value_and_grad(loss)(params, microbatch)
        return (jax.tree.map(jnp.add, total[0], gradients), total[1] + value), None

    start = jax.tree.map(jnp.zeros_like, params), jnp.float32(0)
    return jax.lax.scan(add, start, (inputs[0]["x"], inputs[1]))[0]


@pytest.mark.parametrize(
    ("sizes", "up"),
    [
        ((2, 2, 1, 1, 1, 2), (("dp", "ep"), "tp")),
        ((2, 2, 1, 1, 1, 2), (None, "tp")),
        ((1, 2, 1, 2, 1, 2), ("dp", "tp")),
        ((1, 2, 1, 2, 1, 2), (("dp", "cp"), "tp")),
        ((1, 2, 1, 2, 1, 2), (("dp", "tp"), None)),  # the copies along tp are cut inside of what is scattered
        ((1, 1, 2, 2, 2, 1), ("ep", None)),
    ],
)
def test_sums_are_those_of_all_samples(sizes, up):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in SIZES.items()}
    inputs = {"x": jnp.asarray(rng.normal(size=(M, B, S, D)), jnp.float32)}, jnp.asarray(rng.random((M, B, S)))
    want = _accumulate(params, inputs, 3.0)

    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    tp = None if ("dp", "tp") in up else "tp"
    parameters = {"up": PartitionSpec(None, tp), "of_part": PartitionSpec("cp", "tp"), "scale": PartitionSpec("tp")}
    specs = parameters | {"up": PartitionSpec(*up)}
    replicas = Replicas(
        axes_between_replicas(mesh.shape), parameters, specs, lambda name: PartitionSpec(None, AXES[:3], AXES[3:5])
    )
    params = {name: jax.device_put(a, NamedSharding(mesh, parameters[name])) for name, a in params.items()}
    inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(None, AXES[:3], AXES[3:5])))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = jax.jit(replicas.each(_accumulate)).lower(params, inputs, 3.0).compile()
        found = compiled(params, inputs, 3.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, want)
    for name, spec in specs.items():
        assert found[0][name].sharding.is_equivalent_to(NamedSharding(mesh, spec), len(SIZES[name])), name
    between = [c for c in census(compiled.as_text() or "", mesh) if c.axes and set(AXES[:5]) & {*c.axes}]
    large = [c for c in between if c.operand_bytes > F]  # but for the mean, and its gradient
    assert large and all(c.loops == () for c in large), "replicas meet once, after the last microbatch"
    assert any(c.kind == "reduce-scatter" for c in large) == (up[0] is not None)


SIZES = {"up": (D, F), "of_part": (2, F), "scale": (F,)}


def test_nothing_changes_without_replicas():
    assert Replicas().each(_accumulate) is _accumulate
    assert axes_between_replicas({"pp": 2, "dp": 1, "cp": 1, "tp": 2}) == ()
