"""Moves weights between Hugging Face, Megatron and megajax checkpoints: `python -m megajax.convert --help`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megajax import cli
from megajax.config import CheckpointConfig, Config, ConfigError

if TYPE_CHECKING:
    from megajax.interop.pretrained import Pretrained

FORMATS = ("hf", "megatron", "megajax")
_HELP = """
hf        folder of a Hugging Face model: config.json and safetensors
megatron  folder with safetensors and config.json {"transformer_config": ..., "model_args": ...}; as a source also a
          torch_dist checkpoint (needs torch: pip install 'megajax[megatron]')
megajax   folder of checkpoints, as in runs/NAME/checkpoints; start from it with --load DST --finetune

examples:
  python -m megajax.convert --from hf ~/llama --to megajax runs/llama/checkpoints
  python -m megajax.convert --from megajax runs/NAME/checkpoints --to hf exported
"""


def main(argv: list[str]) -> None:
    """Reads the weights in one format and writes them in the other."""
    parser = cli.Parser(
        prog="python -m megajax.convert",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from", nargs=2, required=True, metavar=("FORMAT", "SRC"), dest="source")
    parser.add_argument("--to", nargs=2, required=True, metavar=("FORMAT", "DST"), dest="target")
    options = parser.parse_args(argv)
    (source, src), (target, dst) = options.source, options.target
    for flag, name in (("--from", source), ("--to", target)):
        if name not in FORMATS:
            raise ConfigError(f"{flag} {name}: is no format; use one of {', '.join(FORMATS)}")
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    if not src.is_dir():
        raise ConfigError(f"--from {source} {src}: there is no such folder")
    if src.resolve() == dst.resolve():
        raise ConfigError(f"--to {target} {dst}: is the source itself; choose another folder")
    from megajax.parallel.devices import find_devices

    find_devices()
    pretrained = read(source, src)
    write(target, pretrained, dst)
    print(f"{dst}: {pretrained.family}, {count(pretrained):,} parameters", file=sys.stderr)


def count(pretrained: Pretrained) -> int:
    """Parameters, those of vocabulary padding included."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))


def read(source: str, src: Path) -> Pretrained:
    """The weights in `src`, which has format `source`."""
    from megajax.interop import hf, megatron

    return {"hf": hf.load, "megatron": megatron.load_folder, "megajax": read_megajax}[source](src)


def write(target: str, pretrained: Pretrained, dst: Path) -> None:
    """Writes `dst` in format `target`; a format that cannot express the model raises ConfigError."""
    from megajax.interop import hf, megatron

    {"hf": hf.save, "megatron": megatron.save_folder, "megajax": write_megajax}[target](pretrained, dst)


def read_megajax(src: Path) -> Pretrained:
    """The weights of the newest checkpoint in `src`, which may also be the folder of a run."""
    from megajax.backends import LocalSpecProvider
    from megajax.checkpoint import CheckpointStore
    from megajax.checkpoint.inspect import read_config
    from megajax.interop.pretrained import Pretrained
    from megajax.models.registry import FAMILIES

    src = src / "checkpoints" if (src / "checkpoints").is_dir() else src
    saved = read_config(src)
    config = cli.from_json({"model_family": saved["family"], "model": saved["model_config"]}, families=FAMILIES)
    family = FAMILIES[config.model_family]
    model = family.build_model(config.model, LocalSpecProvider())
    settings = {"family": family.name, "model_config": saved["model_config"]}
    with CheckpointStore.open(src, CheckpointConfig(), read_only=True, **settings) as store:
        params = store.restore_params(_abstract_params(config, unboxed=True))
    return Pretrained(family.name, config.model, model, params)


def write_megajax(pretrained: Pretrained, dst: Path) -> None:
    """A checkpoint, step 0, that holds weights only.

    Raises:
      ConfigError: `dst` holds checkpoints already, or cannot be written.
    """
    from flax import linen as nn

    from megajax.checkpoint import CheckpointStore
    from megajax.parallel.sharding import logical_axes

    if any(dst.glob("step_*")):
        raise ConfigError(f"--to megajax {dst}: holds checkpoints already; choose another folder")
    config = Config(model_family=pretrained.family, model=pretrained.config)
    axes = {"params": logical_axes(_abstract_params(config, unboxed=False))}
    store = CheckpointStore.open(
        dst,
        CheckpointConfig(async_save=False),
        family=pretrained.family,
        model_config=cli.to_json(config)["model"],
        logical_axes=axes,
    )
    with store:
        store.save(0, {"params": nn.unbox(pretrained.params)}, {})


def _abstract_params(config: Config, *, unboxed: bool) -> Any:
    import jax
    from flax import linen as nn

    from megajax.backends import LocalSpecProvider
    from megajax.models.registry import FAMILIES

    family = FAMILIES[config.model_family]
    model = family.build_model(config.model, LocalSpecProvider())
    params = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config.model, 1, 1))["params"]
    return nn.unbox(params) if unboxed else params


if __name__ == "__main__":
    cli.run_main(main)
