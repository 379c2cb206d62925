"""Plans a run before it starts, on a machine without its GPUs: `python -m megajax.plan --help`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megajax import cli
from megajax.cli_flags import spell
from megajax.cli_json import read_json
from megajax.config import Config, ConfigError
from megajax.config_checks import require
from megajax.data.files import clear_errors, publish, temporary_beside
from megajax.parallel import pipeline_layout, schedule_plot
from megajax.parallel.aot import compiler_silenced
from megajax.parallel.pipeline_layout import Layout
from megajax.parallel.schedule_ticks import plan_ticks
from megajax.parallel.schedules import SCHEDULES, Costs, Schedule, label, make_schedule
from megajax.status_line import StatusLine

if TYPE_CHECKING:
    from megajax.models.family import Family

_HELP = """
Without --schedule, all flags of the trainer (python -m megajax.train --help) say what is to be trained, or to generate.

examples:
  python -m megajax.plan --preset llama3-8b --bf16 --target h100 --num-devices 8 --mesh tp=2,zero=3 --html plan.html
  python -m megajax.plan --preset llama3-8b --bf16 --params-dtype bfloat16 --num-devices 8 --mesh tp=8 --step decode
  python -m megajax.plan --schedule 1f1b --pp 4 --microbatches 8
  python -m megajax.plan --schedule 1f1b --pp 16 --microbatches 64 --layout 'Et*3|(tt|)*29,m|L' --png pipeline.png
  python -m megajax.plan --schedule zb-h1 --pp 8 --microbatches 32 --num-layers 32 --bytes-per-microbatch 3e9 --json
"""


def main(argv: list[str]) -> None:
    """Prints the plan that was asked for."""
    if not argv or {"--schedule", "--help", "-h"} & {word.split("=")[0] for word in argv}:
        options = _parser().parse_args(argv)
        if options.schedule is None:
            raise ConfigError(
                "there is nothing to plan: give --num-devices for a training step, or --schedule; see --help"
            )
        plan_schedule(options)
    else:
        # Among the trainer's flags, the word would be taken for the value of one of those.
        for flag, word in itertools.pairwise(argv):
            if flag in ("--json", "--search") and not word.startswith("-"):
                raise ConfigError(f"{flag} {word} is not valid: {flag} takes no value; drop {word}")
        options, flags = _step_parser().parse_known_args(argv)
        require(options.num_devices is not None, "--num-devices is missing: the number of GPUs to plan for")
        (plan_generation if options.step in _GENERATION else plan_training)(options, flags)


_GENERATION = ("prefill", "decode")


def plan_generation(options: argparse.Namespace, flags: list[str]) -> None:
    """Compiles a step of generation with the model that the trainer's `flags` describe, and says what it takes."""
    require(not options.search, f"--search ranks meshes for training, not for --step {options.step}; drop one of them")
    with compiler_silenced() as stderr:
        from megajax.planning.inference import plan_inference
        from megajax.planning.inference_views import format_inference, inference_page

        config, family = _config_and_family(options, flags)
        status = StatusLine(stderr)
        status.show(f"compiling {options.step} for {options.num_devices} {options.target.upper()} ...")
        found = plan_inference(
            config,
            family,
            options.target,
            options.num_devices,
            options.step,
            max_requests=_MAX_REQUESTS if options.max_requests is None else options.max_requests,
            max_seq_length=_MAX_SEQ_LENGTH if options.max_seq_length is None else options.max_seq_length,
        )
        status.clear()
    if options.html is not None:
        _save_text(inference_page(found), options.html.expanduser())
    print(json.dumps(found.as_json()) if options.json else format_inference(found))


_MAX_REQUESTS, _MAX_SEQ_LENGTH = 8, 2560  # Megatron's


def _config_and_family(options: argparse.Namespace, flags: list[str]) -> tuple[Config, Family]:
    from megajax.models.registry import FAMILIES
    from megajax.planning.mesh_flags import mesh_flags

    words = [*mesh_flags(options.mesh, options.num_devices), *flags]
    config = cli.parse(words, prog="python -m megajax.plan", families=FAMILIES)
    return config, FAMILIES[config.model_family]


def plan_training(options: argparse.Namespace, flags: list[str]) -> None:
    """Compiles the training or evaluation step that the trainer's `flags` describe, and says what it takes."""
    for flag, value in (
        ("--inference-max-requests", options.max_requests),
        ("--inference-max-seq-length", options.max_seq_length),
    ):
        require(
            value is None, f"{flag} {value} has no effect with --step {options.step}; drop it, or use --step decode"
        )
    with compiler_silenced() as stderr:
        from megajax.planning import page, report, search, text

        config, family = _config_and_family(options, flags)
        status = StatusLine(stderr)
        ranked = []
        if options.search:
            require(options.mesh is None, f"--mesh {options.mesh} has no effect with --search; drop one of them")
            require(options.step == "train", f"--search ranks meshes for training, not for --step {options.step}")
            _require_no_layout(config, family, flags)

            def progress(done: int, total: int, what: str) -> None:
                bar = f"{'█' * round(20 * done / total):░<20}"
                status.show(f"{bar} {done} of {total}: {what}")

            ranked = search.search(config, family, options.target, options.num_devices, progress)
            found = ranked[0].report
        else:
            status.show(f"compiling the step for {options.num_devices} {options.target.upper()} ...")
            found = report.plan_step(config, family, options.target, options.num_devices, options.step)
        status.clear()
    if options.html is not None and found is not None:
        _save_text(page.page(found), options.html.expanduser())
    if options.json:
        of_search = {"ranked": text.ranked_json(ranked)} if options.search else {}
        print(json.dumps(({} if found is None else found.as_json()) | of_search))
    else:
        print("\n".join(text.format_search(ranked)) if options.search else "", end="\n" if options.search else "")
        print("" if found is None else text.format_report(found))


def _require_no_layout(config: Config, family: Family, flags: list[str]) -> None:
    """Raises ConfigError where flags, and not the run of `--config`, say how to lay out what is searched for."""
    from megajax.models.registry import FAMILIES

    path = cli.control_value(flags, "--config")
    saved = {"model_family": family.name} | (read_json(path) if path is not None else {})
    known = cli.from_json(saved, families=FAMILIES)
    for name, value in vars(config.parallel).items():
        if value != vars(known.parallel)[name]:
            raise ConfigError(f"{spell(name)}={value} has no effect with --search, which chooses the layout; drop it")


def plan_schedule(options: argparse.Namespace) -> None:
    """Draws a pipeline schedule and says how long its stages idle and what they hold."""
    for flag, value in (("--pp", options.pp), ("--microbatches", options.microbatches)):
        if value is None:
            raise ConfigError(f"{flag} is missing; --schedule needs it")
    require(options.mtp is None or options.mtp >= 0, f"--mtp-num-layers {options.mtp} must be at least 0")
    memory = options.bytes_per_microbatch
    if memory is not None:
        require(0 < memory < 1e18, f"--bytes-per-microbatch {memory:g} must be above 0 and below 1e18")
    layout = _layout(options)
    chunks = len(layout) // options.pp if layout is not None else _chunks(options)
    schedule = make_schedule(options.schedule, options.pp, options.microbatches, chunks, group=options.group)
    costs = _costs(layout)
    if options.png is not None:
        _save_figure(schedule_plot.draw_figure(schedule, costs, memory), options.png.expanduser())
    if options.json:
        print(json.dumps(_as_json(schedule, costs, layout, memory)))
        return
    stages, microbatches = options.pp, options.microbatches
    print(f"{schedule.name}: {stages} stages of {chunks} chunk{'s' * (chunks > 1)}, {microbatches} microbatches\n")
    if layout is not None:
        print(schedule_plot.draw_layout(layout, stages) + "\n")
    print(schedule_plot.draw_text(schedule, width=shutil.get_terminal_size((120, 24)).columns) + "\n")
    print(schedule_plot.summary(schedule, costs, memory))


def _layout(options: argparse.Namespace) -> Layout | None:
    """Layers of every virtual stage, or None if nothing says how many there are."""
    split = {
        "--decoder-first-pipeline-num-layers": options.first,
        "--decoder-last-pipeline-num-layers": options.last,
        "--account-for-embedding-in-pipeline-split": options.account_for_embedding or None,
        "--account-for-loss-in-pipeline-split": options.account_for_loss or None,
    }
    given = [flag for flag, value in split.items() if value is not None]
    if options.layout is not None:
        if given:
            raise ConfigError(f"{given[0]} has no effect beside --layout; remove one of them")
        return pipeline_layout.parse_layout(
            options.layout, options.pp, options.chunks, num_layers=options.num_layers, mtp_num_layers=options.mtp
        )
    if options.num_layers is None:
        if given or options.mtp is not None:
            flag = given[0] if given else "--mtp-num-layers"
            raise ConfigError(f"{flag} has no effect without --num-layers; add it")
        return None
    layers = pipeline_layout.split_layers(
        options.num_layers,
        options.pp,
        _chunks(options),
        options.first,
        options.last,
        options.account_for_embedding,
        options.account_for_loss,
    )
    return pipeline_layout.layout_of(layers, options.mtp or 0)


def _chunks(options: argparse.Namespace) -> int:
    return 1 if options.chunks is None else options.chunks


def _costs(layout: Layout | None) -> Costs:
    """Stages with more layers take longer. Embedding and loss weigh nothing: every stage does its share of them."""
    if layout is None:
        return Costs()
    layers = [part.count(pipeline_layout.DECODER) + part.count(pipeline_layout.MTP) for part in layout]
    if len(set(layers)) == 1:
        return Costs()
    return Costs(work=tuple(count * len(layers) / sum(layers) for count in layers))


def _as_json(schedule: Schedule, costs: Costs, layout: Layout | None, memory: float | None) -> dict[str, Any]:
    """Numbers by stage are lists over stages, slots lists over stages of lists over chunks."""
    return {
        "schedule": schedule.name,
        "stages": schedule.stages,
        "chunks": schedule.chunks,
        "microbatches": schedule.microbatches,
        "ticks": schedule.ticks,
        "bubble": schedule.bubble(costs),
        "peak_live": schedule.peak_live(),
        "bytes_in_flight": None if memory is None else schedule.bytes_in_flight(memory),
        "slots": {name: n if isinstance(n, int) else n[0] for name, n in plan_ticks(schedule).slots._asdict().items()},
        "layout": layout,
        "table": [[op and label(op) for op in row] for row in schedule.table],
    }


def _save_text(text: str, path: Path) -> None:
    require(not path.is_dir(), f"--html {path}: is a folder; give the name of a file in it")
    temporary = Path(temporary_beside(path))
    try:
        with clear_errors(path, instead="give another --html"):
            temporary.write_text(text, encoding="utf-8")
            publish(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_figure(figure: Any, path: Path) -> None:
    require(not path.is_dir(), f"--png {path}: is a folder; give the name of a file in it")
    temporary = Path(temporary_beside(path))
    try:
        with clear_errors(path, instead="give another --png"):
            figure.savefig(temporary, format="png")
            publish(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def _step_parser() -> cli.Parser:
    """The planner's own flags; the others are the trainer's."""
    parser = cli.Parser(prog="python -m megajax.plan", add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("training step, beside the trainer's flags").add_argument
    add("--num-devices", type=int, metavar="N", help="GPUs, 8 to a node")
    add("--target", default="h100", metavar="NAME", help="a100, h100, h200 or b200 (h100)")
    add("--mesh", metavar="AXIS=SIZE,...", help="such as tp=8,pp=4,zero=1, in short for the trainer's flags")
    add("--search", action="store_true", help="rank the meshes that are possible, compile the best, plan the first")
    steps = ("train", "eval", *_GENERATION)
    add(
        "--step",
        choices=steps,
        default="train",
        help="what to plan: a step of training or evaluation, or of generation: "
        "prompts that fill the cache, or one token more (train)",
    )
    requests = f"of generation: texts that are written at once, on all GPUs together ({_MAX_REQUESTS})"
    add("--inference-max-requests", dest="max_requests", type=int, metavar="N", help=requests)
    room = f"of generation: tokens that the cache has room for, of each text ({_MAX_SEQ_LENGTH})"
    add("--inference-max-seq-length", dest="max_seq_length", type=int, metavar="N", help=room)
    add("--html", type=Path, metavar="FILE", help="also save the plan as one page")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _parser() -> cli.Parser:
    parser = cli.Parser(
        parents=[_step_parser()],
        prog="python -m megajax.plan",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("pipeline schedule").add_argument
    add("--schedule", metavar="NAME", help=f"draw a schedule: {', '.join(SCHEDULES)}")
    add("--pp", "--pipeline-model-parallel-size", type=int, metavar="N", help="pipeline stages")
    add("--microbatches", "--num-microbatches", type=int, metavar="N", help="microbatches of a step")
    chunks = ("--virtual-pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank")
    add("--chunks", *chunks, dest="chunks", type=int, metavar="N", help="model chunks of a stage (1, or the layout's)")
    group = "--microbatch-group-size-per-vp-stage"
    add("--group", group, dest="group", type=int, metavar="N", help="microbatches in a row through one chunk (pp)")
    layout = "--pipeline-model-parallel-layout"
    add("--layout", layout, dest="layout", metavar="STR", help="layers of the stages, such as 'Et*3|(tt|)*29,m|L'")
    add("--num-layers", type=int, metavar="N", help="decoder layers, split evenly if no layout says otherwise")
    add("--mtp-num-layers", dest="mtp", type=int, metavar="N", help="layers of multi-token prediction")
    add("--decoder-first-pipeline-num-layers", dest="first", type=int, metavar="N", help="layers of the first stage")
    add("--decoder-last-pipeline-num-layers", dest="last", type=int, metavar="N", help="layers of the last stage")
    embedding = "--account-for-embedding-in-pipeline-split"
    add(embedding, dest="account_for_embedding", action="store_true", help="the embedding counts as a layer")
    loss = "--account-for-loss-in-pipeline-split"
    add(loss, dest="account_for_loss", action="store_true", help="the loss counts as a layer")
    size = "--bytes-per-microbatch"
    add(size, type=float, metavar="N", help="activations one microbatch leaves on a stage, all its chunks together")
    add("--png", type=Path, metavar="FILE", help="also save a picture of operations and memory over time")
    return parser


def _as_program(argv: list[str]) -> None:
    """Nothing runs here: JAX needs no more than a CPU, should not look for a driver, and keeps no program, for what is
    compiled for absent devices cannot be read back."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported, which comes later
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    main(argv)


if __name__ == "__main__":
    cli.run_main(_as_program)
