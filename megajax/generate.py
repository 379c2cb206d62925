"""Writes with a trained model: `python -m megajax.generate runs/NAME --prompt "The for statement"`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megajax import cli
from megajax.cli_json import read_json
from megajax.config import ConfigError
from megajax.config_checks import require

if TYPE_CHECKING:
    from megajax.data.tokenizers import Tokenizer
    from megajax.inference.generate import Sampling
    from megajax.interop.pretrained import Pretrained
    from megajax.models.request import Asked, Request

LENGTH = 128
_HELP = """
SRC is the folder of a run, of its checkpoints, or of a Hugging Face model. A decoder continues the prompt. A decoder
with an encoder writes what belongs to it, such as the spans that <extra_id_0> and on stand for. A model that sees is
asked about images, which stand where the prompt says <image>, or in front of it.

examples:
  python -m megajax.generate runs/NAME --prompt "The for statement" --temperature 0.6 --top-p 0.95
  python -m megajax.generate ~/model --prompt "1, 2, 3," --temperature 0 --num-tokens 32 --json
  python -m megajax.generate runs/NAME --prompt "The for statement <extra_id_0> over a sequence." --temperature 0
  python -m megajax.generate ~/model --image cat.jpg --prompt "USER: <image>\nWhat is this? ASSISTANT:"
"""


def main(argv: list[str]) -> None:
    """Prints what the model writes for each prompt."""
    options = _parser().parse_args(argv)
    wanted = options.num_tokens
    require(wanted is None or wanted > 0, f"--num-tokens {wanted}: must be at least 1")
    source = options.source.expanduser()
    if not source.is_dir():
        raise ConfigError(f"{options.source}: there is no such folder; give a run, its checkpoints or a model")
    import jax

    from megajax.data.tokenizers import build_tokenizer
    from megajax.inference.generate import Sampling
    from megajax.parallel.devices import find_devices

    find_devices()
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    tokenizer = build_tokenizer(options.tokenizer or find_tokenizer(source))
    request = request_of(source, tokenizer, options.image)
    pretrained = on_device(read(source), jax.default_backend())
    for index, prompt in enumerate(options.prompt or [""]):
        asked = ask(pretrained, tokenizer, request._replace(text=prompt))
        new = continuation(pretrained, asked, wanted, sampling, options.seed + index)
        text = asked.text(new)
        if options.json:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": new}), flush=True)
        else:
            print(text, flush=True)


def request_of(source: Path, tokenizer: Tokenizer, images: list[Path]) -> Request:
    """What is asked, without the text.

    Raises:
      ConfigError: an image cannot be read.
    """
    from megajax.data.images import preparation_in, read_image
    from megajax.data.tokenizers import HFTokenizer
    from megajax.models.request import Request

    pixels = [read_image(path.expanduser()) for path in images]
    if _is_checkpoint(source):  # trained here, on texts without special tokens around them
        return Request("", tokenizer.tokenize, pixels)
    tokenize = tokenizer.tokenize_with_specials if isinstance(tokenizer, HFTokenizer) else tokenizer.tokenize
    as_it_is = all(image.dtype.kind == "f" for image in pixels)
    return Request("", tokenize, pixels, None if as_it_is else partial(preparation_in, source))


def read(source: Path) -> Pretrained:
    """The model in a folder of either kind.

    Raises:
      ConfigError: there is none, or it is of a family that writes nothing.
    """
    from megajax import convert
    from megajax.models.registry import FAMILIES

    pretrained = convert.read("megajax" if _is_checkpoint(source) else "hf", source)
    if FAMILIES[pretrained.family].ask is None:
        writers = ", ".join(name for name, family in FAMILIES.items() if family.ask is not None)
        raise ConfigError(f"{source}: holds a {pretrained.family}, which writes no text; give one of {writers}")
    return pretrained


def on_device(pretrained: Pretrained, platform: str) -> Pretrained:
    """The model with its parameters where it runs; on a GPU each layer's by themselves, as decoding reads them fastest.

    A CPU would gain little, and compile for far longer.
    """
    import jax

    from megajax.inference.layers import apart
    from megajax.models.registry import FAMILIES

    params, segments = pretrained.params, FAMILIES[pretrained.family].layer_segments
    if platform == "gpu" and segments is not None:
        params = apart(jax.device_get(params), segments(pretrained.model))  # of arrays of the host, rows are no copies
    return pretrained._replace(params=jax.device_put(params))


def find_tokenizer(source: Path) -> str:
    """What a folder says of its tokenizer: that of the run, or the folder of the model itself.

    Raises:
      ConfigError: it says nothing.
    """
    if not _is_checkpoint(source):
        return str(source)
    for folder in (source, source.resolve().parent):
        if (folder / "config.json").is_file():
            from megajax.models.registry import FAMILIES

            return cli.from_json(read_json(str(folder)), families=FAMILIES).data.tokenizer
    raise ConfigError(f"{source}: no config.json of a run stands there to name the tokenizer; give --tokenizer")


def ask(pretrained: Pretrained, tokenizer: Tokenizer, request: Request) -> Asked:
    """A request as the model reads it.

    Raises:
      ConfigError: it cannot.
    """
    from megajax.models.registry import FAMILIES

    asked = FAMILIES[pretrained.family].ask
    assert asked is not None  # `read` has refused the rest
    return asked(pretrained.config, tokenizer, request)


def continuation(
    pretrained: Pretrained, asked: Asked, num_tokens: int | None, sampling: Sampling, seed: int
) -> list[int]:
    """The ids that the model writes, none after the end: at most `num_tokens`; None is 128, or what fits."""
    import jax
    import numpy as np

    from megajax.inference.generate import generate

    model: Any = pretrained.model
    longest, taken = pretrained.config.max_sequence_length, model.prompt_slots(asked.arrays)
    if num_tokens is None:
        num_tokens = LENGTH if longest is None else max(1, min(LENGTH, longest - taken))
    if longest is not None and taken >= longest:
        raise ConfigError(f"--prompt takes {taken} places of max_sequence_length={longest}, all there are; shorten it")
    if longest is not None and taken + num_tokens > longest:
        raise ConfigError(
            f"--num-tokens {num_tokens} after a prompt of {taken} exceeds max_sequence_length={longest}; lower it"
        )
    prompt = {name: jax.numpy.asarray(array) for name, array in asked.arrays.items()}
    key = jax.random.key(seed)
    written = generate(model, pretrained.params, prompt, num_tokens=num_tokens, sampling=sampling, key=key)
    new = np.asarray(written[0]).tolist()
    return new[: new.index(asked.end)] if asked.end in new else new


def _is_checkpoint(source: Path) -> bool:
    """Whether a folder holds megajax's checkpoints, itself or as a run does."""
    return (source / "checkpoints").is_dir() or any(source.glob("step_*"))


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m megajax.generate",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC")
    add("--prompt", action="append", metavar="TEXT", help="may be given several times (for a decoder: end of document)")
    files = "PNG, JPEG or .npy; may be given several times, and then goes with every prompt"
    add("--image", action="append", type=Path, default=[], metavar="FILE", help=files)
    add("--num-tokens", type=int, metavar="N", help=f"at most so many are written ({LENGTH}, or what fits)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token (1)")
    add("--top-k", type=int, default=0, metavar="K", help="of the likeliest K tokens; 0 for all (0)")
    add("--top-p", type=float, default=0.0, metavar="P", help="of the likeliest that P falls to; 0 for all (0)")
    add("--seed", type=int, default=0, metavar="N", help="(0)")
    add("--tokenizer", metavar="NAME", help="byte, null:VOCAB or a path (that of the run, or in the model's folder)")
    add("--json", action="store_true", help="print an object for each prompt: prompt, text, tokens")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
