"""BERT and T5 with other options of Megatron's, against numbers that Megatron-Core 0.16.1 computed; and properties."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.models.registry import FAMILIES

FOLDER = Path(__file__).parents[1] / "golden" / "mcore_encoders"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> tuple[Pretrained, Any, dict[str, np.ndarray]]:
    """(model, inputs and outputs, Megatron's tensors)."""
    settings, arrays = json.loads((FOLDER / f"{name}.json").read_text()), np.load(FOLDER / f"{name}.npz")
    tensors = {key.removeprefix("model/"): arrays[key] for key in arrays.files if key.startswith("model/")}
    family = name.split("_")[0]
    return megatron.load(tensors, family, settings["transformer_config"], settings["model_args"]), arrays, tensors


def call(pretrained: Pretrained, arrays: Any, **changes: Any) -> Any:
    given = {key: arrays[key] for key in arrays.files} | changes
    variables = {"params": pretrained.params}
    if pretrained.family == "bert":
        types = {"tokentype_ids": given["types"]} if pretrained.config.num_tokentypes else {}  # type: ignore[attr-defined]
        return pretrained.model.apply(variables, given["tokens"], attention_mask=given["mask"], **types)
    return pretrained.model.apply(variables, given["tokens"], given["written"], encoder_mask=given["mask"])


@pytest.mark.parametrize("name", CASES)
def test_output_and_weights_equal_megatrons(name: str) -> None:
    pretrained, arrays, tensors = load(name)
    output = call(pretrained, arrays)
    if pretrained.family == "bert":
        rows = arrays["mask"] > 0
        np.testing.assert_allclose(np.asarray(output.lm)[rows], arrays["lm"][rows], atol=5e-5, rtol=1e-4)
        assert (output.binary is None) == ("binary" not in arrays)
        if "binary" in arrays:
            np.testing.assert_allclose(output.binary, arrays["binary"], atol=2e-5, rtol=1e-4)
    else:
        np.testing.assert_allclose(output, arrays["lm"], atol=5e-5, rtol=1e-4)
    saved = megatron.save(pretrained)
    assert sorted(saved) == sorted(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    record = FAMILIES[pretrained.family].megatron
    assert record is not None
    assert (
        megatron.load(tensors, pretrained.family, *record().write_config(pretrained.config)).config == pretrained.config
    )


@pytest.mark.parametrize("name", CASES)
def test_hidden_tokens_change_nothing(name: str) -> None:
    pretrained, arrays, _ = load(name)
    hidden = arrays["mask"] == 0
    others = np.where(hidden, (arrays["tokens"] + 7) % 50, arrays["tokens"])
    outputs = [call(pretrained, arrays, tokens=tokens) for tokens in (arrays["tokens"], others)]
    a, b = (np.asarray(o.lm if pretrained.family == "bert" else o) for o in outputs)
    rows = ~hidden if pretrained.family == "bert" else np.ones(a.shape[:2], bool)
    np.testing.assert_array_equal(a[rows], b[rows])


def test_decoder_sees_no_later_token_and_encoder_sees_all() -> None:
    pretrained, arrays, _ = load("t5_rope")
    base = np.asarray(call(pretrained, arrays))
    later = arrays["written"].copy()
    later[:, 4] = (later[:, 4] + 1) % 50
    changed = np.abs(np.asarray(call(pretrained, arrays, written=later)) - base).max(axis=-1) > 0
    assert not changed[:, :4].any()
    assert changed[:, 4:].all()
    text = arrays["tokens"].copy()
    text[:, 8] = (text[:, 8] + 1) % 50
    assert (np.abs(np.asarray(call(pretrained, arrays, tokens=text)) - base).max(axis=-1) > 0).all()


def test_mean_of_inner_tokens_is_megatrons_embedding() -> None:
    pretrained, arrays, _ = load("bert_untied")
    given = {"attention_mask": arrays["mask"], "tokentype_ids": arrays["types"]}
    variables = {"params": pretrained.params}
    states: Any = pretrained.model.apply(variables, arrays["tokens"], **given, method="hidden_states")
    found = pretrained.model.apply(variables, arrays["tokens"], **given, method="embed_texts")
    lengths = arrays["mask"].sum(axis=1)
    wanted = jnp.stack([states[i, 1 : length - 1].mean(axis=0) for i, length in enumerate(lengths)])
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert_untied", "t5_learned"])
def test_dropout_is_drawn_in_training_alone(name: str) -> None:
    pretrained, arrays, _ = load(name)
    model: Any = pretrained.model.clone(config=pretrained.config.replace(hidden_dropout=0.5))
    second = [arrays["written"]] if pretrained.family == "t5" else []
    arguments = ({"params": pretrained.params}, arrays["tokens"], *second)
    quiet, loud = (
        jax.tree.leaves(model.apply(*arguments, deterministic=quiet, rngs={"dropout": jax.random.key(0)}))[0]
        for quiet in (True, False)
    )
    assert np.abs(quiet - loud).max() > 0.1
