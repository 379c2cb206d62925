"""Which mesh for a model and a number of GPUs: all legal ones by arithmetic, the best few by compiling their steps."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from megajax.backends import LocalSpecProvider
from megajax.config import Config, ConfigError, ParallelConfig
from megajax.data.tokenizers import build_tokenizer
from megajax.models.family import Family
from megajax.parallel.aot import GPUS_PER_NODE, Target, absent_gpus, target_of
from megajax.parallel.mesh import describe, make_abstract_mesh
from megajax.parallel.sharding import axis_rules, is_box
from megajax.planning.memory import USABLE
from megajax.planning.report import Report, report_of
from megajax.training.ahead import compile_step
from megajax.training.pipeline_engine import why_lockstep
from megajax.training.setup import fit_config
from megajax.training.state import abstract_params

COMPILED = 4
"""How many of the best are compiled."""

# What the arithmetic assumes: the share of the peak that products reach, of a link's rate that is not hidden.
_EFFICIENCY, _EXPOSED = 0.6, 0.5
_WORKING_SPACE = 2e9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that the trainer would accept. memory, seconds: of a device and step, by arithmetic."""

    config: Config
    mesh: str
    flags: tuple[str, ...]
    memory: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate, and what its compiled step says; None where it was not compiled, a reason where that failed."""

    candidate: Candidate
    report: Report | None = None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """By the compiled step."""
        return self.report is not None and self.report.memory.fits


def search(
    config: Config, family: Family, target: str, devices: int, progress: Callable[[int, int, str], None]
) -> list[Found]:
    """Ranked, the best first: those that were compiled and fit, those that do not, then what is left by arithmetic.

    Args:
      config: the run; what it says of the mesh is replaced.
      progress: is told how many that fit were found, of how many, and what is compiled next.

    Raises:
      ConfigError: no layout is possible, or there is no compiler for the target.
    """
    gpus, gpu = absent_gpus(devices, target), target_of(target)
    progress(0, COMPILED, "looking for layouts")
    possible = sorted(candidates(fitted(config, family), family, gpu, devices), key=lambda c: c.seconds)
    usable = USABLE * gpu.memory
    likely = [c for c in possible if c.memory <= usable] or sorted(possible, key=lambda c: c.memory)
    if not likely:
        raise ConfigError(
            f"no mesh of {devices} devices divides this model and global_batch_size={config.train.global_batch_size};"
            " change the number of devices or the batch"
        )
    found: list[Found] = []
    for candidate in likely[: 2 * COMPILED]:
        fitting = sum(one.fits for one in found)
        if fitting == COMPILED:
            break
        progress(fitting, COMPILED, candidate.mesh)
        found.append(_compile(candidate, family, gpus, target))
    rest = [Found(c) for c in possible if all(one.candidate is not c for one in found)]

    def rank(one: Found) -> tuple[bool, float]:
        return not one.fits, math.inf if one.report is None else one.report.seconds

    return sorted(found, key=rank) + rest


def _compile(candidate: Candidate, family: Family, gpus: list[Any], target: str) -> Found:
    try:
        return Found(candidate, report_of(compile_step(candidate.config, family, gpus), target))
    except ConfigError as error:
        return Found(candidate, reason=str(error))


def fitted(config: Config, family: Family) -> Config:
    """The config with what tokenizer and data decide."""
    return fit_config(config, family, build_tokenizer(config.data.tokenizer))


def candidates(config: Config, family: Family, gpu: Target, devices: int) -> Iterator[Candidate]:
    """Every layout of so many devices that the trainer would accept, whatever the config says of parallelism."""
    model = family.build_model(config.model, LocalSpecProvider(cp_comm_type="p2p", zigzag=False))
    leaves = jax.tree.leaves(abstract_params(model, family, config), is_leaf=is_box)
    flops = family.flops(
        config.model,
        batch_size=config.train.global_batch_size or config.train.micro_batch_size,
        seq_length=config.data.seq_length,
    )
    again = config.model.replace(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for parallel, full in _layouts(config, family, devices):
        try:
            run = dataclasses.replace(
                config, parallel=ParallelConfig(**parallel), model=again if full else config.model
            )
            yield _weighed(fitted(run, family), leaves, flops, gpu, devices)
        except ConfigError:
            continue


def _layouts(config: Config, family: Family, devices: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Settings of parallelism, and whether layers are recomputed."""
    experts = config.model.num_moe_experts
    powers = [2**i for i in range(devices.bit_length())]
    for tp, pp, cp, ep, zero, full in itertools.product(
        [size for size in powers if size <= GPUS_PER_NODE],
        [size for size in powers if size <= 32] if family.pipeline_pieces else [1],
        [1, 2, 4, 8],
        [size for size in powers if size <= 64] if experts else [1],
        (1, 3),
        (False, True),
    ):
        dp, rest = divmod(devices, tp * pp * cp)
        batch = config.train.global_batch_size or 0
        if rest or not dp or (dp * tp) % ep or (experts or 1) % ep or batch % (dp * config.train.micro_batch_size):
            continue
        layers = config.model.num_layers
        if layers % pp or (zero == 3 and (pp > 1 or dp == 1)):
            continue  # ZeRO-3 would gather every stage's parameters again for each microbatch
        yield (
            {
                "tensor_model_parallel_size": tp,
                "sequence_parallel": tp > 1,
                "pipeline_model_parallel_size": pp,
                "context_parallel_size": cp,
                "expert_model_parallel_size": ep,
                "zero": zero,
            },
            full,
        )


def _weighed(config: Config, leaves: list[Any], flops: int, gpu: Target, devices: int) -> Candidate:
    """What the layout takes: parameters exactly, the rest by formulas that rank well and measure badly."""
    mesh = make_abstract_mesh(config.parallel, devices)
    rules = axis_rules(config.parallel, config.model, devices)
    numbers = _held(leaves, rules.table, mesh.shape)
    state = _held(leaves, rules.optimizer_table, mesh.shape)
    parallel, train, model = config.parallel, config.train, config.model
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    data = devices // (tp * pp * cp)
    micro = train.micro_batch_size
    microbatches = max(1, (train.global_batch_size or micro * data) // (micro * data))
    layers, hidden, full = model.num_layers / pp, model.hidden_size, model.recompute_granularity == "full"
    tokens = config.data.seq_length * micro / (tp * cp)
    width = 2 * hidden if full else 18 * hidden + 4 * _width(config)
    has_table = why_lockstep(config) is None and layers % 2 == 0
    slots = min(pp if has_table else 2 * pp - 1, microbatches + 1) if pp > 1 else 1
    mixed = model.mixed_precision  # the model computes with copies: see `ComputedWith`
    gradients = (6 if mixed else 8) * numbers if microbatches > 1 or pp > 1 else 4 * numbers
    params = 2 * numbers + 4 * (state if parallel.zero in (1, 2) else numbers) if mixed else 4 * numbers
    memory = params + 8 * state + gradients + tokens * width * layers * slots + _WORKING_SPACE
    memory += tokens * (18 * hidden + 4 * _width(config)) if full else 0
    compute = flops / devices * (4 / 3 if full else 1) / (_EFFICIENCY * gpu.bf16) * (1 + (pp - 1) / microbatches)
    # Ten passes of activations a layer and microbatch in tensor parallelism, of keys and values twice in context's.
    sent = 10 * tokens * tp * 2 * hidden * (tp - 1) / tp * layers * microbatches / gpu.nvlink
    sent += 6 * tokens * tp * 2 * hidden * (cp - 1) / max(tp, 1) * layers * microbatches / gpu.nvlink
    link = gpu.nvlink if data * tp * cp <= GPUS_PER_NODE and pp * data * tp * cp <= devices else gpu.network
    if data > 1:
        times = 3 * microbatches if parallel.zero == 3 else 2
        link *= 1 if parallel.zero < 3 or link == gpu.nvlink else GPUS_PER_NODE / tp
        sent += times * (2 if parallel.zero == 3 else 4) * (numbers * (data * cp if parallel.zero == 3 else 1)) / link
    if model.num_moe_experts and parallel.expert_model_parallel_size > 1:
        far = gpu.nvlink if parallel.expert_model_parallel_size * tp * cp <= GPUS_PER_NODE else gpu.network
        sent += 4 * tokens * 2 * hidden * (model.moe_router_topk or 1) * layers * microbatches / far
    return Candidate(
        config,
        f"{describe(mesh)} zero={parallel.zero}" + (" recompute=full" if full else ""),
        _flags(config),
        memory,
        compute + _EXPOSED * sent,
    )


def _width(config: Config) -> int:
    """Features of an MLP that a token meets."""
    model = config.model
    if model.num_moe_experts and model.moe_ffn_hidden_size:
        return model.moe_ffn_hidden_size * (model.moe_router_topk or 1)
    return model.ffn_hidden_size or 4 * model.hidden_size


def _held(leaves: list[Any], table: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> float:
    """Numbers that a device holds of these parameters."""

    def part(box: Any) -> float:
        axes = itertools.chain.from_iterable(table[name] for name in box.names if name is not None)
        return math.prod(box.value.shape) / math.prod(sizes[axis] for axis in axes)

    return sum(map(part, leaves))


def _flags(config: Config) -> tuple[str, ...]:
    """What to give the trainer."""
    parallel = config.parallel
    sizes = {
        "--tp": parallel.tensor_model_parallel_size,
        "--pp": parallel.pipeline_model_parallel_size,
        "--cp": parallel.context_parallel_size,
        "--ep": parallel.expert_model_parallel_size,
    }
    words = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
    words += ["--zero", str(parallel.zero)] + (["--sequence-parallel"] if parallel.sequence_parallel else [])
    if config.model.recompute_granularity == "full":
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return tuple(words)
