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
import jax.numpy as jnp
import numpy as np

from megajax import cli
from megajax.checkpoint import CheckpointStore
from megajax.config import Config, ConfigError
from megajax.data.build import Datasets, build_datasets
from megajax.data.files import publish, temporary_beside
from megajax.data.loader import Loader
from megajax.data.sources import unigram_entropy
from megajax.data.tokenizers import Tokenizer, build_tokenizer
from megajax.inference.generate import Sampling, generate
from megajax.models.family import Family
from megajax.training.loop import Evaluator, Result, TrainingStopped, train
from megajax.training.metrics import Console, make_writers, read_rows
from megajax.training.report import plot_loss
from megajax.training.setup import Program, build_program, fit_config
from megajax.training.state import TrainState
from megajax.training.stop import StopRequest


def run(config: Config, family: Family) -> int:
    """Trains, evaluates, prints a sample. Returns the exit code: 0, or 1 when training had to stop.

    Raises:
      ConfigError: something about the config, the data or the folders cannot work; before training starts.
    """
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    run_dir = Path(config.train.run_dir or f"runs/{config.model_family}")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(run_dir)))

    tokenizer = build_tokenizer(config.data.tokenizer)
    config = fit_config(config, tokenizer)
    program = build_program(config, family)
    datasets = build_run_datasets(program, tokenizer)
    console.line(describe(program, tokenizer))

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        store = stack.enter_context(open_store(program, run_dir))
        loader = Loader(
            datasets.train,
            process_rows=(jax.process_index(), jax.process_count()),
            num_workers=config.data.num_workers,
        )
        stack.callback(loader.close)
        state, source = initial_state(program, store, loader)
        start = int(state.step)
        console.line(source)
        as_json = cli.to_json(config)
        if first:
            write_json(run_dir / "config.json", as_json)
        writers = make_writers(config, run_dir, as_json, resume_step=start or None) if first else []
        for writer in writers:
            stack.callback(writer.close)
        try:
            result = train(program, state, datasets, loader, store, writers, console, stop)
        except TrainingStopped as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if first:
        finish(program, result, datasets, tokenizer, console, run_dir)
    return 0


def describe(program: Program, tokenizer: Tokenizer) -> str:
    """Two lines that say what is about to run, and with what."""
    params = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    mesh = " ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    model, data = program.config.model, program.config.data
    device = jax.devices()[0]
    return (
        f"{program.config.model_family}: {params:,} parameters, {model.num_layers} layers, hidden size"
        f" {model.hidden_size}, vocabulary {model.vocab_size} ({tokenizer.name}), {model.compute_dtype}\n"
        f"{', '.join(data.data) or 'the documentation inside Python'}: sequences of {data.seq_length} tokens,"
        f" batch {program.batches.global_batch_size}, on {mesh} ({device.device_kind}), attention in plain JAX"
    )


def build_run_datasets(program: Program, tokenizer: Tokenizer) -> Datasets:
    """The data sets, as long as the run will need them."""
    train, batches = program.config.train, program.batches
    evaluation = train.eval_iters * batches.micro_batch_size * batches.data_parallel_size
    return build_datasets(
        program.config.data,
        tokenizer,
        train_samples=train.train_samples or train.train_iters * batches.global_batch_size,
        validation_samples=evaluation,
        test_samples=evaluation,
        seed=train.seed,
    )


def open_store(program: Program, run_dir: Path, *, directory: str | None = None) -> CheckpointStore:
    """The checkpoints of this run, or those in `directory` to read only."""
    config = program.config
    return CheckpointStore.open(
        directory or config.checkpoint.save or run_dir / "checkpoints",
        config.checkpoint,
        family=config.model_family,
        model_config=cli.to_json(config)["model"],
        logical_axes=program.axes,
        read_only=directory is not None,
    )


def initial_state(program: Program, store: CheckpointStore, loader: Loader) -> tuple[TrainState, str]:
    """The state to start from and a line that says where it comes from: this run's newest checkpoint, `load`, or the
    seed."""
    checkpoint = program.config.checkpoint
    if store.latest_step() is not None:
        state, extras = store.restore(program.abstract_state)
        loader.restore(extras["data"])
        return state, f"resumed from {store.directory} at step {int(state.step)}"
    if checkpoint.load is None:
        return program.create_state(), f"new run; checkpoints go to {store.directory}"
    with open_store(program, Path(), directory=checkpoint.load) as source:
        if checkpoint.finetune:
            params = source.restore_params(program.abstract_state.params)
            return program.create_state().replace(params=params), f"weights from {checkpoint.load}, all else new"
        state, extras = source.restore(program.abstract_state)
    loader.restore(extras["data"])
    return state, f"continued from {checkpoint.load} at step {int(state.step)}"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    temporary = temporary_beside(path)
    Path(temporary).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    publish(temporary, path)


def finish(
    program: Program, result: Result, datasets: Datasets, tokenizer: Tokenizer, console: Console, run_dir: Path
) -> None:
    """The loss curve, and for a run that reached its end the final losses and a sample of text."""
    vocab_size = program.config.model.vocab_size
    assert vocab_size is not None
    entropy = unigram_entropy(datasets.train.token_frequencies(vocab_size))
    rows = read_rows(run_dir / "metrics.jsonl")
    picture = run_dir / "loss.png"
    plot_loss(rows, picture, title=f"{run_dir.name}", baseline=("unigram entropy of the data", entropy))
    if result.finished:
        evaluate = Evaluator(program, datasets)
        losses = {split: evaluate(result.state.params, split) for split in ("validation", "test")}
        shown = ", ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items() if loss is not None)
        console.line(f"\n{shown or 'no validation data'} nats per token; unigram entropy of the data {entropy:.4f}")
        if program.config.train.sample_tokens:
            console.line(f"\nsample:\n{sample_text(program, result.state.params, tokenizer)}\n")
    console.line(f"in {run_dir}: config.json, metrics.jsonl, loss.png, checkpoints")


def sample_text(program: Program, params: Any, tokenizer: Tokenizer) -> str:
    """The prompt and its continuation by the model."""
    train = program.config.train
    prompt = tokenizer.tokenize(train.sample_prompt) or [tokenizer.eod]
    room = program.config.data.seq_length - len(prompt)
    if room < 1:
        raise ConfigError(
            f"sample_prompt has {len(prompt)} tokens, no room in seq_length={program.config.data.seq_length}"
        )
    tokens = generate(
        program.model,
        jax.device_put(params, jax.devices()[0]),
        jnp.asarray([prompt], jnp.int32),
        num_tokens=min(train.sample_tokens, room),
        sampling=Sampling(temperature=0.8, top_p=0.95),
        key=jax.random.key(train.seed),
    )
    new = np.asarray(tokens[0]).tolist()
    if tokenizer.eod in new:
        new = new[: new.index(tokenizer.eod)]
    return train.sample_prompt + tokenizer.detokenize(new)
