"""A step compiled before there is anything to run it on: for devices that need not exist, from shapes alone."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from megajax.config import Config
from megajax.data.build import Sizes
from megajax.data.tokenizers import build_tokenizer
from megajax.models.family import Family
from megajax.parallel.branch_check import require_no_meeting_of_some_stages
from megajax.parallel.live_memory import LiveBuffer, compile_and_watch
from megajax.parallel.sharding import spec_of
from megajax.training.batches import prepare_batch
from megajax.training.setup import Program, build_program, fit_config, on_mesh
from megajax.training.state import is_axes

Step = Literal["train", "eval"]


class Compiled(NamedTuple):
    """A step compiled for the devices of `program.mesh`.

    live: what is alive at its peak, the largest first. batch: what it was traced with, arrays [M, B, ...]. seconds: to
    trace it, and to compile it.
    """

    step: Step
    program: Program
    executable: Any
    live: tuple[LiveBuffer, ...]
    batch: dict[str, jax.ShapeDtypeStruct]
    seconds: tuple[float, float]

    @property
    def num_microbatches(self) -> int:
        """M."""
        return next(iter(self.batch.values())).shape[0]


def compile_step(config: Config, family: Family, devices: list[Any], step: Step = "train") -> Compiled:
    """The step of a run with this config on these devices. No parameter is allocated, and no data of the user is read:
    samples have the shapes that the family makes of its default data.

    Raises:
      ConfigError: the run would be refused as well.
    """
    program, batch = program_to_trace(config, family, devices, step)
    state = program.abstract_state
    function: Any = program.train_step if step == "train" else program.eval_step
    began = time.monotonic()
    with on_mesh(program):
        lowered = function.lower(state if step == "train" else state.params, batch)
        traced = time.monotonic()
        executable, live = compile_and_watch(lowered)
    if config.parallel.pipeline_model_parallel_size > 1:
        require_no_meeting_of_some_stages(executable.as_text(), program.mesh)
    return Compiled(step, program, executable, live, batch, (traced - began, time.monotonic() - traced))


def program_to_trace(
    config: Config, family: Family, devices: list[Any] | None, step: Step = "train"
) -> tuple[Program, dict[str, jax.ShapeDtypeStruct]]:
    """A run's program and what its step is traced with, nothing compiled yet. devices: None for those at hand.

    Raises:
      ConfigError: the run would be refused as well.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    config = fit_config(config, family, tokenizer)
    program = build_program(config, family, devices=devices)
    count = program.batches.at(0).num_microbatches if step == "train" else program.eval_microbatches
    return program, abstract_batch(program, _sample(config, family, tokenizer), count)


def _sample(config: Config, family: Family, tokenizer: Any) -> dict[str, np.ndarray]:
    data = dataclasses.replace(config.data, data=())
    return family.datasets(dataclasses.replace(config, data=data), tokenizer, Sizes(1, 1, 1)).train[0]


def abstract_batch(program: Program, sample: dict[str, np.ndarray], num_microbatches: int) -> dict[str, Any]:
    """What `place_batch` would make of samples like this one: shapes [M, B, ...], dtypes and places."""
    rows = program.batches.micro_batch_size * program.batches.data_parallel_size
    axes_of, table = program.family.axes_of, program.rules.table
    rows_of_one = {name: np.asarray(array)[None] for name, array in sample.items()}
    arrays = prepare_batch(rows_of_one, program.config.parallel, axes_of)

    def shape(name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        place = NamedSharding(program.mesh, spec_of((None, *axes_of(name)), table))
        return jax.ShapeDtypeStruct((num_microbatches, rows, *array.shape[1:]), array.dtype, sharding=place)

    return {name: shape(name, array) for name, array in arrays.items()}


class HeldBytes(NamedTuple):
    """What one device keeps, in bytes. gradients: where a step adds them up, fp32; optimizer: with what else the state
    holds.
    """

    parameters: int
    optimizer: int
    gradients: int
    batch: int


def held_bytes(compiled: Compiled) -> HeldBytes:
    """By arithmetic: the part of each array that lies on a device, times the size of its numbers."""
    if compiled.step != "train":
        return HeldBytes(
            bytes_on_a_device(compiled.program.abstract_state.params), 0, 0, bytes_on_a_device(compiled.batch)
        )
    program, state = compiled.program, compiled.program.abstract_state
    axes = jax.tree.leaves(program.axes.params, is_leaf=is_axes)
    places = [NamedSharding(program.mesh, spec_of(names, program.rules.gradient_table)) for names in axes]
    gradients = sum(
        4 * math.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(state.params), places, strict=True)
    )
    return HeldBytes(
        bytes_on_a_device(state.params),
        bytes_on_a_device(state.replace(params=None)),
        gradients,
        bytes_on_a_device(compiled.batch),
    )


def bytes_on_a_device(tree: Any) -> int:
    """By arithmetic: the part of each array that lies on a device, times the size of its numbers."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
