"""config.json: every field is understood, plumbing, or refused; and which architecture a model is saved as."""

# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError, HeterogeneousLayer, TransformerConfig
from megajax.interop import hf
from megajax.interop.hf_architecture import layer_reader
from megajax.interop.hf_choice import choose
from megajax.interop.pretrained import Pretrained
from megajax.models.gpt.gpt_family import GPT
from megajax.models.gpt.gpt_model import GPTModel

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
DROP = object()


@pytest.fixture
def copy(tmp_path):
    """A function: a copy of a checkpoint with other fields in its config.json."""

    def make(case: str, **fields):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN / case, folder, ignore=shutil.ignore_patterns("*.npz", "grads*"))
        values = json.loads((folder / "config.json").read_text()) | fields
        values = {name: value for name, value in values.items() if value is not DROP}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


QWEN3 = "hf_options/qwen3_window"


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("hf_gpt2", {"scale_attn_by_inverse_layer_idx": 2}, "scale_attn_by_inverse_layer_idx=2"),
        ("hf_gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("hf_gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
        ("hf_gpt2", {"n_embd": -3}, "n_embd=-3"),
        ("hf_gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ("hf_llama", {"architectures": None, "model_type": "mamba9"}, "model_type='mamba9'"),
        ("hf_llama", {"num_attention_heads": DROP}, "num_attention_heads"),
        ("hf_llama", {"num_attention_heads": "four"}, "num_attention_heads='four'"),
        ("hf_llama", {"logit_scale": 0.5}, "logit_scale=0.5"),
        ("hf_llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("hf_llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("hf_llama", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type='mrope'"),
        ("hf_llama", {"rope_parameters": {"rope_type": "linear"}}, "needs the field factor"),
        ("hf_llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3.0}}, "alpha=3.0"),
        ("hf_llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ("hf_llama", {"num_key_value_heads": 3}, "num_query_groups=3"),
        ("hf_llama", {"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
        ("hf_llama", {"num_hidden_layers": 1}, "holds model.layers.1"),
        ("hf_llama", {"vocab_size": 97}, "model.embed_tokens.weight has shape [96, 32], but config.json makes it [97"),
        ("hf_llama", {"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ("hf_options/mistral_window", {"sliding_window": 0}, "sliding_window=0"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types=['full_attention']"),
        (QWEN3, {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (QWEN3, {"layer_types": 4}, "layer_types=4"),
        (QWEN3, {"max_window_layers": "all"}, "max_window_layers='all'"),
        ("hf_gpt2", {"n_inner": "wide"}, "n_inner='wide'"),
        ("hf_llama", {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "x"}}, "attention_factor='x'"),
        (QWEN3, {"use_sliding_window": False}, "use_sliding_window=False"),
        ("hf_options/smollm3", {"no_rope_layers": [1]}, "no_rope_layers=[1]"),
        ("hf_options/qwen3_moe", {"layer_types": ["sliding_attention"] * 3}, "all layers have the window, or none has"),
        ("hf_options/zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings=false gives each layer a block"),
        ("hf_options/nemotron_h_experts", {"num_experts_per_tok": 1}, "gives every expert the weight 1"),
        ("hf_options/nemotron_h_experts", {"mlp_bias": True}, "mlp_bias=true is not supported beside experts"),
    ],
)
def test_refused(copy, case, fields, message):
    folder = copy(case, **fields)
    with pytest.raises(ConfigError) as error:
        hf.load(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("hf_llama", {"model_type": "llama", "architectures": DROP}),
        ("hf_llama", {"head_dim": DROP, "attention_bias": DROP, "mlp_bias": DROP, "rope_parameters": DROP}),
        ("hf_llama", {"_name_or_path": "somewhere", "torch_dtype": "bfloat16", "use_mrope": False}),
        ("hf_gpt2", {"n_ctx": 64, "task_specific_params": {"text-generation": {"max_length": 50}}}),
        ("hf_gpt2", {"n_inner": DROP, "scale_attn_by_inverse_layer_idx": DROP, "tie_word_embeddings": DROP}),
    ],
)
def test_what_does_not_matter_is_ignored(copy, case, fields):
    assert hf.load(copy(case, **fields)).config == hf.load(GOLDEN / case).config


BASE = TransformerConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    vocab_size=10,
    max_sequence_length=12,
    position_embedding_type="rope",
    normalization="RMSNorm",
    add_bias_linear=False,
    gated_linear_unit=True,
    activation_func="silu",
)
CLASSIC = BASE.replace(
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    add_bias_linear=True,
    gated_linear_unit=False,
    activation_func="gelu",
)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (BASE, "LlamaForCausalLM"),
        (BASE.replace(add_qkv_bias=True, add_attention_proj_bias=True), "LlamaForCausalLM"),
        (BASE.replace(add_bias_linear=True), "LlamaForCausalLM"),
        (BASE.replace(rope_scaling_type="dynamic", rope_original_max_position_embeddings=6), "LlamaForCausalLM"),
        (BASE.replace(position_embedding_type="yarn", yarn_rotary_scaling_factor=4.0), "LlamaForCausalLM"),
        (BASE.replace(window_size=(4, 0)), "MistralForCausalLM"),
        (BASE.replace(window_size=(4, -1)), "MistralForCausalLM"),
        (BASE.replace(window_size=(-1, 0)), "LlamaForCausalLM"),
        (BASE.replace(add_qkv_bias=True), "Qwen2ForCausalLM"),
        (BASE.replace(qk_layernorm=True), "Qwen3ForCausalLM"),
        (BASE.replace(no_rope_freq=2), "SmolLM3ForCausalLM"),
        (BASE.replace(window_size=(4, 0), window_attn_skip_freq=2), "SmolLM3ForCausalLM"),
        (
            CLASSIC.replace(position_embedding_type="rope", layernorm_zero_centered_gamma=True, rotary_percent=0.5),
            "NemotronForCausalLM",
        ),
        (CLASSIC, "GPT2LMHeadModel"),
        # What only matters in training, or not at all in this model, stands in nobody's way.
        (CLASSIC.replace(hidden_dropout=0.3, bf16=True, rotary_base=7.0, yarn_beta_fast=3.0), "GPT2LMHeadModel"),
        (BASE.replace(heterogeneous_layers=(HeterogeneousLayer(),) * 2), "LlamaForCausalLM"),
    ],
)
def test_the_architecture_follows_from_the_config(config, architecture):
    assert choose(config, GPT.hf()).name == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"softmax_scale": 0.3}, "softmax_scale=0.3"),
        ({"rotary_interleaved": True}, "position_embedding_type"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0"),
        ({"heterogeneous_layers": (HeterogeneousLayer(), HeterogeneousLayer(mlp="no_op"))}, "heterogeneous_layers"),
        ({"heterogeneous_layers": (HeterogeneousLayer(), HeterogeneousLayer(ffn_hidden_size=3))}, "ffn_hidden_size"),
    ],
)
def test_no_architecture_fits(changes, message):
    with pytest.raises(ConfigError) as error:
        choose(BASE.replace(**changes), GPT.hf())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_made_here_is_saved_without_its_padding(tmp_path):
    config = BASE.replace(vocab_size=10, make_vocab_size_divisible_by=8, params_dtype="bfloat16")
    model = GPTModel(config, rotary_base=500.0)
    params: Any = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]  # with its logical axes
    hf.save(Pretrained("gpt", config, model, params), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["vocab_size"], written["torch_dtype"]) == (500.0, 10, "bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (10, 8)
    assert "lm_head.weight" not in tensors
    again = hf.load(tmp_path)
    assert again.config.params_dtype == "bfloat16"
    table = params["embedding"]["word_embeddings"]["embedding"].value[:10]
    np.testing.assert_array_equal(again.params["embedding"]["word_embeddings"]["embedding"], table)


def test_parameters_that_do_not_fit_their_model(tmp_path):
    pretrained = hf.load(GOLDEN / "hf_options/gpt2_gelu")
    params = dict(pretrained.params) | {"extra": np.zeros(2)}
    with pytest.raises(ConfigError, match="extra"):
        hf.save(pretrained._replace(params=params), tmp_path / "out")
    with pytest.raises(ConfigError, match="family='bart'"):
        hf.save(pretrained._replace(family="bart"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layer_reader():
    config = BASE.replace(num_layers=5, no_rope_freq=(0, 1, 0, 1, 1))
    where = layer_reader(config, GPTModel(config).layer_specs)
    assert [where(i) for i in range(5)] == [
        ("layers_0", 0),
        ("layers_1", 0),
        ("layers_0", 1),
        ("layers_1", 1),
        ("layers_4", 0),
    ]
