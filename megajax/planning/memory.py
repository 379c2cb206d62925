"""The memory of one device at the peak of a compiled step, by parts."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from megajax.config import Config, TransformerConfig
from megajax.parallel.aot import Target
from megajax.parallel.live_memory import LiveBuffer
from megajax.parallel.mesh import ZERO_AXES
from megajax.parallel.replicas import manual_part
from megajax.parallel.sharding import spec_of
from megajax.training.ahead import Compiled, held_bytes
from megajax.training.computed_with import SCOPE
from megajax.training.state import is_axes

USABLE = 0.92
"""Of a GPU's memory, what a program may take; CUDA, NCCL and fragments need the rest."""

_STATE = "state."  # where the step's argument is that an array was copied from

_XLA = MappingProxyType({"float32": "f32", "bfloat16": "bf16", "float16": "f16"})

_LARGEST = 12
_PLUMBING = frozenset({"while", "body", "closed_call", "checkpoint", "rematted_computation", "cond"})


class Holder(NamedTuple):
    """Where in the program something alive at the peak comes from, how many such arrays there are, and their bytes."""

    name: str
    shape: str
    arrays: int
    size: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters, optimizer, batch: by arithmetic (`megajax.training.ahead.held_bytes`).
      copies: the parameters that the model computes with, where they are not the state's own.
      gradients: what is alive of them at the peak, those of a microbatch beside the sums: fp32, or in the dtype of a
        copy, and of a parameter's shape.
      activations: what else waits for something later at the peak, activations kept for the backward pass above all.
      temporaries: working space of what runs at the peak, and copies of parameters in another layout.
      peak: of the compiled program, by its buffer assignment, gaps between buffers included.
      capacity, card: what is usable of the GPU, and all of it.
      gradient_sums: by arithmetic: what a step adds gradients up in.
      formula: activations by Megatron's formula, None where it does not apply.
      largest: what is alive at the peak, parameters and optimizer left out.
    """

    parameters: int
    copies: int
    gradients: int
    optimizer: int
    batch: int
    activations: int
    temporaries: int
    peak: int
    capacity: int
    card: int
    gradient_sums: int
    formula: int | None
    largest: tuple[Holder, ...]

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.peak <= self.capacity

    @property
    def total(self) -> int:
        """Sum of the parts but for the gaps."""
        held = self.parameters + self.copies + self.optimizer + self.batch
        return held + self.gradients + self.activations + self.temporaries

    @property
    def gaps(self) -> int:
        """What no part accounts for: XLA lays all that is not an argument into one allocation, where some bytes between
        buffers stay empty at the peak."""
        return self.peak - self.total

    @property
    def formula_ratio(self) -> float | None:
        """Activations over Megatron's formula."""
        return self.activations / self.formula if self.formula else None


def memory_of(compiled: Compiled, gpu: Target, *, fused_attention: bool) -> Memory:
    """Reads a compiled step. fused_attention: its kernels keep no scores."""
    held, program = held_bytes(compiled), compiled.program
    of_program = compiled.executable.memory_analysis()
    beside = of_program.output_size_in_bytes - of_program.alias_size_in_bytes
    shapes = _gradient_shapes(compiled)
    parts: dict[str, int] = {"copies": 0, "gradients": 0, "temporaries": 0, "activations": 0}
    for buffer in compiled.live:
        if buffer.op_name.startswith(_STATE):
            part = "temporaries"
        elif SCOPE in buffer.op_name.split("/"):
            part = "copies"
        elif (buffer.dtype, buffer.shape) in shapes:
            part = "gradients"
        else:
            part = "temporaries" if buffer.local else "activations"
        parts[part] += buffer.size
    return Memory(
        parameters=held.parameters,
        copies=parts["copies"],
        gradients=parts["gradients"],
        optimizer=held.optimizer,
        batch=held.batch,
        activations=parts["activations"],
        temporaries=parts["temporaries"],
        peak=of_program.argument_size_in_bytes + beside + of_program.temp_size_in_bytes,
        capacity=int(USABLE * gpu.memory),
        card=gpu.memory,
        gradient_sums=held.gradients,
        formula=megatron_activations(program.config, compiled.num_microbatches, fused_attention=fused_attention),
        largest=largest_of(compiled.live),
    )


def _gradient_shapes(compiled: Compiled) -> set[tuple[str, tuple[int, ...]]]:
    """Dtypes, as XLA writes them, and shapes of gradients on a device: of parameters, divided by ZeRO or not, and as a
    pipeline sees them, [chunks, rows, ...]; only of two dims and more.
    """
    program = compiled.program
    chunks = program.config.parallel.num_virtual_stages_per_pipeline_rank
    whole_axes = tuple(axis for axis in program.mesh.axis_names if axis not in ZERO_AXES)
    found = set()
    names_of_leaves = jax.tree.leaves(program.axes.params, is_leaf=is_axes)
    params, copied = program.abstract_state.params, program.computed_with.chosen
    for leaf, names, copy in zip(jax.tree.leaves(params), names_of_leaves, jax.tree.leaves(copied), strict=True):
        dtypes = {"f32", _XLA[program.computed_with.dtype]} if copy and compiled.step == "train" else {"f32"}
        specs = {spec_of(names, table) for table in (program.rules.table, program.rules.optimizer_table)}
        for spec in (*specs, *(manual_part(spec, whole_axes) for spec in specs)):
            shape = NamedSharding(program.mesh, spec).shard_shape(leaf.shape)
            if len(shape) >= 2:
                shapes = {shape, (chunks, shape[0] // chunks, *shape[1:]), (shape[0] // chunks, *shape[1:])}
                found |= {(dtype, shape) for dtype in dtypes for shape in shapes}
    return found


def largest_of(live: Sequence[LiveBuffer]) -> tuple[Holder, ...]:
    """What takes the most, by where it comes from."""
    found: dict[tuple[str, str], list[int]] = {}
    for buffer in live:
        shape = "?" if buffer.shape is None else f"{buffer.dtype}[{','.join(map(str, buffer.shape))}]"
        found.setdefault((short(buffer.op_name) or buffer.name, shape), []).append(buffer.size)
    holders = [Holder(name, shape, len(sizes), sum(sizes)) for (name, shape), sizes in found.items()]
    return tuple(sorted(holders, key=lambda holder: -holder.size)[:_LARGEST])


def short(op_name: str) -> str:
    """The last words of where an operation comes from, without those that say nothing."""
    return "/".join([part for part in op_name.split("/") if part not in _PLUMBING][-3:])


def megatron_activations(config: Config, num_microbatches: int, *, fused_attention: bool) -> int | None:
    """Bytes of activations on the first stage by Megatron's formula (`megatron/training/theoretical_memory_usage.py`,
    arXiv:2205.05198), None where it does not apply: it is of dense decoders whose activations are all divided by
    tensor parallelism and whose attention scores are not kept.

        s b / (tp cp) (18 h + 4 ffn) L i    with i = min(1, m / pp), interleaved 1 + (pp - 1) / (pp v)

    What it adds for embedding, dropout and logits is left out: here stages share the ends, and logits are never whole.
    """
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    keeps_scores = not fused_attention and (
        model.recompute_granularity != "selective" or "core_attn" not in model.recompute_modules
    )
    if not _is_dense(model) or keeps_scores or (tp > 1 and not parallel.sequence_parallel):
        return None
    tokens = config.data.seq_length * config.train.micro_batch_size // (tp * parallel.context_parallel_size)
    assert model.ffn_hidden_size is not None
    layer = tokens * (18 * model.hidden_size + 4 * model.ffn_hidden_size)
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    in_flight = min(1.0, num_microbatches / pp) if chunks == 1 else 1 + (pp - 1) / (pp * chunks)
    return int(layer * model.num_layers * in_flight)


def _is_dense(model: TransformerConfig) -> bool:
    special = model.num_moe_experts is not None or model.multi_latent_attention or model.heterogeneous_layers
    return not special and model.recompute_granularity != "full" and (model.bf16 or model.fp16)
