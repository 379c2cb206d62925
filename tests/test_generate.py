"""`python -m megajax.generate`: greedy text equals transformers'; runs, checkpoints and models are read; mistakes."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest

from megajax import convert, generate
from megajax.config import ConfigError
from megajax.data.tokenizers import build_tokenizer
from megajax.inference.generate import Sampling

GREEDY = ["--temperature", "0", "--tokenizer", "null:96", "--num-tokens", "16", "--json"]


def wanted(golden: Path) -> tuple[list[str], list[list[int]]]:
    """(prompts, what transformers continues them with greedily)."""
    case = np.load(golden / "hf_llama" / "generate.npz")
    length = case["in_input_ids"].shape[1]
    whole = case["in_attention_mask"].all(axis=1)  # a prompt with padding on its left is another test's
    prompts = [" ".join(map(str, row)) for row in case["in_input_ids"][whole]]
    return prompts, case["sequences"][whole][:, length:].tolist()


@pytest.mark.parametrize("source", ["hf", "checkpoints"])
def test_greedy_text_is_that_of_transformers(source, golden, tmp_path, capsys):
    folder = golden / "hf_llama"
    if source == "checkpoints":
        convert.main(["--from", "hf", str(folder), "--to", "megajax", str(tmp_path / "mj")])
        folder = tmp_path / "mj"
    prompts, expected = wanted(golden)
    assert prompts
    generate.main([str(folder), *GREEDY, *(word for prompt in prompts for word in ("--prompt", prompt))])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"] for row in rows] == expected
    assert [row["prompt"] for row in rows] == prompts
    assert rows[0]["text"] == f"{prompts[0]} {' '.join(map(str, expected[0]))}"


def test_a_gpu_writes_with_the_layers_apart(golden):
    """Greedy text of transformers again."""
    pretrained = generate.on_device(generate.read(golden / "hf_llama"), "gpu")
    layers = pretrained.params["decoder"]["layers"]
    assert isinstance(layers, tuple) and len(layers) == pretrained.config.num_layers
    prompts, expected = wanted(golden)
    tokenizer, ids = build_tokenizer("null:96"), [int(word) for word in prompts[0].split()]
    assert generate.continuation(pretrained, tokenizer, ids, 16, Sampling(temperature=0), seed=0) == expected[0]


def test_a_seed_is_a_sample(golden, capsys):
    def sample(seed: int) -> str:
        generate.main([str(golden / "hf_llama"), "--tokenizer", "null:96", "--prompt", "5", "--seed", str(seed)])
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


def test_mistakes_are_one_line(golden, tmp_path):
    llama = str(golden / "hf_llama")
    convert.main(["--from", "hf", llama, "--to", "megajax", str(tmp_path / "mj")])
    cases = [
        ([str(tmp_path / "none")], "there is no such folder"),
        ([llama], "is a folder without tokenizer"),
        ([str(tmp_path / "mj")], "give --tokenizer"),
        ([llama, *GREEDY, "--num-tokens", "0"], "--num-tokens 0: must be at least 1"),
        ([llama, *GREEDY, "--prompt", "96"], "reads ids below 96"),
        ([llama, *GREEDY, "--temperature", "-1"], "temperature=-1.0 must not be negative"),
        ([str(golden / "hf_bert"), *GREEDY], "continues no text; give one of gpt, mamba"),
        ([str(golden / "hf_gpt2"), *GREEDY, "--num-tokens", "100000"], "exceeds max_sequence_length="),
        ([llama, "--nonsense"], "unrecognized arguments: --nonsense; see --help"),
    ]
    for argv, message in cases:
        with pytest.raises(ConfigError) as caught:
            generate.main(argv)
        assert message in str(caught.value), argv
        assert "\n" not in str(caught.value)
