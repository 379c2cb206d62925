"""What a plan has to know of a pipeline: how often each operation runs, what idles, what is kept."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import NamedTuple

from megajax.parallel.one_stage import ON_LAST_STAGE
from megajax.parallel.pipeline import Lockstep
from megajax.parallel.pipeline_table import loop_of
from megajax.parallel.roofline import Taken
from megajax.parallel.schedule_ticks import Plan, plan_ticks
from megajax.parallel.schedules import Schedule, make_schedule
from megajax.training.ahead import Compiled
from megajax.training.pipeline_engine import choose_engine
from megajax.training.setup import Program
from megajax.transformer.block import rows_of
from megajax.transformer.stages import PADDING


class PipelineView(NamedTuple):
    """Of a compiled step.

    Attributes:
      busy: how often the branches of conditionals that have no name are taken: both ends of a pipeline work in as many
        ticks as there are microbatches. None without a pipeline.
      taken: how often branches and loops with these names run: rows that stages do not fill all alike, what the last
        stage does alone, and operations that a stage looks up.
      engine: of training, which it is, and why; None for an evaluation, or without a pipeline, as are the next two.
      in_flight: passes of a chunk whose activations are kept at once, and those of Megatron's first stage.
      idle_share: of what is executed, what is computed only to keep step.
    """

    busy: float | None
    taken: dict[str, Taken]
    engine: str | None = None
    schedule: Schedule | None = None
    in_flight: tuple[int, int] | None = None
    idle_share: float = 0.0


def pipeline_of(compiled: Compiled) -> PipelineView:
    """How a step runs on the stages that it was compiled for."""
    program, parallel = compiled.program, compiled.program.config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if stages == 1:
        return PipelineView(None, _taken(program, None))
    blocks = len(program.stages.blocks)
    microbatches, group = compiled.num_microbatches, parallel.microbatch_group_size_per_vp_stage
    schedule = make_schedule(parallel.pipeline_schedule, stages, microbatches, chunks * blocks, group=group)
    lockstep = Lockstep(stages, chunks * blocks, microbatches)
    plan, ticks, slots = None, lockstep.forward_ticks, lockstep.slots
    idle = 1 - microbatches * schedule.chunks / ticks
    if compiled.step != "train":  # forward, in lockstep
        return PipelineView(microbatches / ticks, _taken(program, None), schedule=schedule, idle_share=idle)
    choice = choose_engine(program.stages, program.config)
    if choice.name == "table":
        plan = plan_ticks(schedule, blocks, choice.parts)
        ticks, slots, idle = len(plan.stage_ticks.kind), sum(plan.slots.saved), 0.0
    kept = slots, schedule.peak_live()[0]
    return PipelineView(microbatches / ticks, _taken(program, plan), choice.title, schedule, kept, idle)


def _taken(program: Program, plan: Plan | None) -> dict[str, Taken]:
    stages = program.config.parallel.pipeline_model_parallel_size
    taken = {ON_LAST_STAGE: Taken(1 / stages, 1.0)}
    if plan is not None:
        kinds, parts = plan.stage_ticks.kind, plan.stage_ticks.part
        for kind, part in {*zip(kinds[kinds > 0].tolist(), parts[kinds > 0].tolist(), strict=True)}:
            share = float(((kinds == kind) & (parts == part)).mean())
            taken[loop_of(kind, part)] = Taken(share / len(program.stages.blocks), 1.0)
    for stacks in program.stages.blocks.values():
        for name, stack in stacks.items():
            rows = (stack.source != PADDING).reshape(stages, -1)
            taken[rows_of(name)] = Taken(float(rows.mean()), float(rows.mean(axis=1).max()))
    return taken
