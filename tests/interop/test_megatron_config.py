"""Megatron's config fields: every one is known, and what is not supported is refused in one line."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megajax.config import ConfigError, HeterogeneousLayer, TransformerConfig
from megajax.interop import megatron
from megajax.interop.megatron_config import megatron_settings, transformer_config
from megajax.interop.megatron_fields import FIELDS, MODEL_ARGUMENTS, Refused

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
MODEL = {"vocab_size": 32}


def convert(fields: dict[str, Any], **model: Any) -> TransformerConfig:
    return transformer_config({**BASE, **fields}, {**MODEL, **model})


@pytest.mark.parametrize("case", ["mcore_gpt3", "mcore_llama", "mcore_swa", "mcore_ckpt_llama"])
def test_every_field_of_a_megatron_config_is_in_the_table(case: str) -> None:
    fields = json.loads((GOLDEN / case / "config.json").read_text())["transformer_config"]
    assert set(fields) <= set(FIELDS)
    assert transformer_config(fields, MODEL).num_layers == fields["num_layers"]


def test_defaults_are_megatrons() -> None:
    config = transformer_config(BASE, MODEL)
    assert config == TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=32, share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, rule in FIELDS.items() if isinstance(rule, Refused)])
def test_unsupported_fields_are_refused_unless_they_hold_their_default(name: str) -> None:
    rule = FIELDS[name]
    assert isinstance(rule, Refused)
    for default in rule.defaults:
        convert({name: default})
    with pytest.raises(ConfigError, match=rf"^{name}='other' is not supported for family 'gpt'; it must be [^\n]*$"):
        convert({name: "other"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("moe_router_force_load_balancing", True), ("fp8", "e4m3"), ("use_mup", 1)],
)
def test_refusals_name_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}={value!r} is not supported"):
        convert({field: value})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^nmu_layers=3 is not a Megatron config field that megajax knows"):
        convert({"nmu_layers": 3})
    with pytest.raises(ConfigError, match=r"^rotary_bass=3 is not a Megatron model argument"):
        convert({}, rotary_bass=3)
    with pytest.raises(ConfigError, match=r"^logit_dtype='x' is not supported"):
        convert({}, logit_dtype="x")
    with pytest.raises(ConfigError, match=r"^hidden_size is missing"):
        transformer_config({"num_layers": 1, "num_attention_heads": 1}, MODEL)


def test_plumbing_is_ignored_whatever_it_holds() -> None:
    fields = {
        "tensor_model_parallel_size": 8,
        "timers": object(),
        "init_method": print,
        "recompute_granularity": "full",
    }
    model = {
        "pre_process": True,
        "post_process": False,
        "parallel_output": False,
        "vp_stage": 3,
        "pg_collection": object(),
    }
    assert convert(fields, **model) == convert({})
    assert not convert({"apply_residual_connection_post_layernorm": True}).apply_residual_connection_post_layernorm


def squared_relu() -> None:
    """A function with the name of Megatron's."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gelu", "gelu"),
        ("<built-in function gelu>", "gelu"),
        ("<function silu at 0x7f1e5c0e6dc0>", "silu"),
        ("torch.nn.functional.silu", "silu"),
        ("functools.partial(<built-in function gelu>, approximate='tanh')", "gelu_tanh"),
        ("fast_gelu", "gelu_tanh"),
        ("<function quick_gelu at 0x7f>", "quick_gelu"),
        ("F.relu", "relu"),
        (squared_relu, "squared_relu"),
    ],
)
def test_activation_functions_by_any_name(given: Any, expected: str) -> None:
    assert convert({"activation_func": given}).activation_func == expected


def test_an_unknown_activation_function_is_named() -> None:
    with pytest.raises(ConfigError, match="activation_func='mish' is not supported; use one of gelu"):
        convert({"activation_func": "mish"})


@pytest.mark.parametrize("flag", ["bias_activation_fusion", "use_te_activation_func"])
def test_fused_gelu_is_the_tanh_approximation_also_by_default(flag: str) -> None:
    assert convert({flag: True}).activation_func == "gelu_tanh"
    assert convert({flag: True, "activation_func": "silu"}).activation_func == "silu"


@pytest.mark.parametrize("given", ["torch.bfloat16", "bfloat16", "<class 'jax.numpy.bfloat16'>"])
def test_dtypes_by_any_name(given: str) -> None:
    assert convert({"params_dtype": given, "bf16": True}).params_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"params_dtype=torch\.int8 is not supported"):
        convert({"params_dtype": "torch.int8"})


def test_yarn_attributes_decide_the_concentration_as_megatrons_attention_reads_them() -> None:
    def concentration(**fields: Any) -> float:
        config = convert(fields, position_embedding_type="rope")
        return 1.0 if config.rope_attention_factor is None else config.rope_attention_factor

    log = np.log(4.0)
    factor = {"yarn_rotary_scaling_factor": 4.0}
    assert concentration() == 1.0
    assert concentration(yarn_mscale=2.0) == 1.0
    assert concentration(**factor) == pytest.approx(1 + 0.1 * log)
    assert concentration(**factor, yarn_mscale=None, yarn_mscale_all_dim=0.0) == pytest.approx(1 + 0.1 * log)
    expected = (1 + 0.05 * log) / (1 + 0.02 * log)
    assert concentration(**factor, yarn_mscale=0.5, yarn_mscale_all_dim=0.2) == pytest.approx(expected)
    yarn = convert({}, position_embedding_type="yarn", rotary_percent=0.5, **factor)
    assert (yarn.yarn_mscale, yarn.yarn_rotary_scaling_factor, yarn.rotary_percent) == (None, 4.0, 1.0)


def test_settings_on_the_config_and_on_the_model_must_agree() -> None:
    assert convert({"rotary_base": 500}, position_embedding_type="rope").rotary_base == 500
    with pytest.raises(ConfigError, match="rotary_base is 500 in the config but 10000 in the model"):
        convert({"rotary_base": 500}, rotary_base=10000)
    with pytest.raises(ConfigError, match="position_embedding_type='relative' is not supported"):
        convert({}, position_embedding_type="relative")
    with pytest.raises(ConfigError, match="'mrope' and its sections go together"):
        convert({}, position_embedding_type="mrope")


def test_heterogeneous_layers_from_json_in_a_file_or_encoded(tmp_path: Path) -> None:
    blocks = [
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 12}},
        {"attention": {"n_heads_in_group": 2}, "mlp": {}},
    ]
    text = json.dumps({"block_configs": blocks})
    (tmp_path / "blocks.json").write_text(text)
    encoded = convert({"heterogeneous_layers_config_encoded_json": text, "heterogeneous_block_specs": True})
    assert convert({"heterogeneous_layers_config_path": str(tmp_path / "blocks.json")}) == encoded
    assert encoded.heterogeneous_layers == (
        HeterogeneousLayer(attention="no_op", ffn_hidden_size=256),
        HeterogeneousLayer(num_query_groups=2),
    )
    for fields, message in (
        ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs=True needs"),
        ({"heterogeneous_layers_config_encoded_json": "{"}, "is not valid JSON"),
        ({"heterogeneous_layers_config_path": "/nowhere.json"}, "/nowhere.json: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(fields)


@pytest.mark.parametrize("name", json.loads((GOLDEN / "megatron_options" / "cases.json").read_text()))
def test_settings_survive_the_way_back(name: str) -> None:
    case = json.loads((GOLDEN / "megatron_options" / "cases.json").read_text())[name]
    config = transformer_config(case["config"], case["model_kwargs"])
    if name == "yarn_factor_with_rope":
        with pytest.raises(ConfigError, match=r"rope_attention_factor=1\.138"):
            megatron_settings(config)
        return
    fields, model = megatron_settings(config)
    assert set(fields) <= set(FIELDS)
    assert set(model) <= set(MODEL_ARGUMENTS)
    assert transformer_config(json.loads(json.dumps(fields)), json.loads(json.dumps(model))) == config


SIGMOIDS: dict[str, Any] = {"num_moe_experts": 4, "moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize(
    "changes",
    [
        {"add_attention_proj_bias": False},
        {"rope_scaling_type": "dynamic"},
        {"rope_scaling_type": "llama3", "rope_original_max_position_embeddings": 4096},
        {"apply_residual_connection_post_layernorm": True},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"embedding_multiplier": 8.0},
        {"sandwich_norm": True},
        {"multi_latent_attention": True, "add_qkv_bias": True},
        {"multi_latent_attention": True, "qk_pos_emb_interleaved": False},
        {"multi_latent_attention": True, "latent_layernorm_epsilon": 1e-6},
        SIGMOIDS | {"moe_router_norm_topk_prob": False},
        SIGMOIDS | {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_group_score_topk": 1},
    ],
)
def test_what_megatron_cannot_express_is_refused(changes: dict[str, Any]) -> None:
    config = TransformerConfig(**BASE, vocab_size=32, position_embedding_type="rope", **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{list(changes)[-1]}=.* cannot be expressed in a Megatron config"):
        megatron_settings(config)


def llama() -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    settings = json.loads((GOLDEN / "mcore_llama" / "config.json").read_text())
    state_dict = load_file(GOLDEN / "mcore_llama" / "model.safetensors")
    return state_dict, settings["transformer_config"], settings["model_args"]


def test_transformer_engine_names_and_extra_state() -> None:
    state_dict, fields, model = llama()
    renamed = {}
    for name, value in state_dict.items():
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        renamed[name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")] = value
        renamed[f"{name}._extra_state"] = np.zeros(1)
    saved = megatron.save(megatron.load(renamed, "gpt", fields, model))
    assert sorted(saved) == sorted(state_dict)
    for name, value in state_dict.items():
        np.testing.assert_array_equal(saved[name], value)


def test_wrong_tensors_are_named() -> None:
    state_dict, fields, model = llama()
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    for changed, message in (
        ({k: v for k, v in state_dict.items() if k != name}, f"lacks {name}"),
        ({k: v for k, v in state_dict.items() if ".0." not in k}, r"lacks .* and 3 more"),
        ({**state_dict, "decoder.layers.2.mlp.linear_fc2.weight": state_dict[name]}, r"does not: decoder\.layers\.2"),
        ({**state_dict, name: state_dict[name].T}, rf"{name} has shape \(56, 32\); this config needs \(32, 56\)"),
        ({**state_dict, "output_layer.weight": np.zeros((90, 32))}, "output_layer.weight has shape"),
        ({}, "lacks embedding.word_embeddings.weight"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            megatron.load(changed, "gpt", fields, model)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="has shape"):
        megatron.load(state_dict, "gpt", fields, {**model, "vocab_size": 97})
    with pytest.raises(ConfigError, match="family='bart' has no Megatron weights"):
        megatron.load(state_dict, "bart", fields, model)


def test_more_rows_than_the_vocabulary_are_padding() -> None:
    state_dict, fields, model = llama()
    pretrained = megatron.load(state_dict, "gpt", fields, {**model, "vocab_size": 90})
    assert (pretrained.config.vocab_size, pretrained.config.padded_vocab_size) == (90, 96)
    logits: Any = pretrained.model.apply({"params": pretrained.params}, np.arange(6)[None])
    whole: Any = megatron.load(state_dict, "gpt", fields, model)
    np.testing.assert_allclose(
        logits, whole.model.apply({"params": whole.params}, np.arange(6)[None])[..., :90], atol=1e-5
    )
    np.testing.assert_array_equal(megatron.save(pretrained)["output_layer.weight"], state_dict["output_layer.weight"])


def test_a_tied_model_may_carry_its_embedding_twice() -> None:
    settings = json.loads((GOLDEN / "mcore_gpt3" / "config.json").read_text())
    state_dict = load_file(GOLDEN / "mcore_gpt3" / "model.safetensors")
    arguments = ("gpt", settings["transformer_config"], settings["model_args"])
    table = state_dict["embedding.word_embeddings.weight"]
    assert "output_layer.weight" not in megatron.save(
        megatron.load({**state_dict, "output_layer.weight": table}, *arguments)
    )
    with pytest.raises(ConfigError, match=r"output_layer\.weight differs from the embedding"):
        megatron.load({**state_dict, "output_layer.weight": table + 1}, *arguments)


def test_sizes_of_tables_fill_in_for_missing_arguments() -> None:
    settings = json.loads((GOLDEN / "mcore_gpt3" / "config.json").read_text())
    state_dict = load_file(GOLDEN / "mcore_gpt3" / "model.safetensors")
    tied = {"share_embeddings_and_output_weights": True}
    config = megatron.load(state_dict, "gpt", settings["transformer_config"], tied).config
    assert (config.vocab_size, config.max_sequence_length) == (96, 64)
