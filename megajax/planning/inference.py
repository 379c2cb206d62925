"""What a compiled program of generation says: memory, cache, messages, and a bound of the time of a token."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megajax.config import Config
from megajax.inference.ahead import CompiledInference, Phase, compile_inference
from megajax.models.family import Family
from megajax.parallel.aot import absent_gpus, target_of
from megajax.parallel.gradient_sums import number_of_parameters
from megajax.parallel.mesh import data_parallel_size, describe
from megajax.parallel.roofline import estimate
from megajax.planning.memory import USABLE, Holder, largest_of
from megajax.planning.report import FORMULA, Traffic, blocks_of_rows, traffic_of, uncovered_of
from megajax.training.ahead import bytes_on_a_device


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Bytes of one device.

    Attributes:
      parameters, cache, inputs: by arithmetic: shapes, and where they lie.
      temporaries: by XLA's buffer assignment, copies of parameters in another layout among them.
      peak: of the compiled program; the donated cache, which it writes in place, counts once.
      capacity, card: what is usable of the GPU, and all of it.
      largest: what is alive at the peak, arguments left out.
      unread: of the parameters, those that this step does not read, such as an encoder's while a decoder writes.
    """

    parameters: int
    unread: int
    cache: int
    inputs: int
    temporaries: int
    peak: int
    capacity: int
    card: int
    largest: tuple[Holder, ...]

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class InferenceReport:
    """All that the plan of a step of generation shows. Seconds are the bound of `megajax.parallel.roofline`.

    Attributes:
      phase: "decode" adds one token to every request, "prefill" reads prompts that fill the cache.
      params_dtype: of the weights as they lie in memory.
      parameters: of the model.
      requests: texts at once, on all devices together. length: tokens that the cache has room for, of each.
      tokens: that a step reads, of all requests.
      executed_flops: of one device.
      floor: seconds that no program for it can go below; see `FLOOR`.
    """

    model: str
    phase: Phase
    target: str
    devices: int
    mesh: str
    params_dtype: str
    parameters: int
    requests: int
    length: int
    tokens: int
    memory: InferenceMemory
    executed_flops: float
    seconds: float
    compute: float
    floor: float
    traffic: tuple[Traffic, ...]
    uncovered: dict[str, float]
    kernels: dict[str, int]
    seconds_to_compile: tuple[float, float]

    @property
    def exposed(self) -> float:
        """Seconds in which a device waits for others."""
        return self.seconds - self.compute

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds / self.devices

    @property
    def floor_share(self) -> float:
        """The floor over the step: how close the program comes."""
        return self.floor / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain types; bytes, seconds and FLOPs, of one device and step."""
        names = ("model", "phase", "target", "devices", "mesh", "params_dtype", "parameters")
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in names},
            "inference_max_requests": self.requests,
            "inference_max_seq_length": self.length,
            "tokens": self.tokens,
            "fits": memory.fits,
            "memory": dataclasses.asdict(memory) | {"largest": [holder._asdict() for holder in memory.largest]},
            "flops": {"executed": self.executed_flops},
            "collectives": [dataclasses.asdict(row) for row in self.traffic],
            "overlap": {"uncovered": self.uncovered},
            "kernels": self.kernels,
            "bubble": 0.0,
            "estimate": {
                "is": "a bound from data sheets, no measurement",
                "formula": f"{FORMULA} {FLOOR}",
                "seconds": self.seconds,
                "operations": self.compute,
                "waiting": self.exposed,
                "floor": self.floor,
                "floor_share": self.floor_share,
                "tokens_per_second_per_device": self.tokens_per_second,
            },
            "seconds_to_compile": {"trace": self.seconds_to_compile[0], "compile": self.seconds_to_compile[1]},
        }


FLOOR = (
    "The floor is max((bytes of parameters that are read + bytes of cache) / memory bandwidth, FLOPs / peak), tokens/s"
    " is tokens / step time. The cache is static: a step of decoding reads all of it, however long the texts are so"
    " far."
)


def plan_inference(
    config: Config, family: Family, target: str, devices: int, phase: Phase, *, max_requests: int, max_seq_length: int
) -> InferenceReport:
    """Compiles a step of generation for GPUs that need not exist, and reads it.

    Raises:
      ConfigError: the family has no such step, or not in this layout; or there is no compiler for the target.
    """
    gpus = absent_gpus(devices, target)
    compiled = compile_inference(config, family, gpus, phase, max_requests=max_requests, max_seq_length=max_seq_length)
    return inference_report_of(compiled, target)


def inference_report_of(compiled: CompiledInference, target: str) -> InferenceReport:
    """What a compiled step says."""
    program, gpu = compiled.program, target_of(target)
    config, mesh = program.config, program.mesh
    tokens = program.requests * compiled.prompt
    blocks_of = partial(blocks_of_rows, config, tokens // data_parallel_size(mesh))
    found = estimate(compiled.executable.as_text(), mesh, gpu, turns=blocks_of(None), blocks_of=blocks_of)
    memory = _memory_of(compiled, gpu.memory)
    return InferenceReport(
        model=config.model_family,
        phase=compiled.phase,
        target=target,
        devices=mesh.size,
        mesh=describe(mesh),
        params_dtype=config.model.params_dtype,
        parameters=number_of_parameters(program.params),
        requests=program.requests,
        length=program.length,
        tokens=tokens,
        memory=memory,
        executed_flops=found.flops,
        seconds=found.seconds,
        compute=found.compute,
        floor=max(
            (memory.parameters - memory.unread + memory.cache) / gpu.bandwidth,
            found.flops / gpu.bf16,
        ),
        traffic=traffic_of(found.transfers),
        uncovered=uncovered_of(found.transfers),
        kernels={name: round(n) for name, n in sorted(found.kernels.items(), key=lambda item: -item[1])},
        seconds_to_compile=compiled.seconds,
    )


def _memory_of(compiled: CompiledInference, card: int) -> InferenceMemory:
    of_program = compiled.executable.memory_analysis()
    beside = of_program.output_size_in_bytes - of_program.alias_size_in_bytes
    parameters, cache = bytes_on_a_device(compiled.program.params), bytes_on_a_device(compiled.program.cache)
    inputs, read = bytes_on_a_device(compiled.inputs), of_program.argument_size_in_bytes
    unread = max(0, parameters + cache + inputs - read)  # what a program does not read is none of its arguments
    return InferenceMemory(
        parameters=parameters,
        unread=unread,
        cache=cache,
        inputs=inputs,
        temporaries=of_program.temp_size_in_bytes + max(0, beside),
        peak=read + unread + max(0, beside) + of_program.temp_size_in_bytes,
        capacity=int(USABLE * card),
        card=card,
        largest=largest_of(compiled.live),
    )
