"""One run from a config to the files it leaves: data, program, state, loop, report."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from megajax import cli
from megajax.backends import LocalSpecProvider
from megajax.checkpoint import CheckpointStore
from megajax.config import Config
from megajax.data.build import Datasets, Sizes
from megajax.data.loader import Loader
from megajax.data.tokenizers import Tokenizer, build_tokenizer
from megajax.models.family import Family, Finished
from megajax.parallel.gradient_sums import number_of_parameters
from megajax.parallel.mesh import describe as mesh_axes
from megajax.training.files import new_file
from megajax.training.loop import Evaluator, Result, TrainingStopped, train
from megajax.training.metrics import Console, Writer, make_writers, read_rows, require_packages
from megajax.training.pipeline_engine import choose_engine
from megajax.training.report import plot_loss
from megajax.training.setup import Program, build_program, fit_config, process_rows
from megajax.training.state import TrainState
from megajax.training.stop import StopRequest


def run(config: Config, family: Family) -> int:
    """Trains, evaluates, prints a sample. Returns the exit code: 0, or 1 when training had to stop.

    Raises:
      ConfigError: something about the config, the data or the folders cannot work; before training starts.
    """
    console = Console(quiet=jax.process_index() != 0)
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    logging.basicConfig(format=f"{who}%(levelname)s: %(message)s", stream=sys.stderr)
    run_dir = Path(config.train.run_dir or f"runs/{config.model_family}")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(run_dir)))

    require_packages(config)
    tokenizer = build_tokenizer(config.data.tokenizer)
    config = fit_config(config, family, tokenizer)
    program = build_program(config, family)
    datasets = build_run_datasets(program, tokenizer)
    console.line(describe(program, tokenizer))

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        loader = Loader(
            datasets.train,
            process_rows=process_rows(program),
            num_workers=config.data.num_workers,
        )
        stack.callback(loader.close)
        # What another run has saved is read before this run makes its own folder: a wrong path leaves no trace.
        begun = begin(program, run_dir, loader)
        store = stack.enter_context(open_store(program, checkpoint_folder(config, run_dir)))
        state, source = begun or resume(program, store, loader)
        step = int(state.step)
        if step >= program.train_iters:
            samples = config.train.train_samples
            length = f"train_samples={samples}" if samples else f"train_iters={config.train.train_iters}"
            console.line(f"nothing to do: {source}, the end; to go on, raise {length}")
            draw(run_dir, datasets, program)
            return 0
        console.line(source)
        writers = open_writers(config, run_dir, resume_step=step or None)
        for writer in writers:
            stack.callback(writer.close)
        try:
            result = train(program, state, datasets, loader, store, writers, console, stop)
        except TrainingStopped as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
    draw(run_dir, datasets, program)
    if result.finished:
        finish(program, result, datasets, tokenizer, console)
    console.line(f"in {run_dir}: config.json, metrics.jsonl, loss.png, checkpoints")
    return 0


def describe(program: Program, tokenizer: Tokenizer) -> str:
    """Lines that say what is about to run, and with what."""
    stored = program.stages.abstract_stored(program.abstract_state.params)
    params = number_of_parameters(stored)
    mesh = mesh_axes(program.mesh)
    model, data = program.config.model, program.config.data
    device = jax.devices()[0]
    attention = "plain JAX" if isinstance(program.backend, LocalSpecProvider) else "kernels named below"
    vocabulary = "" if model.vocab_size is None else f", vocabulary {model.vocab_size} ({tokenizer.name})"
    if jax.process_count() > 1:
        mesh += f" of {jax.process_count()} processes"
    lines = [choose_engine(program.stages, program.config).title] if program.stages.blocks else []
    return "\n".join(
        (
            f"{program.config.model_family}: {params:,} parameters, {model.num_layers} layers, hidden size"
            f" {model.hidden_size}{vocabulary}, {model.compute_dtype}",
            f"{', '.join(data.data) or program.family.default_data}: sequences of {data.seq_length} tokens,"
            f" batch {program.batches.global_batch_size}, on {mesh} ({device.device_kind}), attention in {attention}",
            *lines,
        )
    )


def build_run_datasets(program: Program, tokenizer: Tokenizer) -> Datasets:
    """The data sets, as long as the run will need them."""
    train, batches = program.config.train, program.batches
    evaluation = train.eval_iters * batches.micro_batch_size * batches.data_parallel_size
    training = train.train_samples or train.train_iters * batches.global_batch_size
    return program.family.datasets(program.config, tokenizer, Sizes(training, evaluation, evaluation))


def checkpoint_folder(config: Config, run_dir: Path) -> Path:
    """Where this run saves and resumes."""
    return Path(config.checkpoint.save or run_dir / "checkpoints")


def open_store(program: Program, directory: str | Path, *, read_only: bool = False) -> CheckpointStore:
    """The checkpoints in `directory`, to save there or only to read."""
    config = program.config
    return CheckpointStore.open(
        directory,
        config.checkpoint,
        family=config.model_family,
        model_config=cli.to_json(config)["model"],
        logical_axes=program.axes,
        read_only=read_only,
    )


def begin(program: Program, run_dir: Path, loader: Loader) -> tuple[TrainState, str] | None:
    """The state of a run that has saved nothing yet, from `load` or the seed, and a line that says which; None for one
    that has."""
    checkpoint = program.config.checkpoint
    own = checkpoint_folder(program.config, run_dir)
    with open_store(program, own, read_only=True) as store:
        if store.latest_step() is not None:
            return None
    if checkpoint.load is None:
        return program.create_state(), f"new run; checkpoints go to {own}"
    with open_store(program, checkpoint.load, read_only=True) as source:
        if checkpoint.finetune:
            params = source.restore_params(program.stages.abstract_stored(program.abstract_state.params))
            params = program.stages.from_stored(params, program.abstract_state.params)
            return program.create_state().replace(params=params), f"weights from {checkpoint.load}, all else new"
        state, extras = restore(program, source)
    loader.restore(extras["data"])
    return state, f"continued from {checkpoint.load} at step {int(state.step)}"


def resume(program: Program, store: CheckpointStore, loader: Loader) -> tuple[TrainState, str]:
    """This run's newest state, and a line that says so."""
    state, extras = restore(program, store)
    loader.restore(extras["data"])
    return state, f"resumed from {store.directory} at step {int(state.step)}"


def restore(program: Program, store: CheckpointStore) -> tuple[TrainState, dict[str, Any]]:
    """The newest state in a store as the program wants it, and what was saved beside it."""
    stored, extras = store.restore(program.stages.abstract_stored(program.abstract_state))
    return program.stages.from_stored(stored, program.abstract_state), extras


def open_writers(config: Config, run_dir: Path, *, resume_step: int | None) -> list[Writer]:
    """Writes config.json and opens what the numbers go to; both only on process 0."""
    if jax.process_index() != 0:
        return []
    as_json = cli.to_json(config)
    with new_file(run_dir / "config.json") as temporary:
        temporary.write_text(json.dumps(as_json, indent=1) + "\n", encoding="utf-8")
    return make_writers(config, run_dir, as_json, resume_step=resume_step)


def draw(run_dir: Path, datasets: Datasets, program: Program) -> None:
    """The loss curve so far, if there is one."""
    rows = read_rows(run_dir / "metrics.jsonl") if jax.process_index() == 0 else []
    if rows:
        baseline = program.family.baseline(program.config, datasets)
        plot_loss(rows, run_dir / "loss.png", title=run_dir.name, baseline=baseline)


def finish(program: Program, result: Result, datasets: Datasets, tokenizer: Tokenizer, console: Console) -> None:
    """Prints the final losses and what the family has to show. Every process must call it."""
    losses = {"validation": result.val_loss, "test": Evaluator(program, datasets)(result.state.params, "test")}
    shown = ", ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items() if loss is not None)
    console.line(f"\n{shown or 'no validation data'}")
    params = program.stages.to_stored(result.state.params)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        params = jax.device_put(params, jax.local_devices()[0])
        for line in program.family.epilogue(Finished(program.config, program.model, params, datasets, tokenizer)):
            console.line(line)
