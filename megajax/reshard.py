"""Rewrites a checkpoint for another mesh, without any of its devices: `python -m megajax.reshard --help`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Self, Union, get_args, get_origin

from megajax import cli, cli_flags
from megajax.config import ConfigError, ParallelConfig, TransformerConfig, to_tuple
from megajax.status_line import StatusLine

if TYPE_CHECKING:
    from megajax.checkpoint.rechunk import Target
    from megajax.checkpoint.tree import Leaf

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HELP = """
A run resumes on any mesh without this; it starts faster from chunks that are the parts of its devices. Without the
optimizer's state a checkpoint has about a third of the size.

SRC is a run's folder, its checkpoints, or one step_* folder; DST a new folder for --load. The mesh is given by the
trainer's flags, or in short by --mesh; what is left out has the trainer's default.

examples:
  python -m megajax.reshard runs/NAME resharded --mesh tp=2,pp=4,dp=8,zero=3
  python -m megajax.reshard runs/NAME weights --weights-only --dtype bf16    # continue with --finetune --load weights
"""


_OWN = ("src", "dst", "step", "mesh", "weights_only", "dtype")


class Source(NamedTuple):
    """One step to read. config: its `config.json`."""

    folder: Path
    config: dict[str, Any]
    leaves: dict[str, Leaf]


class Mesh(NamedTuple):
    """What was asked for. devices: data-parallel ones included."""

    parallel: ParallelConfig
    devices: int


def main(argv: list[str]) -> None:
    """Reads one step and writes another, whole or not at all."""
    options = _parser().parse_args(argv)
    mesh = _mesh(options)
    if mesh is None and not options.weights_only and options.dtype is None:
        raise ConfigError(
            "there is nothing to change: give --mesh (or --tp, ...), --weights-only or --dtype; see --help"
        )
    destination = options.dst.expanduser().absolute()
    if destination.exists() or destination.is_symlink():
        raise ConfigError(f"{destination}: exists already; give a new folder")
    from megajax.parallel.devices import find_devices

    find_devices()
    source = _source(options.src.expanduser().absolute(), options.step)
    leaves = {
        name: _as_dtype(leaf, options.dtype) if name.startswith("params/") else leaf
        for name, leaf in source.leaves.items()
        if name.startswith("params/") or not options.weights_only
    }
    targets, config = _targets(leaves, source.config, mesh)
    with _terminable():
        size = _write(source, destination, targets, config, weights_only=options.weights_only)
    print(f"{destination}: step {config['step']}, {len(leaves)} arrays, {size / 1e9:.3g} GB{_for(mesh)}")
    print(f"use it with {'--finetune ' if options.weights_only else ''}--load {destination}")


def _for(mesh: Mesh | None) -> str:
    from megajax.parallel.mesh import describe, make_abstract_mesh

    return "" if mesh is None else f", in chunks for {describe(make_abstract_mesh(*mesh))}"


def _source(path: Path, step: int | None) -> Source:
    """The step that is meant, with undamaged files."""
    from megajax.checkpoint import CheckpointError, files
    from megajax.checkpoint.tree import Leaf

    of_step = re.fullmatch(r"step_(\d{8,})", path.name)
    if of_step and path.is_dir():
        if step not in (None, int(of_step[1])):
            raise ConfigError(f"--step {step} is not the step of {path}; drop one of them")
        path, step = path.parent, int(of_step[1])
    elif (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    steps = files.require_steps(path)
    if step is not None and step not in steps:
        raise CheckpointError(f"{path}: has no step {step}; it has {', '.join(map(str, steps))}")
    folder = files.step_folder(path, steps[-1] if step is None else step)
    if damage := files.damage(folder):
        others = ", ".join(str(other) for other in steps if files.step_folder(path, other) != folder)
        fix = f"take another with --step ({others})" if others else "there is no other step"
        raise CheckpointError(f"{folder}: is damaged, {damage}; {fix}")
    leaves = {name: Leaf.from_json(entry) for name, entry in files.read_json(folder / files.TREE_FILE).items()}
    return Source(folder, files.read_json(folder / files.CONFIG_FILE), leaves)


def _as_dtype(leaf: Leaf, dtype: str | None) -> Leaf:
    from megajax.checkpoint.tree import same_kind

    if dtype is None or not same_kind(leaf.dtype, DTYPES[dtype]):
        return leaf
    return dataclasses.replace(leaf, dtype=DTYPES[dtype])


def _targets(
    leaves: dict[str, Leaf], saved: dict[str, Any], mesh: Mesh | None
) -> tuple[dict[str, Target], dict[str, Any]]:
    """(how each leaf is to be stored, the new `config.json`)."""
    from megajax.checkpoint.rechunk import Target, shard_shape
    from megajax.models.registry import FAMILIES
    from megajax.parallel.mesh import make_abstract_mesh
    from megajax.parallel.sharding import axis_rules, validate_model
    from megajax.training.stages import layers_per_stage

    if mesh is None:
        return {name: Target(leaf, None) for name, leaf in leaves.items()}, saved
    config = cli.from_json({"model_family": saved["family"], "model": saved["model_config"]}, families=FAMILIES)
    config = dataclasses.replace(config, parallel=mesh.parallel)
    validate_model(config.model, mesh.parallel)
    if mesh.parallel.pipeline_model_parallel_size > 1:
        layers_per_stage(config)
    abstract = make_abstract_mesh(mesh.parallel, mesh.devices)
    rules = axis_rules(mesh.parallel, config.model, mesh.devices)
    shape_of = partial(
        shard_shape,
        rules=rules,
        mesh=abstract,
        padded_vocab_size=config.model.padded_vocab_size,
        params_as_optimizer=config.model.mixed_precision and mesh.parallel.zero in (1, 2),  # as `ComputedWith` says
    )
    targets = {name: Target(leaf, shape_of(name, leaf)) for name, leaf in leaves.items()}
    return targets, saved | {"parallel": cli.to_json(config)["parallel"], "devices": mesh.devices}


def _write(
    source: Source,
    destination: Path,
    targets: dict[str, Target],
    config: dict[str, Any],
    *,
    weights_only: bool,
) -> int:
    """Writes the step beside `destination` and gives it its name when it is whole; returns the bytes of its files."""
    from megajax.checkpoint import files
    from megajax.checkpoint.rechunk import copy_arrays
    from megajax.data.files import new_directory

    extras = {} if weights_only else files.read_json(source.folder / files.EXTRAS_FILE)
    tree = {name: target.leaf.to_json() for name, target in targets.items()}
    with new_directory(destination) as temporary, Progress(sum(t.leaf.bytes for t in targets.values())) as progress:
        folder = temporary / source.folder.name
        folder.mkdir()
        copy_arrays(source.folder, folder, targets, progress.add, called=destination)
        texts = {files.CONFIG_FILE: config, files.EXTRAS_FILE: extras, files.TREE_FILE: tree}
        for name, content in texts.items():
            files.write_text(folder / name, json.dumps(content, indent=1))
        return files.write_integrity(folder)


class Progress:
    """Says on stderr how far it is: a line that changes on a terminal, else one line in ten seconds."""

    def __init__(self, total: int):
        self._total, self._done = max(total, 1), 0
        self._line = StatusLine()
        self._pause = 0.1 if self._line.live else 10.0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.clear()

    def add(self, name: str, size: int) -> None:
        """Counts the bytes of a part of the array `name`."""
        self._done += size
        now = time.monotonic()
        if now - self._last < self._pause:
            return
        self._last = now
        rate = self._done / (now - self._start) / 1e6
        text = f"{self._done / self._total:6.1%} of {self._total / 1e9:.3g} GB, {rate:.0f} MB/s, {name}"
        if self._line.live:
            self._line.show(text)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that what is half written goes away."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _mesh(options: argparse.Namespace) -> Mesh | None:
    """The mesh that --mesh and the single flags ask for together; None where there is neither."""
    from megajax.parallel.mesh import fewest_devices

    items = [item.strip().partition("=") for item in options.mesh.split(",")] if options.mesh is not None else []
    words = [f"--{name.replace('_', '-')}{equals}{value}" for name, equals, value in items]
    alone = cli.Parser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    _add_mesh_flags(alone)
    try:
        given = vars(alone.parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"--mesh {options.mesh}: {error}") from None
    for name, value in vars(options).items():
        if name not in _OWN and given.setdefault(name, value) != value:
            raise ConfigError(f"--mesh {options.mesh} says {name}={given[name]} and a flag {value}; drop one")
    if not given:
        return None
    dp = given.pop("dp", None)
    parallel = ParallelConfig(**{name: to_tuple(value) for name, value in given.items()})
    fewest = fewest_devices(parallel)
    if dp is None:
        return Mesh(parallel, fewest)
    shared = parallel.expert_model_parallel_size * parallel.num_distributed_optimizer_instances
    if dp < 1 or dp % shared:
        raise ConfigError(
            f"dp={dp} must be a multiple of the {shared} that experts and optimizer copies make; change it"
        )
    return Mesh(parallel, fewest // shared * dp)


def _add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """The trainer's flags of parallelism; they leave no trace where they are not given."""
    add = parser.add_argument_group("mesh, as the trainer divides its devices").add_argument
    add("--dp", "--data-parallel-size", type=int, metavar="INT", help="all data-parallel devices together")
    for flag in cli_flags.flags_of(TransformerConfig).values():
        if flag.group == "parallel":
            names = [cli_flags.spell(flag.name), *(a for a, name in cli_flags.ALIASES.items() if name == flag.name)]
            names += ["--ep"] if flag.name == "expert_model_parallel_size" else []
            add(*names, dest=flag.name, **_as_argument(flag))


def _as_argument(flag: cli_flags.Flag) -> dict[str, Any]:
    """How argparse reads a value of the field."""
    if flag.is_bool:
        return {"action": argparse.BooleanOptionalAction}
    kind = flag.annotation
    if get_origin(kind) in (Union, UnionType):
        [kind] = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return {"type": type(get_args(kind)[0]), "choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"type": get_args(kind)[0], "nargs": len(get_args(kind)), "metavar": "INT"}
    return {"type": kind, "metavar": cli_flags.describe(kind)}


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m megajax.reshard",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="the checkpoint to read")
    add("dst", metavar="DST", type=Path, help="the folder to make")
    add("--step", type=int, metavar="INT", default=None, help="which step of SRC (the newest)")
    add("--mesh", metavar="AXIS=SIZE,...", default=None, help="such as tp=2,pp=4,dp=8,zero=3")
    add("--weights-only", action="store_true", default=False, help="leave out the optimizer's and the run's state")
    add("--dtype", choices=tuple(DTYPES), default=None, help="dtype of the weights (as they are)")
    _add_mesh_flags(parser)
    return parser


if __name__ == "__main__":
    cli.run_main(main)
