"""`python -m megajax.generate`: greedy text equals transformers', also of texts that are read and of images that are
seen; runs, checkpoints and models are read; mistakes."""

# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megajax import convert, generate
from megajax.config import ConfigError
from megajax.data.tokenizers import build_tokenizer
from megajax.inference.generate import Sampling
from megajax.models.request import Request

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
    tokenizer = build_tokenizer("null:96")
    asked = generate.ask(pretrained, tokenizer, Request(prompts[0], tokenizer.tokenize))
    assert generate.continuation(pretrained, asked, 16, Sampling(temperature=0), seed=0) == expected[0]


def words(folder: Path, named: dict[str, int], size: int, around: str | None = None) -> str:
    """A tokenizer.json whose words are those with names, and the numbers of all other ids. around: of its template."""
    vocabulary = {str(i): i for i in range(size) if i not in named.values()} | named
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(named))
    if around is not None:
        tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=list(named.items()))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def printed(capsys: Any, *argv: str) -> dict[str, Any]:
    generate.main([*argv, "--temperature", "0", "--json"])
    return json.loads(capsys.readouterr().out)


def test_what_is_written_about_a_text_is_what_transformers_writes(golden, tmp_path, capsys):
    folder, case = golden / "hf_t5_v1_0", np.load(golden / "hf_t5_v1_0" / "generate.npz")
    text, sentinel = case["in_input_ids"][1].tolist(), case["sequences"][1, 1]
    named = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_0>": int(sentinel)}
    names = {i: name for name, i in named.items()}
    length = case["sequences"].shape[1] - 1
    prompt = " ".join(names.get(i, str(i)) for i in text)
    arguments = ("--tokenizer", words(tmp_path, named, 96), "--prompt", prompt, "--num-tokens", str(length))
    row = printed(capsys, str(folder), *arguments)
    assert row["tokens"] == case["sequences"][1, 1:].tolist()
    assert row["text"] == "<extra_id_0>" + " ".join(map(str, row["tokens"][1:]))
    # What the template of a published tokenizer puts behind the text is read, too; here, the text's last id.
    named["</s>"] = text[-1]
    names = {i: name for name, i in named.items()}
    prompt = " ".join(names.get(i, str(i)) for i in text[:-1])
    arguments = ("--tokenizer", words(tmp_path, named, 96, "$A </s>"), "--prompt", prompt, "--num-tokens", str(length))
    assert printed(capsys, str(folder), *arguments)["tokens"] == row["tokens"]


@pytest.mark.parametrize("named", [False, True])
def test_what_is_said_of_an_image_is_what_transformers_says(named, golden, tmp_path, capsys):
    """Image first, or last; the tokenizer knows <image>, or not."""
    folder, index = golden / "hf_vision/llava_several_layers", 39
    given, expected = np.load(folder / "expected.npz"), np.load(folder / "generate.npz")["sequences"]
    row = 2 if named else 1
    np.save(tmp_path / "image.npy", given["pixel_values"][row])
    said = [str(i) for i in given["input_ids"][row] if i != index]
    prompt = " ".join([*said, "<image>"]) if named else " ".join(said)  # in front, where nobody says where
    tokenizer = words(tmp_path, {"<unk>": 0, "</s>": 1, "<image>": index}, 40) if named else "null:40"
    arguments = ("--tokenizer", tokenizer, "--prompt", prompt, "--num-tokens", "7")
    got = printed(capsys, str(folder), *arguments, "--image", str(tmp_path / "image.npy"))
    assert got["tokens"] == expected[row].tolist()
    new = [str(i) for i in got["tokens"]]
    shown = [" ".join(said), " ".join(new)] if named else ["", " ".join([*said, *new])]
    assert [piece.strip() for piece in got["text"].split("<image>")] == shown


def test_a_seed_is_a_sample(golden, capsys):
    def sample(seed: int) -> str:
        generate.main([str(golden / "hf_llama"), "--tokenizer", "null:96", "--prompt", "5", "--seed", str(seed)])
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


def test_mistakes_are_one_line(golden, tmp_path):
    llama, llava = str(golden / "hf_llama"), str(golden / "hf_vision/llava_several_layers")
    shutil.copytree(golden / "hf_t5_v1_0", tmp_path / "t5")
    words(tmp_path / "t5", {"<pad>": 0, "</s>": 1, "<unk>": 2}, 96)
    image = np.zeros((12, 12, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", image)
    np.save(tmp_path / "image.npy", image.transpose(2, 0, 1).astype(np.float32))
    asked = [llava, "--tokenizer", "null:40", "--prompt", "5", "--image"]
    convert.main(["--from", "hf", llama, "--to", "megajax", str(tmp_path / "mj")])
    cases = [
        ([str(tmp_path / "none")], "there is no such folder"),
        ([llama], "is a folder without tokenizer"),
        ([str(tmp_path / "mj")], "give --tokenizer"),
        ([llama, *GREEDY, "--num-tokens", "0"], "--num-tokens 0: must be at least 1"),
        ([llama, *GREEDY, "--prompt", "96"], "reads ids below 96"),
        ([llama, *GREEDY, "--temperature", "-1"], "temperature=-1.0 must not be negative"),
        ([str(golden / "hf_bert"), *GREEDY], "writes no text; give one of gpt, t5, mamba, llava"),
        ([str(golden / "hf_gpt2"), *GREEDY, "--num-tokens", "100000"], "exceeds max_sequence_length="),
        ([str(golden / "hf_gpt2"), *GREEDY, "--prompt", "5 " * 5000], "all there are; shorten it"),
        ([llama, *GREEDY, "--image", str(tmp_path / "image.npy")], "--image: this model reads no images; drop it"),
        ([llama, *GREEDY, "--image", str(tmp_path / "pixels.npy")], "--image: this model reads no images; drop it"),
        ([str(tmp_path / "t5"), "--prompt", ""], "--prompt: has 0 tokens; the model reads 1 to any number"),
        ([str(tmp_path / "t5"), "--prompt", "5 <extra_id_700>"], "names <extra_id_700>; the model has 100 such spans"),
        ([llava, "--tokenizer", "null:40", "--prompt", "5"], "--image is missing"),
        ([*asked, str(tmp_path / "none.png")], "there is no such file"),
        ([*asked, str(tmp_path / "pixels.npy")], "has no preprocessor_config.json"),
        ([*asked, str(tmp_path / "image.npy"), "--prompt", "<image> <image>"], "names 2 images, and --image gives 1"),
        ([llama, "--nonsense"], "unrecognized arguments: --nonsense; see --help"),
    ]
    for argv, message in cases:
        with pytest.raises(ConfigError) as caught:
            generate.main(argv)
        assert message in str(caught.value), argv
        assert "\n" not in str(caught.value)
