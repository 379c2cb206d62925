"""Towers, and pairs of them, in Hugging Face's format: what transformers computes, megajax computes and saves again."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from megajax.config import ConfigError
from megajax.interop import hf, megatron

GOLDEN = Path(__file__).parents[2] / "golden"
OPTIONS = sorted(f"hf_vision/{folder.name}" for folder in (GOLDEN / "hf_vision").iterdir() if folder.is_dir())
CASES = ["hf_clip_vision", "hf_radio", *OPTIONS]


@functools.cache
def loaded(case: str) -> Any:
    return hf.load(GOLDEN / case)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", OPTIONS)
def test_equals_transformers(case: str) -> None:
    pretrained, given = loaded(case), dict(np.load(GOLDEN / case / "expected.npz"))
    call = functools.partial(pretrained.model.apply, {"params": pretrained.params})
    if "logits_per_image" in given:
        masks = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        output = call(given["pixel_values"], given["input_ids"], **masks)
        for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            close(getattr(output, name), given[name])
    elif "labels" in given:
        close(call(given["pixel_values"]), given["logits"])
        close(call(given["pixel_values"], labels=given["labels"]).mean(), given["loss"])
    elif "logits" in given:
        close(call(given["pixel_values"], given["input_ids"]), given["logits"])
    else:
        masks = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        call = functools.partial(call, given.get("pixel_values", given.get("input_ids")), **masks)
        close(call(), given["last_hidden_state"])
        for name in {"summary", "pooler_output", "image_embeds", "text_embeds"} & set(given):
            close(call(pooled=True), given[name])


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    pretrained = loaded(case)
    hf.save(pretrained, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / case, tmp_path))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    assert hf.load(tmp_path).config == pretrained.config


@pytest.mark.parametrize("case", ["hf_clip_vision", "hf_radio"])
def test_output_and_gradients(case: str, tmp_path: Path) -> None:
    pretrained = loaded(case)
    inputs, expected = (np.load(GOLDEN / case / f"{name}.npz") for name in ("inputs", "outputs"))

    def loss(params: Any) -> Any:
        output = pretrained.model.apply({"params": params}, inputs["pixel_values"])
        return jnp.mean(output * inputs["cotangent"]), output

    (value, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pretrained.params)
    close(output, expected["last_hidden_state"])
    pooled = pretrained.model.apply({"params": pretrained.params}, inputs["pixel_values"], pooled=True)
    close(pooled, expected["pooler_output" if "pooler_output" in expected else "summary"])
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    hf.save(pretrained._replace(params=gradients), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    for name, reference in load_file(GOLDEN / case / "grads.safetensors").items():
        atol = 1e-4 * np.abs(reference).max() + 1e-8
        np.testing.assert_allclose(ours[name], reference, rtol=0, atol=atol, err_msg=name)


def test_radio_at_its_full_size() -> None:
    folder, pretrained = GOLDEN / "hf_radio", loaded("hf_radio")
    images = np.load(folder / "inputs_full_64x64.npz")["pixel_values"]
    expected = np.load(folder / "outputs_full_64x64.npz")["last_hidden_state"]
    close(pretrained.model.apply({"params": pretrained.params}, images), expected)


@pytest.mark.parametrize("size", ["1x1", "1x2", "2x1", "3x5", "5x3", "4x4"])
def test_radio_at_any_size(size: str) -> None:
    pretrained = loaded("hf_vision/radio_swiglu")
    expected = np.load(GOLDEN / "hf_vision/radio_swiglu/sizes.npz")
    call = functools.partial(pretrained.model.apply, {"params": pretrained.params}, expected[f"images_{size}"])
    close(call(), expected[f"states_{size}"])
    close(call(pooled=True), expected[f"summary_{size}"])


def test_llava_writes_what_transformers_writes() -> None:
    """Images and question into a cache, then one token at a time, without images."""
    folder, pretrained = GOLDEN / "hf_vision/llava_several_layers", loaded("hf_vision/llava_several_layers")
    given, expected = np.load(folder / "expected.npz"), np.load(folder / "generate.npz")["sequences"]
    images, tokens = given["pixel_values"], given["input_ids"]
    length = tokens.shape[1] + expected.shape[1]
    init = functools.partial(pretrained.model.init, jax.random.key(0), images, cache_position=0)
    cache = nn.unbox(jax.jit(init)(jnp.zeros((len(tokens), length), jnp.int32))["cache"])
    written, position = [], 0
    for _ in range(expected.shape[1]):
        variables = {"params": pretrained.params, "cache": cache}
        logits, updated = pretrained.model.apply(variables, images, tokens, cache_position=position, mutable=["cache"])
        images, cache, position = None, updated["cache"], position + tokens.shape[1]
        tokens = np.asarray(logits)[:, -1:].argmax(axis=-1)
        written.append(tokens)
    np.testing.assert_array_equal(np.concatenate(written, axis=1), expected)


def test_names_of_older_files(tmp_path: Path) -> None:
    """Published towers have the prefix of the pair that they were a part of."""
    (tmp_path / "config.json").write_text((GOLDEN / "hf_clip_vision" / "config.json").read_text())
    tensors = load_file(GOLDEN / "hf_clip_vision" / "model.safetensors")
    save_file({f"vision_model.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    ours, theirs = (jax.tree.leaves(pretrained.params) for pretrained in (hf.load(tmp_path), loaded("hf_clip_vision")))
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_images_of_the_size_that_the_checkpoint_names() -> None:
    """Of its 14 pixels, three patches of 4 cover 12: like the processor's, its images have all 14."""
    cropped, whole = (loaded(f"hf_vision/{case}").config for case in ("siglip_vision_cropped", "siglip_vision"))
    assert (cropped.img_h, cropped.num_patches, cropped.crop_to_patches) == (14, 9, True)
    assert (whole.img_h, whole.num_patches, whole.crop_to_patches) == (12, 9, False)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("siglip_vision_cropped", "num_channels=1"),
        ("clip_vision_projected", "projection_dim=7"),
        ("clip", "text_num_layers=2"),
        ("clip_text", "text_num_layers=2"),
        ("vit_classifier", "num_classes=5"),
    ],
)
def test_what_megatron_lacks(case: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        megatron.save_folder(loaded(f"hf_vision/{case}"), tmp_path)


def _llava_with(folder: Path, tensors: dict[str, np.ndarray], *, tied: bool, text_tied: bool) -> Any:
    values = json.loads((GOLDEN / "hf_vision/llava_siglip_qwen/config.json").read_text())
    text = values["text_config"] | {"tie_word_embeddings": text_tied}
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": tied, "text_config": text}))
    save_file(tensors, folder / "model.safetensors")
    return hf.load(folder)


@pytest.mark.parametrize(("tied", "text_tied"), [(True, True), (True, False), (False, True)])
def test_tied_words_of_llava(tied: bool, text_tied: bool, tmp_path: Path) -> None:
    """config.json may say it in two places; a head in the file settles it, and without one it has to be said."""
    case = GOLDEN / "hf_vision/llava_siglip_qwen"
    given, tensors = np.load(case / "expected.npz"), load_file(case / "model.safetensors")
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    own = _llava_with(tmp_path, tensors, tied=tied, text_tied=text_tied)
    assert not own.config.share_embeddings_and_output_weights
    repeated = _llava_with(tmp_path, tensors | {head: tensors[words]}, tied=False, text_tied=False)
    headless = {name: tensor for name, tensor in tensors.items() if name != head}
    ours = _llava_with(tmp_path, headless, tied=tied, text_tied=text_tied)
    got, expected = (
        it.model.apply({"params": it.params}, given["pixel_values"], given["input_ids"]) for it in (ours, repeated)
    )
    close(got, expected)
    hf.save(ours, tmp_path / "saved")
    assert set(load_file(tmp_path / "saved/model.safetensors")) == set(headless)
    with pytest.raises(ConfigError, match=f"lacks {head}"):
        _llava_with(tmp_path, headless, tied=False, text_tied=False)
