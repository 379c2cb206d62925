"""Which of the pipeline's two engines runs a model, and into how many parts a backward is cut there."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import NamedTuple

from megajax.config import Config
from megajax.config_parallel import PipelineEngine
from megajax.training.stages import Stages
from megajax.transformer.stages import PADDING


class EngineChoice(NamedTuple):
    """An engine, and why it is this one, in a few words.

    parts: of a backward in the table's engine, some of a chunk's layers each, so that each takes about as long as a
    forward: all stages wait for the longest operation of a tick.
    """

    name: PipelineEngine
    why: str
    parts: int = 1

    @property
    def title(self) -> str:
        """For the log and the plan."""
        return f"pipeline engine {self.name}: {self.why}"


def choose_engine(stages: Stages, config: Config) -> EngineChoice:
    """The engine that is asked for or, where that is left open, the one with Megatron's memory, if its time is near.

    Lockstep keeps the activations of up to 2 p - 1 microbatches, the table those of p. A tick of the table is as long
    as the longest of what the stages do in it, a tick of lockstep a forward and a backward. For llama3-70b over eight
    stages that is 35 GB instead of 56, and a bound that is 9% longer.
    """
    parallel, asked = config.parallel, config.parallel.pipeline_engine
    parts = _parts(stages, config)
    if asked is not None:
        return EngineChoice(asked, "as asked for", parts)
    if len(stages.blocks) > 1:
        return EngineChoice("table", "the model has several stacks of layers", parts)
    if parallel.runs_a_table:
        return EngineChoice("table", f"it is the one that runs {parallel.pipeline_schedule}", parts)
    why = why_lockstep(config)
    if why is None and (parts == 1 or not _divides_evenly(stages, parts)):
        why = "the layers of a chunk do not divide into two equal parts"
    if why is not None:
        return EngineChoice("lockstep", why)
    return EngineChoice("table", "it keeps as many microbatches as Megatron's 1F1B", parts)


def why_lockstep(config: Config) -> str | None:
    """What, but for the number of layers, speaks against the table for 1F1B of one stack; None: nothing."""
    parallel = config.parallel
    if parallel.zigzag:
        return "all stages have to come to rings of attention"
    if parallel.zero > 1:
        return "all stages may have to come to gradients that ZeRO divides"
    if parallel.expert_model_parallel_size > 1:
        return "its forward and its backward lie beside the other's messages"
    if config.model.recompute_granularity == "full":
        return "layers that are computed again keep little"
    return None


def _parts(stages: Stages, config: Config) -> int:
    if config.parallel.pipeline_schedule == "zb-h1":
        return 1  # it is cut in another way
    wanted = 3 if config.model.recompute_granularity == "full" else 2
    stacks = [list(block.values()) for block in stages.blocks.values()]
    enough = all(len(each) == 1 and len(each[0].source) >= wanted * stages.chunks for each in stacks)
    return wanted if enough else 1


def _divides_evenly(stages: Stages, parts: int) -> bool:
    """Whether all chunks have as many layers, and all their parts."""
    stacks = [stack for block in stages.blocks.values() for stack in block.values()]
    rows = [len(stack.source) // stages.chunks for stack in stacks]
    return all(count % parts == 0 for count in rows) and not any((stack.source == PADDING).any() for stack in stacks)
