"""T5 with others' weights against numbers that Megatron-Core 0.16.1 and transformers 5.23 computed."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.inference.generate import Sampling, generate, init_cache
from megajax.inference.layers import apart
from megajax.interop import hf, hf_architecture, megatron
from megajax.interop.pretrained import Pretrained
from megajax.models.t5.t5_config import T5Config
from megajax.models.t5.t5_family import layer_segments
from megajax.models.t5.t5_model import T5Model

GOLDEN = Path(__file__).parents[2] / "golden"
MCORE, HF = "mcore_t5_relative", "hf_t5_v1_0"


def from_megatron() -> Pretrained:
    settings = json.loads((GOLDEN / MCORE / "config.json").read_text())
    tensors = load_file(GOLDEN / MCORE / "model.safetensors")
    return megatron.load(tensors, "t5", settings["transformer_config"], settings["model_args"])


def _gradients_by_hf_name(pretrained: Pretrained, gradients: Any) -> dict[str, np.ndarray]:
    (architecture,) = [a for _, a in hf.architectures("t5") if a.name == "T5ForConditionalGeneration"]
    flat = {"/".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    shapes = hf_architecture.abstract_leaves(pretrained.model, architecture.example_inputs(pretrained.config))
    plan = hf_architecture.tensor_plan(architecture, pretrained.config, pretrained.model, shapes, "")
    return {name: tensor.lazy(flat).make() for name, tensor in plan.items()}


@functools.cache
def run(case: str) -> tuple[Any, Any, Any, dict[str, np.ndarray]]:
    """(loss, encoder's output, logits, gradients by their names there)."""
    inputs, theirs = np.load(GOLDEN / case / "inputs.npz"), case == MCORE
    pretrained = from_megatron() if theirs else hf.load(GOLDEN / case)
    labels = inputs["labels"]
    if theirs:
        text, written, kept = inputs["text_enc"], inputs["text_dec"], inputs["loss_mask"]
        masks = {"encoder_mask": inputs["enc_mask"], "decoder_mask": inputs["dec_mask"]}
    else:
        text, kept, masks = inputs["input_ids"], labels != -100, {"encoder_mask": inputs["attention_mask"]}
        written = np.concatenate([np.zeros((len(labels), 1), np.int64), np.where(kept, labels, 0)[:, :-1]], axis=1)

    def loss(params: Any) -> Any:
        variables, weights = {"params": params}, jnp.asarray(kept / kept.sum(), jnp.float32)
        states = pretrained.model.apply(variables, text, encoder_mask=masks["encoder_mask"])
        logits = pretrained.model.apply(variables, text, written, **masks)
        losses: Any = pretrained.model.apply(variables, text, written, labels, weights, **masks, method="loss_sum")
        return losses.weighted_sum, (states, logits)

    (value, (states, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    named = (
        megatron.save(pretrained._replace(params=gradients)) if theirs else _gradients_by_hf_name(pretrained, gradients)
    )
    return value, states, logits, named


@pytest.mark.parametrize("case", [MCORE, HF])
def test_output_loss_and_gradients_equal_theirs(case: str) -> None:
    value, states, logits, gradients = run(case)
    inputs, expected = np.load(GOLDEN / case / "inputs.npz"), np.load(GOLDEN / case / "outputs.npz")
    if case == MCORE:  # in Megatron, padding attends to everything
        reference, seen, rows = (
            expected["encoder_hidden"].swapaxes(0, 1),
            inputs["enc_mask"] > 0,
            inputs["dec_mask"] > 0,
        )
    else:
        reference = expected["encoder_last_hidden_state"]
        seen, rows = np.ones(reference.shape[:2], bool), np.ones(logits.shape[:2], bool)
    np.testing.assert_allclose(np.asarray(states)[seen], reference[seen], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(logits)[rows], expected["logits"][rows], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        tolerance = 1e-4 * np.abs(reference).max()
        np.testing.assert_allclose(gradients[name], reference, atol=tolerance, rtol=0, err_msg=name)
    statistics = np.load(GOLDEN / case / "grad_stats.npz")
    gradients = {name: g for name, g in gradients.items() if name != "output_layer.bias"}  # its second name
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, _, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64)
        measured = (np.linalg.norm(g), np.abs(g).max(), g.ravel() @ np.sin(0.7 * np.arange(g.size) + 0.3))
        np.testing.assert_allclose(measured, (norm, top, projection), atol=1e-4 * norm, err_msg=str(name))


def test_relative_bias_equals_megatrons() -> None:
    pretrained, expected = from_megatron(), np.load(GOLDEN / MCORE / "outputs.npz")
    bound = pretrained.model.bind({"params": pretrained.params})
    for name, size in (("enc", 30), ("dec", 18)):
        bias = getattr(bound, f"{name}oder_relative_pos_emb")(size, size)
        np.testing.assert_allclose(bias, expected[f"{name}_relative_bias"], atol=1e-6)


def test_megatron_weights_round_trip(tmp_path: Path) -> None:
    pretrained, tensors = from_megatron(), load_file(GOLDEN / MCORE / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, "t5").config == pretrained.config


def _equal_files(saved: Path, source: Path) -> None:
    written, tensors = load_file(saved / "model.safetensors"), load_file(source / "model.safetensors")
    assert sorted(written) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_hf_weights_and_config_round_trip(tmp_path: Path) -> None:
    pretrained = hf.load(GOLDEN / HF)
    hf.save(pretrained, tmp_path)
    _equal_files(tmp_path, GOLDEN / HF)
    assert hf.load(tmp_path).config == pretrained.config


@pytest.mark.parametrize("layers", ["stacked", "apart"])
def test_greedy_writing_equals_transformers(layers: str) -> None:
    pretrained, expected = hf.load(GOLDEN / HF), np.load(GOLDEN / HF / "generate.npz")
    sequences: Any = expected["sequences"]
    params = pretrained.params if layers == "stacked" else apart(pretrained.params, layer_segments(pretrained.model))
    prompt = {
        "encoder_input": expected["in_input_ids"],
        "encoder_mask": expected["in_attention_mask"],
        "decoder_input": sequences[:, :1],
    }
    length, greedy = sequences.shape[1] - 1, Sampling(temperature=0)
    written = generate(pretrained.model, params, prompt, num_tokens=length, sampling=greedy)
    np.testing.assert_array_equal(written, sequences[:, 1:])


@pytest.mark.parametrize("positions", ["relative", "rope", "learned_absolute"])
def test_cached_steps_equal_the_full_pass(positions: Any) -> None:
    config = T5Config(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=31, max_sequence_length=12,
        position_embedding_type=positions, init_method_std=0.3, relative_attention_num_buckets=4,
        relative_attention_max_distance=4,
    )  # fmt: skip
    model, random = T5Model(config), np.random.default_rng(0)
    text, written = random.integers(1, 31, (2, 9)), random.integers(1, 31, (2, 7))
    seen = np.ones(text.shape, bool)
    seen[1, 5:] = False
    params: Any = model.init(jax.random.key(0), text, written)["params"]
    full = model.apply({"params": params}, text, written, encoder_mask=seen)
    prompt: Any = {"encoder_input": text, "encoder_mask": seen, "decoder_input": written[:, :3]}
    cache = init_cache(model, params, prompt, length=8)
    apply = jax.jit(functools.partial(model.apply, mutable=["cache"]), static_argnames="method")
    logits, updated = apply({"params": params, "cache": cache}, prompt, method="read")
    rows = [logits]
    for position in range(3, 7):
        variables = {"params": params, "cache": updated["cache"]}
        logits, updated = apply(variables, written[:, position], position, method="read_on")
        rows.append(logits)
    np.testing.assert_allclose(np.stack(rows, axis=1), full[:, 2:], atol=2e-5, rtol=1e-4)  # pyright: ignore


OPTIONS = sorted(path.name for path in (GOLDEN / "hf_encoders").glob("t5*"))


@pytest.mark.parametrize("name", OPTIONS)
def test_other_classes_and_options_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = GOLDEN / "hf_encoders" / name
    pretrained, expected = hf.load(folder), np.load(folder / "expected.npz")
    written = [expected["decoder_input_ids"]] if "decoder_input_ids" in expected else []
    output = pretrained.model.apply(
        {"params": pretrained.params}, expected["input_ids"], *written, encoder_mask=expected["attention_mask"]
    )
    np.testing.assert_allclose(output, expected["lm"], atol=2e-5, rtol=1e-4)  # pyright: ignore
    hf.save(pretrained, tmp_path)
    _equal_files(tmp_path, folder)
    assert hf.load(tmp_path).config == pretrained.config
    named = json.loads((folder / "config.json").read_text())["architectures"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == named


def test_an_output_layer_of_its_own_is_found_whatever_config_json_says() -> None:
    pretrained = hf.load(GOLDEN / "hf_encoders" / "t5_v1_1_untied")
    assert json.loads((GOLDEN / "hf_encoders" / "t5_v1_1_untied" / "config.json").read_text())["tie_word_embeddings"]
    assert not pretrained.config.share_embeddings_and_output_weights
