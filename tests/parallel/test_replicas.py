"""Gradients that replicas add up by themselves are those of all samples together."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from megajax.parallel.census import census
from megajax.parallel.replicas import Replicas
from megajax.parallel.sharding import constrain

M, B, D, F = 4, 8, 16, 32
RULES = (("batch", ("replica", "dp")), ("mlp", ("tp",)), ("embed", ()))


def _accumulate(params, batch):
    def loss(params, x):
        hidden = constrain(jnp.tanh(x @ params["up"]), "batch", "mlp")
        return jnp.sum(hidden**2 * params["scale"])

    def add(total, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        return (jax.tree.map(jnp.add, total[0], gradients), total[1] + value), None

    start = jax.tree.map(jnp.zeros_like, params), jnp.float32(0)
    return jax.lax.scan(add, start, batch)[0]


@pytest.mark.parametrize("sharded", [True, False])
def test_sums_are_those_of_all_samples(sharded):
    rng = np.random.default_rng(0)
    params = {"up": jnp.asarray(rng.normal(size=(D, F)), jnp.float32), "scale": jnp.ones(F)}
    batch = jnp.asarray(rng.normal(size=(M, B, D)), jnp.float32)
    want = _accumulate(params, batch)

    mesh = jax.make_mesh((2, 2, 1, 2), ("replica", "dp", "ep", "tp"), axis_types=(AxisType.Auto,) * 4)
    up = PartitionSpec(("dp", "ep") if sharded else None, "tp")
    replicas = Replicas(("replica", "dp"), {"up": up, "scale": PartitionSpec("tp")})
    lay = {"up": PartitionSpec(None, "tp"), "scale": PartitionSpec("tp")}
    params = {name: jax.device_put(value, NamedSharding(mesh, lay[name])) for name, value in params.items()}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, ("replica", "dp"))))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = jax.jit(replicas.each(_accumulate)).lower(params, batch).compile()
        found = compiled(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, want)
    assert found[0]["up"].sharding.is_equivalent_to(NamedSharding(mesh, up), 2)
    between = [c for c in census(compiled.as_text() or "", mesh) if c.axes and {"replica", "dp"} & {*c.axes}]
    assert between and all(c.loops == () for c in between), "replicas meet once, after the last microbatch"
    assert any(c.kind == "reduce-scatter" for c in between) == sharded


def test_nothing_changes_without_replicas():
    assert Replicas().each(_accumulate) is _accumulate
