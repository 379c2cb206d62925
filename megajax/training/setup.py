"""From a config to everything a run needs, in the order in which mistakes are cheapest to find."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megajax.backends import BackendSpecProvider
from megajax.config import Config, ConfigError
from megajax.data.loader import ProcessRows
from megajax.data.tokenizers import Tokenizer
from megajax.models.family import Family
from megajax.ops.threefry import is_default
from megajax.parallel import sharding
from megajax.parallel.branch_check import CheckedStep
from megajax.parallel.mesh import data_parallel_size, gpu_capability, make_mesh
from megajax.parallel.replicas import ALIKE, Replicas, axes_between_replicas
from megajax.parallel.sharding import AxisRules
from megajax.training.batches import prepare_batch
from megajax.training.blueprint import Blueprint, draw_up
from megajax.training.computed_with import ComputedWith
from megajax.training.gradients import (
    EvalStep,
    GradientsFn,
    PipelineProgram,
    accumulated_gradients,
    make_eval_step,
)
from megajax.training.microbatches import BatchSchedule, make_batch_schedule
from megajax.training.schedules import Schedule, make_schedule
from megajax.training.stages import Stages
from megajax.training.state import TrainState
from megajax.training.step import Metrics, make_train_step
from megajax.xla_flags import gpu_options, options_in_force


class Program(NamedTuple):
    """The compiled side of a run.

    axes, shardings: trees like the state. computed_with: the parameters as the model gets them. train_step: `(state,
    batch) -> (state, metrics)`, donates the state; batch arrays [M, B, ...]. eval_step: `(params, batch) -> (loss sum,
    tokens)`, params those of the state; batch arrays [M, B, ...]. eval_microbatches: M of the evaluations of a run.
    """

    config: Config
    family: Family
    mesh: Mesh
    rules: AxisRules
    stages: Stages
    backend: BackendSpecProvider
    model: nn.Module
    batches: BatchSchedule
    train_iters: int
    axes: TrainState
    abstract_state: TrainState
    computed_with: ComputedWith
    create_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
    eval_microbatches: int


def fit_config(config: Config, family: Family, tokenizer: Tokenizer) -> Config:
    """The config with what tokenizer and data decide, the vocabulary size for one, checked against the rest."""
    config = family.fit(config, tokenizer)
    start, end = config.train.profile_step_start, config.train.profile_step_end
    if end is not None and (start is None or end <= start):
        raise ConfigError(f"profile_step_end={end} must come after profile_step_start={start}; change one of them")
    _check_sequence(config)
    sharding.validate_model(config.model, config.parallel)
    return config


def _check_sequence(config: Config) -> None:
    parallel, length = config.parallel, config.data.seq_length
    shards = parallel.context_parallel_size * (2 if parallel.zigzag else 1)
    if parallel.sequence_parallel:
        shards = math.lcm(shards, parallel.context_parallel_size * parallel.tensor_model_parallel_size)
    if length % shards:
        raise ConfigError(
            f"seq_length={length} is not divisible by {shards}, as context_parallel_size="
            f"{parallel.context_parallel_size} and sequence_parallel={parallel.sequence_parallel} need it; change one"
        )


def build_program(config: Config, family: Family, *, devices: list[Any] | None = None) -> Program:
    """Mesh, model, optimizer and steps of a config whose vocabulary size is known. Allocates no array."""
    mesh = make_mesh(config.parallel, devices)
    dp = data_parallel_size(mesh)
    batches = make_batch_schedule(config.train, data_parallel_size=dp)
    train_iters, schedule = _length_and_schedule(config, batches)
    drawn = draw_up(config, family, mesh)
    gradients, eval_step = _gradients_and_evaluation(drawn, family, config, dp)
    train_step = make_train_step(gradients, config, drawn.optimizer, schedule)
    return Program(
        config=config,
        family=family,
        mesh=mesh,
        rules=drawn.rules,
        stages=drawn.stages,
        backend=drawn.backend,
        model=drawn.model,
        batches=batches,
        train_iters=train_iters,
        axes=drawn.axes,
        abstract_state=drawn.abstract_state,
        computed_with=drawn.computed_with,
        create_state=jax.jit(
            drawn.create, out_shardings=drawn.places, compiler_options=compiler_options(mesh, config, 0)
        ),
        train_step=_checked(
            jax.jit(
                train_step,
                donate_argnums=0,
                out_shardings=(drawn.places, NamedSharding(mesh, PartitionSpec())),
                compiler_options=compiler_options(mesh, config, 2),
            ),
            config,
            mesh,
        ),
        eval_step=_checked(jax.jit(eval_step, compiler_options=compiler_options(mesh, config, 2)), config, mesh),
        eval_microbatches=_eval_microbatches(config),
    )


def _checked(step: Any, config: Config, mesh: Mesh) -> Any:
    """Stages may branch apart, and what hangs there is found before it runs."""
    return CheckedStep(step, mesh) if config.parallel.pipeline_model_parallel_size > 1 else step


def _eval_microbatches(config: Config) -> int:
    """Enough to keep the stages of a pipeline busy four fifths of the time."""
    stages = config.parallel.pipeline_model_parallel_size
    return 1 if stages == 1 else max(1, min(config.train.eval_iters, 4 * stages))


def _gradients_and_evaluation(
    drawn: Blueprint, family: Family, config: Config, dp: int
) -> tuple[GradientsFn, EvalStep]:
    model, rules, param_axes = drawn.model, drawn.rules, drawn.param_axes
    replicas = _replicas(drawn, family, config)
    if config.parallel.pipeline_model_parallel_size > 1:
        assert family.pipeline_pieces is not None  # `Stages.of` has refused the rest
        pieces = family.pipeline_pieces(model)
        pipeline = PipelineProgram(
            pieces,
            drawn.stages,
            config,
            rules,
            param_axes,
            data_parallel_size=dp,
            replicas=replicas,
            computed_with=drawn.computed_with,
        )
        return pipeline.gradients, pipeline.evaluate

    def constrain(gradients: Any) -> Any:
        specs = sharding.specs_of_axes(param_axes, rules.gradient_table)
        return jax.lax.with_sharding_constraint(gradients, specs) if config.parallel.zero >= 2 else gradients

    gradients = accumulated_gradients(
        model,
        family,
        config,
        data_parallel_size=dp,
        constrain=constrain,
        replicas=replicas,
        computed_with=drawn.computed_with,
    )
    return gradients, make_eval_step(model, family, drawn.computed_with)


def _replicas(drawn: Blueprint, family: Family, config: Config) -> Replicas:
    """The replicas that add up their own gradients: not where ZeRO divides parameters or gradients between them, or
    where all tokens of a microbatch have to be seen together.
    """
    model, rules = config.model, drawn.rules
    together = any(kind == "sinkhorn" for kind, _ in model.balancing)
    together |= model.draws_noise and not is_default()
    divided = {"batch"} | ({"seq"} if config.parallel.context_parallel_size > 1 else set())
    axes = axes_between_replicas(drawn.mesh.shape)
    if config.parallel.zero > 1 or not divided.issubset(family.adds_up_apart) or together or not axes:
        return ALIKE
    return Replicas(
        axes,
        sharding.specs_of_axes(drawn.param_axes, rules.table),
        sharding.specs_of_axes(drawn.param_axes, rules.optimizer_table),
        lambda name: sharding.spec_of((None, *family.axes_of(name)), rules.table),
    )


def compiler_options(mesh: Mesh, config: Config, level: int, *, generation: bool = False) -> dict[str, Any]:
    """Options for XLA: for NVIDIA GPUs those of `megajax.xla_flags`; XLA:CPU optimizes at `level` of LLVM, 0 to 3. What
    the user's own XLA_FLAGS set is left alone.

    What runs once, such as the first weights, takes far longer to compile at the usual level 3 than to run at 0; and a
    step at 2 is as fast as at 3, in four fifths of the time to compile.

    Several devices of one process must meet at their collectives in one order. By default independent instructions run
    as threads become free, each device in an order of its own: some wait in one collective, some in another, for ever.
    """
    device = mesh.devices.flat[0]
    if gpu_capability(device) is not None:
        wanted = gpu_options(fp8=config.kernels.fp8_format is not None, generation=generation)
        return {option.name: option.value for option in options_in_force(wanted, os.environ)}
    if device.platform != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": level}
    if mesh.size > 1:
        options["xla_cpu_enable_concurrency_optimized_scheduler"] = False
    return {option: value for option, value in options.items() if option not in os.environ.get("XLA_FLAGS", "")}


def _length_and_schedule(config: Config, batches: BatchSchedule) -> tuple[int, Schedule]:
    samples = config.train.train_samples
    size = batches.global_batch_size
    if samples is None:
        return config.train.train_iters, make_schedule(
            config.optimizer, global_batch_size=size, train_iters=config.train.train_iters
        )
    schedule = make_schedule(config.optimizer, global_batch_size=size, train_samples=samples)
    return batches.train_iters(samples), schedule


@contextmanager
def on_mesh(program: Program) -> Iterator[None]:
    """Where steps are traced: logical axes mean what the program's table says."""
    rules = tuple(program.rules.table.items())
    with jax.set_mesh(program.mesh), nn.logical_axis_rules(rules):
        yield


def process_rows(program: Program) -> ProcessRows | None:
    """The rows of a microbatch that this process's devices hold; None where it is the only process.

    The mesh decides: processes that differ only in their tensor, context or pipeline coordinates hold the same rows.
    """
    if jax.process_count() == 1:
        return None
    size = program.batches.micro_batch_size * program.batches.data_parallel_size
    place = NamedSharding(program.mesh, sharding.spec_of(("batch",), program.rules.table))
    parts = place.addressable_devices_indices_map((size,)).values()
    return ProcessRows(tuple(sorted({row for part in parts for row in range(size)[part[0]]})), size)  # pyright: ignore


def _global_array(array: Any, ours: ProcessRows, place: NamedSharding) -> jax.Array:
    """array [M, n, ...], this process's rows, to the global [M, B, ...]."""

    def part(index: Any) -> Any:
        rows = range(ours.of)[index[1]]  # neighbours, so they are neighbours among ours, too
        at = ours.rows.index(rows.start)
        return array[(index[0], slice(at, at + len(rows)), *index[2:])]

    return jax.make_array_from_callback((array.shape[0], ours.of, *array.shape[2:]), place, part)


def place_batch(program: Program, batch: dict[str, Any], *, num_microbatches: int) -> dict[str, jax.Array]:
    """This process's rows [n, ...] of each array to global arrays [M, B, ...].

    Row j of the global batch belongs to microbatch j // B, as in Megatron's sampler.
    """
    ours, axes_of = process_rows(program), program.family.axes_of
    batch = prepare_batch(batch, program.config.parallel, axes_of)

    def put(name: str, array: Any) -> jax.Array:
        place = NamedSharding(program.mesh, sharding.spec_of((None, *axes_of(name)), program.rules.table))
        array = array.reshape(num_microbatches, -1, *array.shape[1:])
        return jax.device_put(array, place) if ours is None else _global_array(array, ours, place)

    return {name: put(name, array) for name, array in batch.items()}
