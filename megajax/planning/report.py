"""What a compiled training step says of a run: memory, work, messages and a bound of its time."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from megajax.config import Config, TransformerConfig
from megajax.models.family import Family
from megajax.ops.grouped import LOOP, block_for
from megajax.parallel.aot import absent_gpus, target_of
from megajax.parallel.gradient_sums import number_of_parameters
from megajax.parallel.mesh import describe
from megajax.parallel.roofline import Transfer, estimate
from megajax.parallel.schedules import Schedule
from megajax.planning.memory import Memory, memory_of, short
from megajax.planning.pipeline import pipeline_of
from megajax.training.ahead import Compiled, Step, compile_step


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, of one device and step.

    Attributes:
      link: "NVLink" or "network".
      in_layers: whether they stand in a layer, forward or backward, and not around the stack, or once in a step.
      times: executions.
      sent: bytes.
      seconds: at the rate of the link.
      exposed: of these, what no operation hides.
      covered: bytes of those that are asynchronous and have operations between their start and end.
    """

    kind: str
    axes: str
    link: str
    in_layers: bool
    times: float
    sent: float
    seconds: float
    exposed: float
    covered: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the plan shows. Seconds are the bound of `megajax.parallel.roofline`, not a measurement.

    Attributes:
      parameters: of the model.
      samples, tokens: of a step, on all devices.
      recompute: what the backward pass computes again, in words.
      model_flops, executed_flops, recomputed_flops: of one device and step.
      idle_flops: of those executed, what a pipeline computes only to keep step.
      bubble: idle over useful time of a pipeline's stages; 0 without one.
      engine: of the pipeline, and why it is this one; None without one.
      in_flight: passes of a chunk whose activations the pipeline keeps at once, and those of Megatron's first stage;
        None without one.
      uncovered: collectives inside of layers that wait, by what they belong to: bytes sent.
      seconds_to_compile: tracing, compiling.
    """

    model: str
    target: str
    devices: int
    mesh: str
    optimizer: str
    recompute: str
    parameters: int
    samples: int
    tokens: int
    num_microbatches: int
    memory: Memory
    model_flops: float
    executed_flops: float
    recomputed_flops: float
    idle_flops: float
    seconds: float
    compute: float
    mfu: float
    bubble: float
    traffic: tuple[Traffic, ...]
    uncovered: dict[str, float]
    kernels: dict[str, int]
    engine: str | None
    schedule: Schedule | None
    in_flight: tuple[int, int] | None
    seconds_to_compile: tuple[float, float]

    @property
    def exposed(self) -> float:
        """Seconds in which a device waits for others."""
        return self.seconds - self.compute

    @property
    def covered_share(self) -> float:
        """Of the bytes that layers send, the share of asynchronous collectives with operations beside them."""
        rows = [row for row in self.traffic if row.in_layers]
        sent = sum(row.sent for row in rows)
        return 1.0 if not sent else sum(row.covered for row in rows) / sent

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.devices

    def as_json(self) -> dict[str, Any]:
        """Plain types; bytes, seconds and FLOPs, of one device and step."""
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in ("model", "target", "devices", "mesh", "optimizer", "recompute")},
            **{name: getattr(self, name) for name in ("parameters", "samples", "tokens", "num_microbatches")},
            "fits": memory.fits,
            "memory": dataclasses.asdict(memory)
            | {"sum_of_parts": memory.total, "gaps": memory.gaps, "formula_ratio": memory.formula_ratio}
            | {"largest": [holder._asdict() for holder in memory.largest]},
            "flops": {
                "model": self.model_flops,
                "executed": self.executed_flops,
                "recomputed": self.recomputed_flops,
                "idle": self.idle_flops,
            },
            "collectives": [dataclasses.asdict(row) for row in self.traffic],
            "overlap": {"covered_share": self.covered_share, "uncovered": self.uncovered},
            "kernels": self.kernels,
            "bubble": self.bubble,
            "engine": self.engine,
            "in_flight": self.in_flight,
            "estimate": {
                "is": "a bound from data sheets, no measurement",
                "formula": FORMULA,
                "seconds": self.seconds,
                "operations": self.compute,
                "waiting": self.exposed,
                "mfu": self.mfu,
                "tokens_per_second_per_device": self.tokens_per_second,
            },
            "seconds_to_compile": {"trace": self.seconds_to_compile[0], "compile": self.seconds_to_compile[1]},
        }


FORMULA = (
    "Times are a bound, no measurement: an operation takes max(FLOPs / peak, bytes / memory bandwidth), a collective"
    " its ring's bytes / the link's rate; what runs beside it hides it."
)


def plan_step(config: Config, family: Family, target: str, devices: int, step: Step = "train") -> Report:
    """Compiles a step for GPUs that need not exist, and reads it.

    Raises:
      ConfigError: the run would be refused, or there is no compiler for the target.
    """
    return report_of(compile_step(config, family, absent_gpus(devices, target), step), target)


def report_of(compiled: Compiled, target: str) -> Report:
    """What a compiled step says."""
    program, gpu = compiled.program, target_of(target)
    config, mesh = program.config, program.mesh
    pipeline = pipeline_of(compiled)
    tokens = config.data.seq_length * config.train.micro_batch_size // config.parallel.context_parallel_size
    blocks_of = partial(blocks_of_rows, config, tokens)
    text, taken = compiled.executable.as_text(), pipeline.taken
    found = estimate(text, mesh, gpu, pipeline.busy, turns=blocks_of(None), blocks_of=blocks_of, taken=taken)
    samples = compiled.num_microbatches * program.batches.micro_batch_size * program.batches.data_parallel_size
    seq_length = config.data.seq_length
    work = program.family.flops(config.model, batch_size=samples, seq_length=seq_length) / mesh.size
    if compiled.step != "train":
        work /= 3  # forward alone
    return Report(
        model=config.model_family,
        target=target,
        devices=mesh.size,
        mesh=f"{describe(mesh)}, zero={config.parallel.zero}",
        optimizer=config.optimizer.optimizer,
        recompute=_recompute(config.model),
        parameters=number_of_parameters(program.stages.abstract_stored(program.abstract_state.params)),
        samples=samples,
        tokens=samples * seq_length,
        num_microbatches=compiled.num_microbatches,
        memory=memory_of(compiled, gpu, fused_attention=_keeps_no_scores(found.kernels)),
        model_flops=work,
        executed_flops=found.flops,
        recomputed_flops=found.recomputed,
        idle_flops=found.flops * pipeline.idle_share,
        seconds=found.seconds,
        compute=found.compute,
        mfu=work / (found.seconds * gpu.bf16),
        bubble=0.0 if pipeline.schedule is None else pipeline.schedule.bubble(),
        traffic=traffic_of(found.transfers),
        uncovered=uncovered_of(found.transfers),
        kernels={name: round(n) for name, n in sorted(found.kernels.items(), key=lambda item: -item[1])},
        engine=pipeline.engine,
        schedule=pipeline.schedule,
        in_flight=pipeline.in_flight,
        seconds_to_compile=compiled.seconds,
    )


def _keeps_no_scores(kernels: Iterable[str]) -> bool:
    return any("fmha" in name or "attention_forward" in name for name in kernels)


_BLOCK = 128
"""Rows that experts read at a time, at least, where each gets as many (`megajax.transformer.moe`)."""


def blocks_of_rows(config: Config, tokens: int, block: int | None) -> int:
    """Blocks of what the experts of a device are given, if the router gives all experts alike: half a block of each
    group is empty. tokens: of a data-parallel device. block: rows of one; None for those that the loop takes.
    """
    model, parallel = config.model, config.parallel
    if model.num_moe_experts is None:
        return 1
    rows = tokens * (model.moe_router_topk or 1) * parallel.resolved_expert_tensor_parallel_size
    rows //= parallel.tensor_model_parallel_size
    experts = model.num_moe_experts // parallel.expert_model_parallel_size
    touched = experts * (1 - (1 - 1 / experts) ** rows)  # fewer rows than that fill no whole block
    whole = rows // (block or block_for(rows // experts, _BLOCK, LOOP.most_rows)) + experts // 2
    return max(whole, round(touched))


def _recompute(model: TransformerConfig) -> str:
    if model.recompute_granularity is None:
        return "nothing"
    if model.recompute_granularity == "full":
        return f"layers ({model.recompute_method}, {model.recompute_num_layers})"
    return ", ".join(model.recompute_modules)


def _name(transfer: Transfer) -> tuple[str, str, str, bool]:
    axes = transfer.collective.axes
    return (
        transfer.collective.kind,
        "?" if axes is None else "+".join(axes) or "-",
        "network" if transfer.network else "NVLink",
        _in_layers(transfer),
    )


def _in_layers(transfer: Transfer) -> bool:
    return "Layer/" in transfer.collective.op_name or "Layer)/" in transfer.collective.op_name


def traffic_of(transfers: Sequence[Transfer]) -> tuple[Traffic, ...]:
    """By kind and axes, the longest first."""
    groups: dict[tuple[str, str, str, bool], list[Transfer]] = {}
    for transfer in transfers:
        if transfer.collective.group_size > 1:
            groups.setdefault(_name(transfer), []).append(transfer)
    rows = [
        Traffic(
            *name,
            times=sum(t.times for t in group),
            sent=sum(t.sent for t in group),
            seconds=sum(t.seconds for t in group),
            exposed=sum(t.exposed for t in group),
            covered=sum(t.sent for t in group if _is_covered(t)),
        )
        for name, group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _is_covered(transfer: Transfer) -> bool:
    return transfer.asynchronous and transfer.covered > 0


def uncovered_of(transfers: Sequence[Transfer]) -> dict[str, float]:
    """Bytes of what waits, by the last words of where it comes from; the largest ten."""
    found: dict[str, float] = {}
    for transfer in transfers:
        if transfer.sent and not _is_covered(transfer):
            kind, axes, _, _ = _name(transfer)
            name = f"{kind} over {axes}: {short(transfer.collective.op_name) or transfer.collective.name}"
            found[name] = found.get(name, 0) + transfer.sent
    return dict(sorted(found.items(), key=lambda item: -item[1])[:10])
