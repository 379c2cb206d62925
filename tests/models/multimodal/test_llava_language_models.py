"""LLaVA with other language models than a plain GPT: hybrids and experts, against its parts applied one by one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax import train
from megajax.backends import LocalSpecProvider
from megajax.config import Config, ConfigError, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megajax.data.tokenizers import build_tokenizer
from megajax.interop import megatron
from megajax.interop.pretrained import Pretrained
from megajax.models.multimodal.llava_config import LLaVAConfig, language_arguments
from megajax.models.multimodal.llava_model import LLaVAModel
from megajax.models.registry import FAMILIES
from megajax.training.setup import build_program, fit_config, on_mesh, place_batch

VOCAB, IMAGE = 60, -200
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": VOCAB,
    "init_method_std": 0.3,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "img_h": 8,
    "img_w": 8,
    "patch_dim": 4,
    "vision_num_layers": 1,
    "vision_hidden_size": 16,
    "vision_num_attention_heads": 4,
    "vision_ffn_hidden_size": 32,
    "drop_vision_class_token": True,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 24,
    "moe_aux_loss_coeff": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {
        "language_model_type": "mamba",
        "num_layers": 2,
        "hybrid_override_pattern": "ME",
        "mamba_num_groups": 2,
        "mamba_head_dim": 16,
        "mamba_state_dim": 8,
        "mamba_chunk_size": 8,
        **EXPERTS,
    },
    "experts": {"num_layers": 1, **EXPERTS},
}


def config_of(name: str, **changes: Any) -> LLaVAConfig:
    return LLaVAConfig(**{**SIZES, **MODELS[name], **changes})


@functools.cache
def made(name: str) -> Pretrained:
    config = config_of(name)
    model = LLaVAModel(config)
    example = FAMILIES["llava"].example_inputs(config, 1, 8)
    params = jax.jit(model.init)(jax.random.key(0), *example)["params"]
    return Pretrained("llava", config, model, jax.tree.map(np.asarray, nn.unbox(params)))


def batch_of() -> tuple[np.ndarray, np.ndarray]:
    """Images of three tiles, and two texts of equal length: an image first, and one in the middle."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(VOCAB, size=(2, 7)).astype(np.int32)
    tokens[0, 0] = tokens[1, 3] = IMAGE
    return rng.normal(size=(2, 3, 8, 8)).astype(np.float32), tokens


@pytest.mark.parametrize("name", MODELS)
def test_equals_its_parts(name: str) -> None:
    """Tower, projection and language model as models of their own, and the images put in by hand."""
    pretrained, (images, tokens) = made(name), batch_of()
    config: Any = pretrained.config
    model: Any = pretrained.model
    family = FAMILIES[config.language_model_type]
    assert isinstance(config.language_config, family.config_type)
    language: Any = family.build_model(config.language_config, LocalSpecProvider())
    weights = np.cos(np.arange(2 * 10 * VOCAB).reshape(2, 10, VOCAB)).astype(np.float32)

    def whole(params: Any) -> Any:
        logits = model.apply({"params": params}, images, tokens)
        return jnp.sum(logits * weights), logits

    def by_parts(params: Any) -> Any:
        def projected(module: Any, x: Any) -> Any:
            return module.vision_projection(x)

        tower = model.build_tower().apply({"params": params["vision_model"]}, images)[:, 1:]
        seen = model.apply({"params": params}, tower, method=projected)
        of_language = {"params": params["language_model"]}
        words = params["language_model"]["embedding"]["word_embeddings"]["embedding"][np.maximum(tokens, 0)]
        rows = []
        for i, at in enumerate((0, 3)):
            rows.append(jnp.concatenate([words[i, :at], seen[i], words[i, at + 1 :]]))
        hidden = language.apply(of_language, None, decoder_input=jnp.stack(rows), method="hidden_states")
        logits = hidden @ params["language_model"]["embedding"]["word_embeddings"]["embedding"].T
        return jnp.sum(logits * weights), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(whole, has_aux=True))(pretrained.params)
    (_, expected), wanted = jax.jit(jax.value_and_grad(by_parts, has_aux=True))(pretrained.params)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(expected).max() > 0.5
    for path, gradient in jax.tree_util.tree_leaves_with_path(wanted):
        found = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found, gradient, atol=1e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))
        if "expert_bias" not in jax.tree_util.keystr(path):
            assert scale > 0, path


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_names_both_ways(name: str, tmp_path) -> None:
    pretrained = made(name)
    saved = megatron.save(pretrained)
    layers = {tensor.split(".layers.")[1] for tensor in saved if tensor.startswith("language_model.decoder.layers.")}
    if name == "hybrid":
        assert {"0.mixer.in_proj.weight", "0.mixer.A_log", "0.mixer.conv1d.weight"} <= layers
        assert {"1.mlp.router.weight"} <= layers
        assert "language_model.decoder.final_norm.weight" in saved
    else:
        assert {"0.mlp.experts.local_experts.3.linear_fc2.weight", "0.mlp.router.weight"} <= layers
    kept = {tensor.split(".")[0] for tensor in saved}
    assert kept == {"vision_model", "vision_projection", "language_model"}
    megatron.save_folder(pretrained, tmp_path)
    again = megatron.load_folder(tmp_path, "llava")
    assert again.config == pretrained.config
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)


def test_megatron_says_which_language_model_by_its_type() -> None:
    pretrained = made("hybrid")
    fields, arguments = FAMILIES["llava"].megatron().write_config(pretrained.config)  # pyright: ignore
    assert fields["language_model_type"] == "nemotron5-hybrid"
    saved = megatron.save(pretrained)
    published = {**fields, "language_model_type": "nemotron5-hybrid-8b"}
    assert megatron.load(saved, "llava", published, arguments).config == pretrained.config
    with pytest.raises(ConfigError, match="hybrid_override_pattern has no effect with language_model_type=''"):
        megatron.load(saved, "llava", {**fields, "language_model_type": None}, arguments)
    with pytest.raises(ConfigError, match="use a GPT or a hybrid"):
        megatron.load(saved, "llava", {**fields, "language_model_type": "hf://someone/something"}, arguments)


def test_options_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="mamba_state_dim=8 has no effect without language_model_type='mamba'"):
        config_of("experts", mamba_state_dim=8)
    with pytest.raises(ConfigError, match="layers E and experts need each other"):
        config_of("hybrid", num_moe_experts=None, moe_ffn_hidden_size=None)
    with pytest.raises(ConfigError, match="type LLaVAConfig is not supported"):
        language_arguments(config_of("hybrid"))
    language = config_of("hybrid").language_config
    vision = {name: value for name, value in SIZES.items() if name not in language.__dataclass_fields__}
    assert LLaVAConfig(**language_arguments(language), **vision) == config_of("hybrid")
    config = Config(
        model_family="llava",
        model=config_of("hybrid", mamba_head_dim=64, mamba_num_groups=1),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        data=DataConfig(seq_length=64),
    )
    with pytest.raises(ConfigError, match="mamba_num_heads=1 is not divisible by tensor_model_parallel_size=2"):
        fit_config(config, FAMILIES["llava"], build_tokenizer(config.data.tokenizer))


def _steps(name: str, devices: int, **parallel: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    config = Config(
        model_family="llava",
        model=config_of(name, make_vocab_size_divisible_by=64),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(optimizer="sgd", lr=0.1, lr_decay_style="constant"),
        data=DataConfig(seq_length=16),
        train=TrainConfig(
            micro_batch_size=4 * parallel.get("tensor_model_parallel_size", 1) // devices, global_batch_size=4
        ),
    )
    program = build_program(config, FAMILIES["llava"], devices=jax.devices()[:devices])
    rng, state, seen = np.random.default_rng(5), program.create_state(), []
    with on_mesh(program):
        for _ in range(2):
            text = rng.integers(VOCAB, size=(4, 14)).astype(np.int32)
            text[np.arange(4), rng.integers(13, size=4)] = IMAGE
            batch = {
                "images": rng.normal(size=(4, 1, 3, 8, 8)).astype(np.float32),
                "tokens": text[:, :-1],
                "labels": text[:, 1:],
                "loss_mask": np.ones((4, 16), np.float32),
            }
            state, metrics = program.train_step(state, place_batch(program, batch, num_microbatches=1))
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    return np.array(seen), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_training_on_several_devices_equals_one(name: str) -> None:
    wanted = _steps(name, 1)
    found = _steps(name, 4, tensor_model_parallel_size=2, sequence_parallel=True, zero=3)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    for path, value in wanted[1].items():
        atol = 2e-5 * float(np.abs(value).max()) + 1e-7
        np.testing.assert_allclose(found[1][path], value, rtol=2e-5, atol=atol, err_msg=path)


def test_the_program_trains_a_hybrid(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "--model llava --language-model-type mamba --num-layers 1 --hybrid-override-pattern M --hidden-size 32"
        " --num-attention-heads 2 --ffn-hidden-size 32 --mamba-head-dim 16 --mamba-num-groups 1 --mamba-state-dim 8"
        " --vision-num-layers 1 --vision-hidden-size 16 --vision-ffn-hidden-size 32 --vision-num-attention-heads 2"
        " --train-iters 12 --micro-batch-size 8 --seq-length 40 --eval-iters 1 --eval-interval 12"
    )
    assert train.main([*words.split()]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/llava/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert "held-out digits" in capsys.readouterr().out
    saved = json.loads((tmp_path / "runs/llava/config.json").read_text())["model"]
    assert (saved["language_model_type"], saved["hybrid_override_pattern"]) == ("mamba", "M")
