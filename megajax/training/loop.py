"""The training loop: read it from top to bottom."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from megajax.backends import LocalSpecProvider
from megajax.checkpoint import CheckpointStore
from megajax.config import Config
from megajax.data.build import Datasets
from megajax.data.loader import EvaluationLoader, Loader
from megajax.training.backend import describe_kernels, kernels_of_step
from megajax.training.flops import peak_flops_per_second
from megajax.training.metrics import Console, Writer, format_step
from megajax.training.setup import Program, on_mesh, place_batch, process_rows
from megajax.training.state import TrainState
from megajax.training.step import Metrics
from megajax.training.stop import StopRequest


class TrainingStopped(Exception):
    """The run cannot go on; its state is saved. The message says why and what to do, in one line."""


class Result(NamedTuple):
    """How a run ended. val_loss: mean nats per token at the last evaluation, None if there was none."""

    state: TrainState
    step: int
    val_loss: float | None
    finished: bool


class _Running(NamedTuple):
    """A step that has been dispatched and whose metrics are still to be read."""

    step: int
    metrics: Metrics
    samples: int
    started: float


def train(
    program: Program,
    state: TrainState,
    datasets: Datasets,
    loader: Loader,
    store: CheckpointStore,
    writers: list[Writer],
    console: Console,
    stop: StopRequest,
) -> Result:
    """Runs from the state's step to the end, or to the first reason to stop, and saves.

    Metrics of a step are read after the next one has been dispatched, so the device never waits for the host.

    Raises:
      TrainingStopped: too many updates in a row had to be skipped.
    """
    config = program.config
    evaluate = Evaluator(program, datasets)
    reporter = _Reporter(program, writers, console)
    reason_to_stop = _StopReasons(program, stop)
    step = int(state.step)
    running: _Running | None = None
    val_loss: float | None = None
    reason = None
    with on_mesh(program), _Profiler(config) as profiler:
        while step < program.train_iters and reason is None and reporter.trouble is None:
            profiler.before(step, state)
            size = program.batches.at(loader.consumed_samples)
            batch = loader.next_batch(size.running_global_batch_size)
            started = time.monotonic()
            placed = place_batch(program, batch, num_microbatches=size.num_microbatches)
            reporter.kernels(state, placed)
            state, metrics = program.train_step(state, placed)
            step += 1
            if running is not None:
                reporter.report(running)
            running = _Running(step, metrics, size.running_global_batch_size, started)
            evaluating = step % config.train.eval_interval == 0 or step == program.train_iters
            if evaluating:
                reporter.report(running)
                running = None
                val_loss = evaluate(state.params, "validation")
                reporter.evaluation(step, val_loss)
            reason = reason_to_stop(step)
            if reason is None and _due(step, config.checkpoint.save_interval) and step < program.train_iters:
                if running is not None:  # a run killed after this save must find the step's row
                    reporter.report(running)
                    running = None
                _save(store, step, state, loader, program)
                reporter.interrupted()
        if running is not None:
            reporter.report(running)
    _save(store, step, state, loader, program)
    store.wait()
    if reporter.trouble is not None:
        raise TrainingStopped(f"{reporter.trouble}; step {step} is saved in {store.directory}")
    if reason is not None:
        console.line(f"stopped at step {step}: {reason}; resume with the same command")
    return Result(state, step, val_loss, finished=step >= program.train_iters)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _save(store: CheckpointStore, step: int, state: TrainState, loader: Loader, program: Program) -> None:
    store.save(step, program.stages.to_stored(state), extras(loader, program.config))


def extras(loader: Loader, config: Config) -> dict[str, Any]:
    """What a checkpoint keeps beside arrays."""
    return {"data": loader.state(), "seed": config.train.seed, "seq_length": config.data.seq_length}


class _StopReasons:
    """Whether something other than the length of the run ends it, asked once a step and answered alike everywhere.

    Signals reach single processes, and clocks differ. With several processes the answer is a sum over the devices that
    comes behind the step's own work, so it is read one step later, when it no longer keeps anybody waiting.
    """

    def __init__(self, program: Program, stop: StopRequest):
        self._config, self._stop = program.config, stop
        self._began = time.monotonic()
        self._place = NamedSharding(program.mesh, PartitionSpec(program.mesh.axis_names))
        self._any = jax.jit(
            lambda flags: jnp.max(flags, axis=0), out_shardings=NamedSharding(program.mesh, PartitionSpec())
        )
        self._asked: jax.Array | None = None

    def __call__(self, step: int) -> str | None:
        """The reason, in a few words, for stopping after this step."""
        if _due(step, self._config.train.exit_interval):
            return f"exit_interval={self._config.train.exit_interval} is reached"
        minutes = self._config.train.exit_duration_in_mins
        over = minutes is not None and time.monotonic() - self._began >= minutes * 60
        names = [signal.SIGTERM.name, signal.SIGINT.name]
        flags = [self._stop.requested and self._stop.name == name for name in names]
        flags = self._anywhere(np.array([*flags, over and jax.process_index() == 0]))
        return next((name for flag, name in zip(flags, [*names, self._over], strict=True) if flag), None)

    @property
    def _over(self) -> str:
        return f"exit_duration_in_mins={self._config.train.exit_duration_in_mins} are over"

    def _anywhere(self, flags: np.ndarray) -> np.ndarray:
        if jax.process_count() == 1:
            return flags
        local = np.tile(flags, (jax.local_device_count(), 1))
        asked, self._asked = self._asked, self._any(jax.make_array_from_process_local_data(self._place, local))
        return np.zeros_like(flags) if asked is None else np.asarray(asked)


class _Profiler:
    """Traces the steps [profile_step_start, profile_step_end) of process 0 into `RUN_DIR/profile`; without an end,
    all to come."""

    def __init__(self, config: Config):
        self._start, self._end = config.train.profile_step_start, config.train.profile_step_end
        self._directory = f"{config.train.run_dir}/profile"
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, step: int, state: TrainState) -> None:
        """Starts or stops where the step that comes next says so; `state` is what the steps before it lead to."""
        if step == self._end:
            jax.block_until_ready(state.step)
            self._stop()
        if step == self._start and jax.process_index() == 0:
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


class Evaluator:
    """Mean loss over a split's first `eval_iters` batches, the same ones every time."""

    def __init__(self, program: Program, datasets: Datasets):
        self._program = program
        self._datasets = {"validation": datasets.validation, "test": datasets.test}

    def __call__(self, params: Any, split: str) -> float | None:
        """Nats per token, weighted by tokens; None when there is no such split."""
        dataset = self._datasets[split]
        if dataset is None:
            return None
        program = self._program
        batches = EvaluationLoader(
            dataset,
            batch_size=program.batches.micro_batch_size * program.batches.data_parallel_size,
            num_batches=program.config.train.eval_iters,
            process_rows=process_rows(program),
        )
        total, tokens = 0.0, 0.0
        size = program.eval_microbatches
        with on_mesh(program):
            results = [
                program.eval_step(params, place_batch(program, together, num_microbatches=size))
                for together in _grouped(batches, size)
            ]
        for loss_sum, count in results:
            total, tokens = total + float(loss_sum), tokens + float(count)
        return total / max(tokens, 1.0)


def _grouped(batches: Iterable[dict[str, np.ndarray]], size: int) -> Iterator[dict[str, np.ndarray]]:
    """`size` batches after each other as one; the last is filled up with rows that count nothing."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        empty = {name: np.zeros_like(array) if name == "loss_mask" else array for name, array in group[0].items()}
        group += [empty] * (size - len(group))
        yield {name: np.concatenate([batch[name] for batch in group]) for name in empty}


class _Reporter:
    """Turns finished steps into rows and lines.

    Attributes:
      trouble: why the run has to stop, None while all is well.
    """

    def __init__(self, program: Program, writers: list[Writer], console: Console):
        self._program = program
        self._writers = writers
        self._console = console
        self._last_finished: float | None = None
        self._kernels_are_known = isinstance(program.backend, LocalSpecProvider)
        self.trouble: str | None = None
        self._peak = peak_flops_per_second(jax.devices()[0].device_kind)

    def kernels(self, state: TrainState, batch: dict[str, jax.Array]) -> None:
        """Before the first step, which this traces: a line for each kernel."""
        if not self._kernels_are_known:
            self._kernels_are_known = True
            self._console.line(describe_kernels(kernels_of_step(self._program.train_step, state, batch)))

    def report(self, running: _Running) -> None:
        """Waits for the step, then writes its row; every `log_interval` steps a line."""
        metrics = jax.device_get(running.metrics)
        finished = time.monotonic()
        # From the end of the last step to the end of this one: dispatching is asynchronous.
        seconds = finished - (self._last_finished or running.started)
        self._last_finished = finished
        row = self._row(running, metrics, seconds)
        for writer in self._writers:
            writer.write(row)
        config, total = self._program.config, self._program.train_iters
        if running.step % config.train.log_interval == 0 or running.step in (1, total):
            self._console.line(format_step(row, total=total))
        self._console.progress(running.step, total, f"loss {float(metrics.loss):.4f}")
        if self.trouble is None and int(metrics.skipped_in_a_row) >= config.train.max_skipped_steps:
            self.trouble = (
                f"the last {int(metrics.skipped_in_a_row)} updates were skipped (loss {float(metrics.loss)}, grad norm"
                f" {float(metrics.grad_norm)}); lower lr, or raise max_skipped_steps={config.train.max_skipped_steps}"
            )

    def interrupted(self) -> None:
        """Something else than a step ran; its time is not the next step's."""
        self._last_finished = None

    def evaluation(self, step: int, val_loss: float | None) -> None:
        """Writes a row and a line for an evaluation."""
        self.interrupted()
        if val_loss is None:
            return
        for writer in self._writers:
            writer.write({"step": step, "val_loss": val_loss, "val_ppl": math.exp(min(20.0, val_loss))})
        self._console.line(f"step {step}: validation loss {val_loss:.4f}, perplexity {math.exp(min(20, val_loss)):.3f}")

    def _row(self, running: _Running, metrics: Metrics, seconds: float) -> Mapping[str, float | int | None]:
        config = self._program.config
        devices = self._program.mesh.size
        tokens = running.samples * config.data.seq_length
        flops = self._program.family.flops(config.model, batch_size=running.samples, seq_length=config.data.seq_length)
        per_device = flops / seconds / devices
        row: dict[str, float | int | None] = {
            "step": running.step,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "weight_decay": float(metrics.weight_decay),
            "batch_size": running.samples,
            "tokens": int(metrics.tokens),
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": per_device / 1e12,
            "mfu": None if self._peak is None else per_device / self._peak,
            "skipped_steps": int(metrics.skipped),
        }
        if config.model.fp16:
            row["loss_scale"] = float(metrics.loss_scale)
        return row
