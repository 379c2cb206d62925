"""Megatron's command-line arguments, as checkpoints keep them, to fields of its TransformerConfig and its GPTModel."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

from megajax.interop.megatron_fields import FIELDS, Mapped

_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""Argument -> TransformerConfig field."""
_MODEL = {
    "padded_vocab_size": "vocab_size",
    "max_position_embeddings": "max_sequence_length",
    "position_embedding_type": "position_embedding_type",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "use_rope_scaling": "rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
"""Argument -> GPTModel argument."""
_SWITCHES = (
    *("multi_latent_attention", "mtp_num_layers", "experimental_attention_variant", "is_hybrid_model"),
    *("linear_attention_freq", "use_mup", "enable_mhc_connections"),
)
"""Arguments that turn on what is not supported. Options of what is off have defaults of their own, and are left out; so
are fp8 and fp4, which say how a run computes, not what its weights are."""


def settings_from_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(TransformerConfig fields, GPTModel arguments), as Megatron's `core_transformer_config_from_args` builds them."""
    yarn = arguments.get("position_embedding_type") == "yarn"
    fields = {
        name: value
        for name, value in arguments.items()
        if (isinstance(FIELDS.get(name), Mapped) or name in _SWITCHES)
        and name not in _MODEL
        and (yarn or not name.startswith("yarn_"))
    }
    fields |= {field: arguments[name] for name, field in _RENAMED.items() if name in arguments}
    if arguments.get("num_experts"):
        fields["num_moe_experts"] = arguments["num_experts"]
    if "group_query_attention" in arguments and not arguments["group_query_attention"]:
        fields["num_query_groups"] = None
    fields["params_dtype"] = _dtype(arguments)
    fields |= _activation(arguments)
    model = {name: arguments[argument] for argument, name in _MODEL.items() if arguments.get(argument) is not None}
    model["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights", False)
    return fields, model


def _dtype(arguments: Mapping[str, Any]) -> str:
    return "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else "float32"


def _activation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if arguments.get("swiglu"):
        fused = arguments.get("bias_swiglu_fusion", True)
        return {"activation_func": "silu", "gated_linear_unit": True, "bias_activation_fusion": fused}
    if arguments.get("quick_geglu"):
        return {"activation_func": "quick_gelu", "gated_linear_unit": True}
    if arguments.get("squared_relu"):
        return {"activation_func": "squared_relu", "bias_activation_fusion": False}
    return {"activation_func": "gelu", "bias_activation_fusion": arguments.get("bias_gelu_fusion", True)}
