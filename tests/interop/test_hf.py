"""Hugging Face checkpoints: what transformers computes, megajax computes; what megajax saves is what was loaded."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
import pathlib
import shutil
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megajax.interop import hf
from megajax.interop.pretrained import Pretrained

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ORACLES = [
    "hf_gpt2",
    "hf_llama",
    "hf_llama3_rope",
    "hf_qwen3",
    "hf_mixtral",
    "hf_deepseek_v3",
    "hf_gpt_oss",
    "hf_mamba2",
    "hf_nemotron_h",
]
OPTIONS = sorted(f"hf_options/{folder.name}" for folder in (GOLDEN / "hf_options").iterdir() if folder.is_dir())


@functools.cache
def loaded(case: str) -> Pretrained:
    return hf.load(GOLDEN / case)


def arrays(case: str, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / case / name))


def logits_of(pretrained: Pretrained, tokens: np.ndarray, **inputs) -> np.ndarray:
    call = jax.jit(lambda params: pretrained.model.apply({"params": params}, tokens, **inputs))
    return np.asarray(call(pretrained.params))


def assert_close(got, expected) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


# Mixtral's loss has one balancing term over all layers at once in it; Megatron's, and so ours, is one a layer.
@pytest.mark.parametrize("case", [case for case in ORACLES if case != "hf_mixtral"])
def test_loss_and_gradients(case, tmp_path):
    pretrained = loaded(case)
    inputs, outputs = arrays(case, "inputs.npz"), arrays(case, "outputs.npz")
    labels = np.roll(inputs["labels"], -1, axis=1)
    kept = (labels >= 0) & (np.arange(labels.shape[1]) < labels.shape[1] - 1)

    def mean_loss(params):
        losses = pretrained.model.apply({"params": params}, inputs["input_ids"], labels=np.maximum(labels, 0))
        return jnp.sum(losses * kept) / kept.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(pretrained.params)
    np.testing.assert_allclose(loss, outputs["loss"], atol=1e-5)
    # Gradients take the same road as parameters, so saving them puts them into Hugging Face's layout.
    hf.save(pretrained._replace(params=grads), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    for name, expected in load_file(GOLDEN / case / "grads.safetensors").items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    stats = arrays(case, "grad_stats.npz")
    ours = {name: gradient for name, gradient in ours.items() if "e_score_correction_bias" not in name}  # a buffer
    assert set(stats["names"]) == set(ours)
    for name, (norm, total, largest, projection) in zip(stats["names"], stats["stats"], strict=True):
        gradient = ours[name].astype(np.float64).ravel()
        measured = (
            np.linalg.norm(gradient),
            gradient.sum(),
            np.abs(gradient).max(),
            gradient @ np.sin(0.7 * np.arange(gradient.size) + 0.3),
        )
        # A sum of n numbers may be off by sqrt(n) times what each of them is.
        slack = 1e-4 * norm * np.array([1, gradient.size**0.5, 1, 1])
        assert np.all(np.abs(np.subtract(measured, (norm, total, largest, projection))) <= slack), name


@pytest.mark.parametrize("case", [case for case in OPTIONS if "loss" in np.load(GOLDEN / case / "expected.npz").files])
def test_loss_and_gradients_of_options(case, tmp_path):
    pretrained, expected = loaded(case), arrays(case, "expected.npz")
    tokens = expected["input_ids"]

    def mean_loss(params):
        losses: Any = pretrained.model.apply({"params": params}, tokens, labels=np.roll(tokens, -1, axis=1))
        return jnp.mean(losses[:, :-1])

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(pretrained.params)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    hf.save(pretrained._replace(params=grads), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    assert set(expected["gradient_names"]) == {name for name in ours if "e_score_correction_bias" not in name}
    for name, (norm, projection) in zip(expected["gradient_names"], expected["gradients"], strict=True):
        gradient = ours[name].astype(np.float64).ravel()
        measured = np.linalg.norm(gradient), gradient @ np.sin(0.7 * np.arange(gradient.size) + 0.3)
        np.testing.assert_allclose(measured, (norm, projection), rtol=0, atol=1e-4 * norm + 1e-8, err_msg=name)


@pytest.mark.parametrize("case", ORACLES)
def test_cached_decoding(case):
    pretrained, run = loaded(case), arrays(case, "generate.npz")
    sequences, start = run["sequences"], run["in_input_ids"].shape[1]
    init = functools.partial(pretrained.model.init, cache_position=0)
    cache = jax.jit(lambda: init(jax.random.key(0), jnp.zeros(sequences.shape, jnp.int32)))()["cache"]

    @jax.jit
    def step(cache, tokens, position):
        variables = {"params": pretrained.params, "cache": cache}
        logits, updated = pretrained.model.apply(variables, tokens, cache_position=position, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    logits, cache = step(cache, sequences[:, :start], 0)
    steps = [logits]
    for i in range(start, sequences.shape[1] - 1):
        logits, cache = step(cache, sequences[:, i : i + 1], i)
        steps.append(logits)
    assert_close(np.stack(steps, axis=1), run["step_logits"])


@pytest.mark.parametrize("name", ["mamba2_bias_limit", "bamba_bias", "nemotron_h_experts", "zamba2_two_blocks"])
def test_padding_in_front_of_a_hybrid(name):
    """Where transformers pads, the biases of projections leak into the text; so this is its text without padding."""
    expected = arrays(f"hf_options/{name}", "expected.npz")
    tokens, front = expected["input_ids"], np.random.default_rng(3).integers(3, 32, size=(2, 6))
    padded = np.concatenate([front, tokens], axis=1)
    mask = np.broadcast_to(np.arange(padded.shape[1]) >= 6, padded.shape)
    logits = logits_of(loaded(f"hf_options/{name}"), padded, attention_mask=mask)
    assert_close(logits[:, 6:], expected["logits"])


@pytest.mark.parametrize(("case", "side"), [("hf_gpt2", "right"), ("hf_llama", "left")])
def test_padding(case, side):
    inputs, outputs = arrays(case, f"inputs_{side}pad.npz"), arrays(case, f"outputs_{side}pad.npz")
    mask = inputs["attention_mask"].astype(bool)
    logits = logits_of(loaded(case), inputs["input_ids"], attention_mask=mask, position_ids=inputs.get("position_ids"))
    assert_close(logits[mask], outputs["logits"][mask])


def test_packed_documents():
    packed = arrays("hf_llama", "packed.npz")
    segments = np.searchsorted(packed["cu_seqlens"], np.arange(40), side="right")
    segments = np.broadcast_to(segments, packed["input_ids"].shape)
    logits = logits_of(loaded("hf_llama"), packed["input_ids"], segment_ids=segments)
    assert_close(logits, packed["logits"])


@pytest.mark.parametrize("case", ORACLES + OPTIONS)
def test_logits(case):
    pretrained = loaded(case)
    expected = arrays(case, "expected.npz" if case in OPTIONS else "outputs.npz")
    tokens = expected["input_ids"] if case in OPTIONS else arrays(case, "inputs.npz")["input_ids"]
    method = "hidden_states" if case.endswith("_base") else None
    assert_close(logits_of(pretrained, tokens, method=method), expected["logits"])


@pytest.mark.parametrize("case", ORACLES + OPTIONS)
def test_round_trip(case, tmp_path):
    pretrained = loaded(case)
    hf.save(pretrained, tmp_path)
    prefix = {"hf_options/gpt2_base": "transformer.", "hf_options/llama_base": "model."}.get(case, "")
    before, after = tensors_of(GOLDEN / case), load_file(tmp_path / "model.safetensors")
    assert {prefix + name for name in before} == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[prefix + name].dtype
        np.testing.assert_array_equal(tensor, after[prefix + name], err_msg=name)
    assert hf.load(tmp_path).config == pretrained.config
    source, written = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / case, tmp_path))
    if not prefix:
        assert written["architectures"] == source["architectures"]


@pytest.fixture
def llama(tmp_path):
    """A copy of a checkpoint that a test may change."""
    folder = tmp_path / "llama"
    shutil.copytree(GOLDEN / "hf_llama", folder, ignore=shutil.ignore_patterns("*.npz", "grads*"))
    return folder


def edit(folder: pathlib.Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_padded_vocabulary(llama, tmp_path):
    pretrained = hf.load(llama, make_vocab_size_divisible_by=40)
    table = pretrained.params["embedding"]["word_embeddings"]["embedding"]
    assert table.shape[0] == 120
    assert pretrained.params["output_layer"]["kernel"].shape[1] == 120
    assert not table[96:].any()
    inputs, outputs = arrays("hf_llama", "inputs.npz"), arrays("hf_llama", "outputs.npz")
    assert_close(logits_of(pretrained, inputs["input_ids"]), outputs["logits"])
    hf.save(pretrained, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (96, 32)


def test_layers_keep_their_place_in_patterns():
    # Layers 0, 2 and 1, 3 are two stacks; a mix-up of their rows is what this looks for.
    params = loaded("hf_options/qwen3_window").params["decoder"]
    file = load_file(GOLDEN / "hf_options/qwen3_window/model.safetensors")
    for layer, (stack, row) in enumerate([("layers_0", 0), ("layers_1", 0), ("layers_0", 1), ("layers_1", 1)]):
        kernel = params[stack]["mlp"]["linear_fc2"]["kernel"][row]
        np.testing.assert_array_equal(kernel.T, file[f"model.layers.{layer}.mlp.down_proj.weight"])


def test_like_carries_the_tokenizer_over(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    hf.save(hf.load(llama), tmp_path / "out", like=llama)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == (2, 0)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_names_of_the_published_gpt2(tmp_path):
    # It has no "transformer." in front, carries its causal masks, and here a copy of the tied head too.
    tensors = load_file(GOLDEN / "hf_gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)), "h.1.attn.masked_bias": np.float32(-1e4)}
    old |= {"lm_head.weight": old["wte.weight"]}
    save_file({name: np.asarray(tensor) for name, tensor in old.items()}, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "hf_gpt2" / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path).params, loaded("hf_gpt2").params)


def test_reading_holds_one_tensor_beside_the_result(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.zeros((50_000, 32), np.float32)
    save_file(tensors, llama / "model.safetensors")
    edit(llama, vocab_size=50_000)
    del tensors
    hf.load(llama)  # what JAX allocates on its first trace is not counted
    tracemalloc.start()
    result = hf.load(llama)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result.params))
    assert peak < size + 1.2 * 50_000 * 32 * 4
