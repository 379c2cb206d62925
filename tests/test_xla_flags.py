"""Options of XLA: the compiler at hand knows each, and what the user says goes before them."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from megajax.config import ParallelConfig
from megajax.parallel.aot import absent_gpus
from megajax.parallel.mesh import make_mesh
from megajax.xla_flags import GPU_ENVIRONMENT, GPU_OPTIONS, apply_environment, gpu_options, options_in_force


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs the extra aot")
def test_the_compiler_knows_every_option() -> None:
    place = NamedSharding(make_mesh(ParallelConfig(), absent_gpus(2)), PartitionSpec("dp"))
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32, sharding=place)
    options = {option.name: option.value for option in gpu_options(fp8=True)}
    assert jax.jit(jnp.sum, compiler_options=options).lower(x).compile()
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(jnp.sum, compiler_options={"xla_gpu_of_an_old_version": True}).lower(x).compile()


def test_the_users_flags_go_first() -> None:
    first, *rest = GPU_OPTIONS
    given = {"XLA_FLAGS": f"--{first.name}=false --{rest[0].name}_of_another_name=1"}
    assert options_in_force(GPU_OPTIONS, given) == tuple(rest)
    assert options_in_force(GPU_OPTIONS, {}) == GPU_OPTIONS


def test_the_users_environment_stays() -> None:
    [variable] = GPU_ENVIRONMENT
    environment = {variable.name: "0.5"}
    apply_environment(environment)
    assert environment == {variable.name: "0.5"}
    apply_environment(empty := {})
    assert empty == {variable.name: variable.text}


def test_every_option_has_a_reason() -> None:
    settings = (*gpu_options(fp8=True), *GPU_ENVIRONMENT)
    assert {option.name for option in gpu_options(fp8=False, generation=True)} <= {option.name for option in settings}
    assert all(len(setting.why) > 20 for setting in settings)
    assert len({setting.name for setting in settings}) == len(settings)
