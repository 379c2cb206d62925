"""The programs of generation on a mesh, of prompts and of one token more, for devices that need not exist."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from megajax.backends import BackendSpecProvider
from megajax.config import Config, ConfigError
from megajax.data.tokenizers import build_tokenizer
from megajax.inference.generate import Decoding, Prompt, Sampling, boxed_cache, decode, prefill
from megajax.inference.layers import apart
from megajax.models.family import Family
from megajax.parallel import sharding
from megajax.parallel.live_memory import LiveBuffer, compile_and_watch
from megajax.parallel.mesh import data_parallel_size, make_mesh
from megajax.parallel.sharding import AxisRules
from megajax.training.blueprint import draw_up
from megajax.training.setup import compiler_options, fit_config

Phase = Literal["prefill", "decode"]
_USUAL = Sampling()


class InferenceProgram(NamedTuple):
    """The steps that `megajax.inference.generate.generate` is made of, each compiled by itself.

    params, cache, prompt: shapes and places. prefill: `(params, cache, prompt, key) -> Decoding`, decode: `(params,
    Decoding, key) -> Decoding`; both donate the cache.
    """

    config: Config
    family: Family
    mesh: Mesh
    rules: AxisRules
    backend: BackendSpecProvider
    model: nn.Module
    requests: int
    length: int
    params: Any
    cache: Any
    prompt: Prompt
    prefill: Any
    decode: Any


def build_inference_program(
    config: Config,
    family: Family,
    *,
    inference_max_requests: int,
    inference_max_seq_length: int,
    devices: list[Any] | None = None,
    sampling: Sampling = _USUAL,
) -> InferenceProgram:
    """Allocates nothing.

    Args:
      config: a run's, whose vocabulary size is known.
      inference_max_requests, inference_max_seq_length: texts that are written at once, on all devices together, and
        room for the tokens of each.
      devices: None for those at hand.

    Raises:
      ConfigError: the family has no such steps, or not in this layout.
    """
    _check(config, family, inference_max_requests, inference_max_seq_length)
    mesh = make_mesh(config.parallel, devices)
    replicas = data_parallel_size(mesh)
    if inference_max_requests % replicas:
        raise ConfigError(
            f"--inference-max-requests {inference_max_requests} is not divisible by the {replicas} replicas of"
            f" {mesh.size} devices; change one of them"
        )
    drawn = draw_up(config, family, mesh)
    assert family.layer_segments is not None and family.prompt is not None
    params = apart(drawn.params_in_use, family.layer_segments(drawn.model))
    shapes = family.prompt(config.model, inference_max_requests, inference_max_seq_length)
    prompt = {name: _placed(like, mesh, drawn.rules, family.axes_of(name)) for name, like in shapes.items()}
    cache = _abstract_cache(drawn.model, params, prompt, inference_max_seq_length, mesh, drawn.rules)
    options = compiler_options(mesh, config, 2, generation=True)
    state = _abstract_state(mesh, drawn.rules, cache, inference_max_requests)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)

    def read(params: Any, cache: Any, prompt: Prompt, key: jax.Array) -> Decoding:
        return prefill(drawn.model, params, cache, prompt, key, sampling)

    def step(params: Any, state: Decoding, key: jax.Array) -> Decoding:
        return decode(drawn.model, params, state, key, sampling)

    jit = partial(jax.jit, donate_argnums=1, out_shardings=places, compiler_options=options)
    return InferenceProgram(
        config=config,
        family=family,
        mesh=mesh,
        rules=drawn.rules,
        backend=drawn.backend,
        model=drawn.model,
        requests=inference_max_requests,
        length=inference_max_seq_length,
        params=params,
        cache=cache,
        prompt=prompt,
        prefill=jit(read),
        decode=jit(step),
    )


def _check(config: Config, family: Family, requests: int, length: int) -> None:
    if family.prompt is None:
        from megajax.models.registry import FAMILIES

        those = ", ".join(name for name, one in FAMILIES.items() if one.prompt is not None)
        raise ConfigError(f"--model {family.name}: has no step that decodes with a cache; choose from {those}")
    for flag, value in (("--inference-max-requests", requests), ("--inference-max-seq-length", length)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    longest = config.model.max_sequence_length
    if longest is not None and length > longest:
        raise ConfigError(f"--inference-max-seq-length {length} exceeds max_sequence_length={longest}; lower it")
    parallel = config.parallel
    for field in ("pipeline_model_parallel_size", "context_parallel_size"):
        if vars(parallel)[field] > 1:
            raise ConfigError(f"{field}={vars(parallel)[field]}: generation has no such layout; use tp, ep and dp")
    if parallel.sequence_parallel:
        raise ConfigError("sequence_parallel=True cannot divide a step of one token; leave it out")


def _placed(like: Any, mesh: Mesh, rules: AxisRules, axes: tuple[str | None, ...]) -> Any:
    """Shape and dtype of an array, and where it lies."""
    place = NamedSharding(mesh, sharding.spec_of(axes, rules.table))
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)


def _abstract_cache(model: nn.Module, params: Any, prompt: Prompt, length: int, mesh: Mesh, rules: AxisRules) -> Any:
    boxed = boxed_cache(model, params, prompt, length=length)
    specs = sharding.partition_specs(boxed, rules.table, mesh)
    return jax.tree.map(
        lambda box, spec: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=NamedSharding(mesh, spec)),
        boxed,
        specs,
        is_leaf=sharding.is_box,
    )


def _abstract_state(mesh: Mesh, rules: AxisRules, cache: Any, requests: int) -> Decoding:
    token = _placed(jax.ShapeDtypeStruct((requests,), jnp.int32), mesh, rules, ("batch",))
    position = _placed(jax.ShapeDtypeStruct((), jnp.int32), mesh, rules, ())
    return Decoding(cache, token, position)


class CompiledInference(NamedTuple):
    """A phase compiled for the devices of `program.mesh`; live, seconds: as in `megajax.training.ahead.Compiled`.

    inputs: tokens and position, with shapes and places. prompt: P, or 1.
    """

    phase: Phase
    program: InferenceProgram
    executable: Any
    live: tuple[LiveBuffer, ...]
    inputs: Any
    prompt: int
    seconds: tuple[float, float]


def compile_inference(
    config: Config, family: Family, devices: list[Any], phase: Phase, *, max_requests: int, max_seq_length: int
) -> CompiledInference:
    """One of the programs of generation on these devices; of a prefill, the prompts fill the cache.

    Raises:
      ConfigError: as `build_inference_program`.
    """
    config = fit_config(config, family, build_tokenizer(config.data.tokenizer))
    program = build_inference_program(
        config, family, inference_max_requests=max_requests, inference_max_seq_length=max_seq_length, devices=devices
    )
    state = _abstract_state(program.mesh, program.rules, program.cache, program.requests)
    key = jax.eval_shape(lambda: jax.random.key(0))
    began = time.monotonic()
    with jax.set_mesh(program.mesh), nn.logical_axis_rules(tuple(program.rules.table.items())):
        inputs: Any
        if phase == "decode":
            inputs, prompt = (state.token, state.position), 1
            lowered = program.decode.lower(program.params, state, key)
        else:
            inputs, prompt = program.prompt, program.length
            lowered = program.prefill.lower(program.params, program.cache, inputs, key)
        traced = time.monotonic()
        executable, live = compile_and_watch(lowered)
    seconds = (traced - began, time.monotonic() - traced)
    return CompiledInference(phase, program, executable, live, inputs, prompt, seconds)
