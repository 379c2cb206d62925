"""Megatron's configuration to a `TransformerConfig` and back."""

# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Iterable, Mapping
from typing import Any

from megajax.config import ConfigError, HeterogeneousLayer, TransformerConfig
from megajax.interop.megatron_expert_fields import LATENT_DEFAULTS, latent_fields
from megajax.interop.megatron_fields import FIELDS, MODEL_ARGUMENTS, Fields, Mapped, Refused, Rule
from megajax.ops.rope import yarn_concentration

_DEFAULTS = {
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "rotary_base": 10000.0,
    "share_embeddings_and_output_weights": False,
}


def _translate(given: Fields, rules: Mapping[str, Rule], what: str, family: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in given.items():
        rule = rules.get(name)
        if rule is None:
            raise ConfigError(f"{name}={value!r} is not a {what} that megajax knows; remove it or rename it")
        if isinstance(rule, Refused) and not any(_equal(value, default) for default in rule.defaults):
            raise ConfigError(
                f"{name}={value!r} is not supported for family {family!r}; it must be {rule.defaults[0]!r}"
            )
        if isinstance(rule, Mapped):
            result |= rule.convert(value, given)
    return result


def _equal(value: Any, default: Any) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def transformer_config(fields: Fields, model_arguments: Fields) -> TransformerConfig:
    """The config that computes what Megatron's GPTModel does with these settings; see `config_arguments`."""
    return TransformerConfig(**config_arguments(fields, model_arguments, family="gpt"))


def config_arguments(
    fields: Fields,
    model_arguments: Fields,
    *,
    family: str,
    field_rules: Mapping[str, Rule] = FIELDS,
    argument_rules: Mapping[str, Rule] = MODEL_ARGUMENTS,
) -> dict[str, Any]:
    """Arguments of the config that computes what Megatron's model does with these settings.

    Args:
      field_rules, argument_rules: what becomes of each field and argument. A family with more of them, or with others,
        gives `FIELDS | {...}`.
      fields: Megatron TransformerConfig fields as JSON has them (dtypes and functions as objects or as text), and the
        `yarn_*` attributes that Megatron sets on its config.
      model_arguments: arguments of its constructor. What is not given has Megatron's default.

    Raises:
      ConfigError: a field is unknown, not supported, or impossible.
    """
    yarn = {name: value for name, value in model_arguments.items() if name.startswith("yarn_")}
    model_arguments = {name: value for name, value in model_arguments.items() if name not in yarn}
    fields = {"activation_func": "gelu", **fields, **yarn}
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not fields.get(name):
            raise ConfigError(f"{name} is missing from the Megatron config; add it")
    config = _translate(fields, field_rules, "Megatron config field", family)
    model = _translate(model_arguments, argument_rules, "Megatron model argument", family)
    for name in ("qk_layernorm", "qk_l2_norm"):  # the spec may have either, whatever the config says
        model[name] = bool(config.get(name) or model.get(name))
    positions = _positions(fields, model)
    if positions["position_embedding_type"] != "mrope":  # Megatron then reads no sections
        positions["mrope_section"] = None
    return {**config, **model, **positions}


def _positions(fields: Fields, model: Fields) -> dict[str, Any]:
    result = dict(_DEFAULTS)
    for name, default in _DEFAULTS.items():
        of_config, of_model = fields.get(name), model.get(name)
        if of_config is not None and of_model is not None and of_config != of_model:
            raise ConfigError(f"{name} is {of_config!r} in the config but {of_model!r} in the model; make them equal")
        given = of_model if of_model is not None else of_config
        result[name] = default if given is None else given
    kind = result["position_embedding_type"]
    if fields.get("multi_latent_attention"):  # has its own rotary embedding, whatever the model's
        return result | {"position_embedding_type": fields.get("rope_type", "yarn")}
    known = ("learned_absolute", "rope", "yarn", "mrope", "none")
    if kind not in known:
        raise ConfigError(f"position_embedding_type={kind!r} is not supported; use {', '.join(known)}")
    if kind == "yarn":
        result["rotary_percent"] = 1.0  # Megatron's YaRN rotates whole heads
    if fields.get("yarn_rotary_scaling_factor") is not None:
        # Attention reads these whatever the position embedding is, and takes an absent mscale for None.
        mscales = fields.get("yarn_mscale"), fields.get("yarn_mscale_all_dim")
        result |= {"yarn_mscale": mscales[0], "yarn_mscale_all_dim": mscales[1]}
        if kind == "rope":
            result["rope_attention_factor"] = yarn_concentration(fields["yarn_rotary_scaling_factor"], *mscales)
    return result


def megatron_settings(config: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `transformer_config`: (fields that differ from Megatron's defaults or matter, model arguments).

    Raises:
      ConfigError: Megatron has no setting for a field of `config`.
    """
    _require_expressible(config)
    same = [name for name in FIELDS if name in TransformerConfig.__dataclass_fields__ and name not in _DEFAULTS]
    fields = {name: _plain(getattr(config, name)) for name in same}
    if config.multi_latent_attention:
        fields |= latent_fields(config)
    else:
        fields = {name: value for name, value in fields.items() if name not in LATENT_DEFAULTS}
    if config.position_embedding_type != "yarn":
        fields = {name: value for name, value in fields.items() if not name.startswith("yarn_")}
    fields["params_dtype"] = f"torch.{config.params_dtype}"
    fields["activation_func"] = "fast_gelu" if config.activation_func == "gelu_tanh" else config.activation_func
    if config.heterogeneous_layers is not None:
        blocks = [_block(layer) for layer in config.heterogeneous_layers]
        fields["heterogeneous_block_specs"] = True
        fields["heterogeneous_layers_config_encoded_json"] = json.dumps({"block_configs": blocks})
    model = {name: _plain(getattr(config, name)) for name in _DEFAULTS}
    model |= {
        "vocab_size": config.padded_vocab_size,
        "max_sequence_length": config.max_sequence_length,
        "rope_scaling": config.rope_scaling_type == "llama3",
        "rope_scaling_factor": config.rope_scaling_factor,
        "seq_len_interpolation_factor": config.seq_len_interpolation_factor,
    }
    return fields, model


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _block(layer: HeterogeneousLayer) -> dict[str, Any]:
    def half(kind: str, size: str, value: int | None) -> dict[str, Any]:
        return {"no_op": kind == "no_op", "replace_with_linear": kind == "linear", size: value}

    return {
        "attention": half(layer.attention, "num_query_groups", layer.num_query_groups),
        "mlp": half(layer.mlp, "ffn_hidden_size", layer.ffn_hidden_size),
    }


def _require_expressible(config: TransformerConfig) -> None:
    llama3 = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_position_embeddings": 8192}
    wanted: dict[str, Iterable[Any]] = {
        "apply_residual_connection_post_layernorm": (False,),
        "add_attention_proj_bias": (config.add_bias_linear,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "embedding_multiplier": (1.0,),
        "sandwich_norm": (False,),
        "add_mlp_bias": (config.add_bias_linear,),
        "rope_scaling_type": ("none", "llama3"),
        "moe_router_group_score_topk": (None, config.moe_router_topk // (config.moe_router_group_topk or 1)),
        "moe_router_norm_topk_prob": (True,),
        "rope_attention_factor": (None, 1.0) if config.position_embedding_type == "rope" else (None,),
    }
    if config.multi_latent_attention:
        wanted |= {
            "add_qkv_bias": (False,),
            "qk_pos_emb_interleaved": (True,),
            "latent_layernorm_epsilon": (None, config.layernorm_epsilon),
        }
    if config.rope_scaling_type == "llama3":
        wanted |= {name: (value,) for name, value in llama3.items()}
    for name, values in wanted.items():
        value = getattr(config, name)
        if value not in tuple(values):
            raise ConfigError(
                f"{name}={value!r} cannot be expressed in a Megatron config, which has {next(iter(values))!r}"
            )
