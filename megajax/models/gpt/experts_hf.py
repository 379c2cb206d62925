"""GPTs with experts in Hugging Face's format: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.codec import Codec
from megajax.interop.hf_architecture import Architecture, Part, Row, Tensor, decoder_plan, layer_reader, rows_plan
from megajax.interop.hf_fields import Fields, positive_integer
from megajax.models.gpt.gpt_model import GPTModel
from megajax.models.gpt.llama_hf import DEFAULTS, LAYER_ROWS, ROWS, Dialect, linear, windowed_layers, write_windows

RMS_GATED: Mapping[str, Any] = {"normalization": "RMSNorm", "gated_linear_unit": True}


def _expert(name: str, part: str) -> Row:
    return Row(f"layers.{{i}}.{name}.weight", (f"mlp/experts/{part}/kernel",), transposed=True)


def experts_plan(
    rows: tuple[Row, ...],
    architecture: Architecture,
    config: TransformerConfig,
    model: Any,
    leaves: Mapping[str, Any],
    prefix: str,
) -> dict[str, Tensor]:
    """A decoder's tensors, and `rows` of each expert of each layer."""
    plan = decoder_plan(architecture, config, model, leaves, prefix)
    where = layer_reader(config, model.layer_specs)
    for i in range(config.num_layers):
        stack, row = where(i)
        for expert in range(config.for_layer(i).num_moe_experts or 0):
            folder = f"decoder/{stack}/"
            plan |= rows_plan(rows, leaves, config, prefix, folder=folder, row=(row, expert), i=i, e=expert)
    return plan


def reader(dialect: Dialect, more: Callable[[Fields, dict[str, Any]], dict[str, Any]]) -> Callable[[Fields], Any]:
    """What a dialect reads, and `more`: (fields, those arguments) -> further ones."""

    def read(fields: Fields) -> dict[str, Any]:
        arguments = dialect.read(fields)
        return arguments | more(fields, arguments)

    return read


def writer(dialect: Dialect, more: Callable[[TransformerConfig], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The inverse of `reader`."""
    return lambda config: dialect.write(config) | more(config)


def _aux(fields: Fields) -> dict[str, Any]:
    coefficient = fields.number("router_aux_loss_coef")
    return {"moe_aux_loss_coeff": coefficient if fields.flag("output_router_logits") else 0.0}


def _write_aux(config: TransformerConfig) -> dict[str, Any]:
    coefficient = sum(coefficient for _, coefficient in config.balancing)
    return {"router_aux_loss_coef": coefficient, "output_router_logits": coefficient > 0}


# Mixtral


def _read_mixtral(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_moe_experts": fields.size("num_local_experts"),
        "moe_router_topk": fields.size("num_experts_per_tok"),
        "moe_ffn_hidden_size": arguments["ffn_hidden_size"],
        "moe_input_jitter_eps": fields.number("router_jitter_noise") or None,
    } | _aux(fields)


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "router_jitter_noise": config.moe_input_jitter_eps or 0.0,
        "intermediate_size": config.moe_ffn_hidden_size,
    } | _write_aux(config)


def _read_window(fields: Fields, layers: int) -> dict[str, Any]:
    size = fields.take("sliding_window")
    return {} if size is None else {"window_size": (int(size) - 1, 0)}


def _write_window(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": None if config.window_size is None else config.window_size[0] + 1}


_ROUTER_DEFAULTS = {"router_aux_loss_coef": 0.001, "output_router_logits": False}
_MIXTRAL = Dialect(RMS_GATED, read_layers=_read_window, write_layers=_write_window)
MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    base="MixtralModel",
    model_type="mixtral",
    defaults=DEFAULTS
    | _ROUTER_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
    },
    read=reader(_MIXTRAL, _read_mixtral),
    write=writer(_MIXTRAL, _write_mixtral),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=(
        *LAYER_ROWS,
        Row("layers.{i}.block_sparse_moe.gate.weight", ("mlp/router/kernel",), transposed=True),
    ),
    plan=partial(
        experts_plan,
        tuple(
            _expert(f"block_sparse_moe.experts.{{e}}.{name}", part)
            for name, part in (("w1", "linear_gate"), ("w3", "linear_fc1"), ("w2", "linear_fc2"))
        ),
    ),
)

# Qwen2-MoE, Qwen3-MoE

MLP_NAMES = (("gate_proj", "linear_gate"), ("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"))
EXPERT_ROWS = tuple(_expert(f"mlp.experts.{{e}}.{name}", part) for name, part in MLP_NAMES)


def shared_rows(name: str) -> tuple[Row, ...]:
    """The tensors of the shared experts, which the file calls `name`."""
    return tuple(row for file, part in MLP_NAMES for row in linear(f"{name}.{file}", f"mlp/shared_experts/{part}"))


def _read_qwen(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    layers, step = arguments["num_layers"], fields.size("decoder_sparse_step")
    dense = set(fields.take("mlp_only_layers") or ())
    local = "num_local_experts"  # what transformers 5 calls them in some configs
    experts = fields.optional(local)
    if experts is not None:
        fields.optional("num_experts")
    return {
        "num_moe_experts": fields.size("num_experts") if experts is None else positive_integer(local, experts),
        "moe_router_topk": fields.size("num_experts_per_tok"),
        "moe_ffn_hidden_size": fields.size("moe_intermediate_size"),
        "moe_router_pre_softmax": not fields.flag("norm_topk_prob"),
        "moe_layer_freq": tuple(int(i not in dense and (i + 1) % step == 0) for i in range(layers)),
    } | _aux(fields)


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_moe_experts,
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "norm_topk_prob": not config.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_layers) if not config.is_moe_layer(i)],
    } | _write_aux(config)


def _read_qwen2(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    shared = fields.size("shared_expert_intermediate_size")
    return _read_qwen(fields, arguments) | {
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": True,
        "add_qkv_bias": fields.flag("qkv_bias"),
    }


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size}
    return _write_qwen(config) | shared | {"qkv_bias": config.add_qkv_bias or config.add_bias_linear}


def _read_qwen_windows(fields: Fields, layers: int) -> dict[str, Any]:
    end = fields.number("max_window_layers")
    return windowed_layers(fields, layers, lambda on: [on and i % 2 == 0 and i < end for i in range(layers)])


def _read_one_window(fields: Fields, layers: int) -> dict[str, Any]:
    """Qwen3's models with experts have a window in all layers or in none, unlike those without."""
    fields.optional("max_window_layers")  # which nothing reads
    kinds = fields.optional("layer_types")
    found = windowed_layers(fields, layers, lambda on: [on] * layers)
    if kinds not in (None, ["sliding_attention" if found else "full_attention"] * layers):
        raise ConfigError(f"config.json: layer_types={kinds} is not possible: all layers have the window, or none has")
    return found


def _write_one_window(config: TransformerConfig) -> dict[str, Any]:
    return {name: value for name, value in write_windows(config).items() if name != "layer_types"}


def _write_qwen_windows(config: TransformerConfig) -> dict[str, Any]:
    windows = write_windows(config)
    kinds = windows["layer_types"]
    first = next((i for i, kind in enumerate(kinds) if kind == "sliding_attention"), config.num_layers)
    return windows | {"max_window_layers": first}


_QWEN_DEFAULTS = (
    DEFAULTS
    | _ROUTER_DEFAULTS
    | {
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    }
)
QWEN_ROWS = (*LAYER_ROWS, Row("layers.{i}.mlp.gate.weight", ("mlp/router/kernel",), transposed=True))
_QWEN2 = Dialect(
    RMS_GATED | {"add_qkv_bias": True, "add_attention_proj_bias": False},
    read_layers=_read_qwen_windows,
    write_layers=_write_qwen_windows,
)
_QWEN3 = Dialect(
    RMS_GATED | {"qk_layernorm": True},
    attention_bias=True,
    read_layers=_read_one_window,
    write_layers=_write_one_window,
)
QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    base="Qwen2MoeModel",
    model_type="qwen2_moe",
    defaults=_QWEN_DEFAULTS
    | {"num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632}
    | {"qkv_bias": True},
    read=reader(_QWEN2, _read_qwen2),
    write=writer(_QWEN2, _write_qwen2),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=(
        *QWEN_ROWS,
        *shared_rows("mlp.shared_expert"),
        Row("layers.{i}.mlp.shared_expert_gate.weight", ("mlp/shared_expert_gate/kernel",), transposed=True),
    ),
    plan=partial(experts_plan, EXPERT_ROWS),
)
QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    base="Qwen3MoeModel",
    model_type="qwen3_moe",
    defaults=_QWEN_DEFAULTS | {"num_experts": 128, "num_experts_per_tok": 8, "attention_bias": False},
    read=reader(_QWEN3, _read_qwen),
    write=writer(_QWEN3, _write_qwen),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=QWEN_ROWS,
    plan=partial(experts_plan, EXPERT_ROWS),
)

# gpt-oss


def _read_gpt_oss(fields: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    if not fields.flag("attention_bias"):
        raise ConfigError("config.json: attention_bias=false is not supported for this architecture")
    if fields.number("swiglu_alpha") != 1.702:
        raise ConfigError("config.json: swiglu_alpha must be 1.702; other values are not supported")
    return {
        "num_moe_experts": fields.size("num_local_experts"),
        "moe_router_topk": fields.size("num_experts_per_tok"),
        "moe_ffn_hidden_size": arguments["ffn_hidden_size"],
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": fields.number("swiglu_limit"),
        "softmax_type": "learnable",
        "add_qkv_bias": False,
        "add_attention_proj_bias": None,
    } | _aux(fields)


def _write_gpt_oss(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "intermediate_size": config.moe_ffn_hidden_size,
        "hidden_act": "silu",
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": config.activation_func_clamp_value,
    } | _write_aux(config)


def _read_alternating(fields: Fields, layers: int) -> dict[str, Any]:
    fields.optional("use_sliding_window")
    return windowed_layers(fields, layers, lambda on: [i % 2 == 0 for i in range(layers)])


def _write_alternating(config: TransformerConfig) -> dict[str, Any]:
    windows = write_windows(config)
    del windows["use_sliding_window"]
    return windows


def _interleaved(config: TransformerConfig, last: tuple[int, ...]) -> Codec:
    """gate and up of all experts, feature by feature in turn; last: the dims before the features."""
    features = config.moe_ffn_hidden_size or 0
    shape = (config.num_moe_experts or 0, *last, 2 * features)
    return Codec(
        shape,
        lambda parts: np.stack(parts, axis=-1).reshape(shape),
        lambda whole: [whole[..., 0::2], whole[..., 1::2]],
    )


def _gpt_oss_plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    plan = decoder_plan(architecture, config, model, leaves, prefix)
    where = layer_reader(config, model.layer_specs)
    for i in range(config.num_layers):
        stack, row = where(i)
        folder = f"decoder/{stack}/mlp/experts/"

        def part(name: str, folder: str = folder, row: int = row) -> Part:
            return Part(folder + name, row, leaves[folder + name].shape[1:])

        for kind, ending, last in (("kernel", "", (config.hidden_size,)), ("bias", "_bias", ())):
            both, down = (part(f"linear_gate/{kind}"), part(f"linear_fc1/{kind}")), part(f"linear_fc2/{kind}")
            dtype, name = np.dtype(leaves[down.path].dtype), f"{prefix}layers.{i}.mlp.experts."
            plan[f"{name}gate_up_proj{ending}"] = Tensor(both, False, None, dtype, _interleaved(config, last))
            plan[f"{name}down_proj{ending}"] = Tensor((down,), False, None, dtype)
    return plan


_GPT_OSS = Dialect(
    RMS_GATED | {"add_bias_linear": True},
    attention_bias=False,
    read_layers=_read_alternating,
    write_layers=_write_alternating,
)
GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    base="GptOssModel",
    model_type="gpt_oss",
    defaults=DEFAULTS
    | {
        "router_aux_loss_coef": 0.9,
        "output_router_logits": False,
        "use_sliding_window": True,
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "rope_theta": 150000.0,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
    },
    read=reader(_GPT_OSS, _read_gpt_oss),
    write=writer(_GPT_OSS, _write_gpt_oss),
    prefix="model.",
    build=GPTModel,
    rows=ROWS,
    layer_rows=(
        *LAYER_ROWS,
        *linear("mlp.router", "mlp/router"),
        Row("layers.{i}.self_attn.sinks", ("self_attention/core_attention/softmax_offset",)),
    ),
    plan=_gpt_oss_plan,
)

EXPERTS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS)
