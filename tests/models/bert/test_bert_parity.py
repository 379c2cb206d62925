"""BERT with others' weights against numbers that Megatron-Core 0.16.1 and transformers 5.23 computed."""

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

from megajax.interop import hf, hf_architecture, megatron
from megajax.interop.pretrained import Pretrained

GOLDEN = Path(__file__).parents[2] / "golden"
NOISE = 5e-7
"""What is left of gradients that are zero, such as that of the bias of keys."""
UNUSED = {"bert_untied": "cls.predictions.bias"}
"""A tensor that transformers saves without ever having read it."""


def from_megatron() -> Pretrained:
    settings = json.loads((GOLDEN / "mcore_bert" / "config.json").read_text())
    tensors = load_file(GOLDEN / "mcore_bert" / "model.safetensors")
    return megatron.load(tensors, "bert", settings["transformer_config"], settings["model_args"])


def _gradients_by_hf_name(pretrained: Pretrained, gradients: Any) -> dict[str, np.ndarray]:
    (architecture,) = [a for _, a in hf.architectures("bert") if a.name == "BertForPreTraining"]
    flat = {"/".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    shapes = hf_architecture.abstract_leaves(pretrained.model, architecture.example_inputs(pretrained.config))
    config: Any = pretrained.config
    plan = hf_architecture.tensor_plan(architecture, config, pretrained.model, shapes, "bert.")
    return {name: tensor.lazy(flat).make() for name, tensor in plan.items()}


@functools.cache
def run(case: str) -> tuple[Any, Any, dict[str, np.ndarray], Any]:
    """(loss, output, gradients by their names there, what is expected)."""
    inputs, theirs = np.load(GOLDEN / case / "inputs.npz"), case == "mcore_bert"
    pretrained = from_megatron() if theirs else hf.load(GOLDEN / case)
    if theirs:
        tokens, labels, order = inputs["tokens"], inputs["lm_labels"], inputs["sentence_order"]
        mask, types, kept = inputs["padding_mask"], inputs["types"], inputs["loss_mask"]
    else:
        tokens, labels, order = inputs["input_ids"], inputs["labels"], inputs["next_sentence_label"]
        mask, types, kept = inputs["attention_mask"], inputs["token_type_ids"], labels != -100
    given = {"attention_mask": mask, "tokentype_ids": types}

    def loss(params: Any) -> Any:
        variables = {"params": params}
        output = pretrained.model.apply(variables, tokens, **given)
        weights = jnp.asarray(kept / kept.sum(), jnp.float32)
        losses: Any = pretrained.model.apply(
            variables, tokens, labels, weights, is_random=order, **given, method="loss_sum"
        )
        return losses.weighted_sum, (output, losses.per_token)

    (value, (output, per_token)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    named = (
        megatron.save(pretrained._replace(params=gradients)) if theirs else _gradients_by_hf_name(pretrained, gradients)
    )
    np.testing.assert_allclose((per_token * kept).sum() / kept.sum(), _lm_loss(output, labels, kept), rtol=1e-5)
    return value, output, named, np.load(GOLDEN / case / "outputs.npz")


def _lm_loss(output: Any, labels: np.ndarray, kept: np.ndarray) -> float:
    logs = jax.nn.log_softmax(output.lm, axis=-1)
    picked = np.take_along_axis(np.asarray(logs), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return float(-(picked * kept).sum() / kept.sum())


@pytest.mark.parametrize("case", ["mcore_bert", "hf_bert"])
def test_output_loss_and_gradients_equal_theirs(case: str) -> None:
    value, output, gradients, expected = run(case)
    theirs = case == "mcore_bert"
    logits, binary = ("lm_logits", "binary_logits") if theirs else ("prediction_logits", "seq_relationship_logits")
    # In Megatron, padding attends to everything; here, as in transformers, to what is no padding.
    rows = np.load(GOLDEN / case / "inputs.npz")["padding_mask"] == 1 if theirs else np.ones((3, 24), bool)
    np.testing.assert_allclose(np.asarray(output.lm)[rows], expected[logits][rows], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(output.binary, expected[binary], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        tolerance = max(1e-4 * np.abs(reference).max(), NOISE)
        np.testing.assert_allclose(gradients[name], reference, atol=tolerance, rtol=0, err_msg=name)
    statistics = np.load(GOLDEN / case / "grad_stats.npz")
    assert sorted(statistics["names"]) == sorted(gradients)
    for name, (norm, _, top, projection) in zip(statistics["names"], statistics["stats"], strict=True):
        g = gradients[str(name)].astype(np.float64)
        measured = (np.linalg.norm(g), np.abs(g).max(), g.ravel() @ np.sin(0.7 * np.arange(g.size) + 0.3))
        tolerance = max(1e-4 * norm, NOISE)
        np.testing.assert_allclose(measured, (norm, top, projection), atol=tolerance, err_msg=str(name))


def test_megatron_weights_round_trip(tmp_path: Path) -> None:
    pretrained, tensors = from_megatron(), load_file(GOLDEN / "mcore_bert" / "model.safetensors")
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    megatron.save_folder(pretrained, tmp_path)
    assert megatron.load_folder(tmp_path, "bert").config == pretrained.config


def _equal_files(saved: Path, source: Path) -> None:
    written, tensors = load_file(saved / "model.safetensors"), load_file(source / "model.safetensors")
    assert sorted(written) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_hf_weights_and_config_round_trip(tmp_path: Path) -> None:
    pretrained = hf.load(GOLDEN / "hf_bert")
    hf.save(pretrained, tmp_path)
    _equal_files(tmp_path, GOLDEN / "hf_bert")
    assert hf.load(tmp_path).config == pretrained.config
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForPreTraining"]


OPTIONS = sorted(path.name for path in (GOLDEN / "hf_encoders").glob("*bert*"))


@pytest.mark.parametrize("name", OPTIONS)
def test_other_classes_and_options_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = GOLDEN / "hf_encoders" / name
    pretrained, expected = hf.load(folder), np.load(folder / "expected.npz")
    output: Any = pretrained.model.apply(
        {"params": pretrained.params},
        expected["input_ids"],
        attention_mask=expected["attention_mask"],
        tokentype_ids=expected["token_type_ids"],
    )
    np.testing.assert_allclose(output.lm, expected["lm"], atol=2e-5, rtol=1e-4)
    if "binary" in expected:
        np.testing.assert_allclose(output.binary, expected["binary"], atol=2e-5, rtol=1e-4)
    hf.save(pretrained, tmp_path)
    named = json.loads((folder / "config.json").read_text())["architectures"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == named
    saved, tensors = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert sorted(saved) == sorted(tensors)
    for key, value in tensors.items():
        if key != UNUSED.get(name):
            np.testing.assert_array_equal(saved[key], value, err_msg=key)
