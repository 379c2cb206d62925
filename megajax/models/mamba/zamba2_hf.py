"""Zamba2 in Hugging Face's format: Mamba-2 layers, some after a transformer block that several of them share."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row, Tensor, layer_reader, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields, positive_integer
from megajax.interop.hf_rope import read_rope, write_rope
from megajax.models.mamba.mamba_model import MambaModel
from megajax.models.mamba.mixer_hf import PLAIN, expansion, hybrid, ignore, linear, mixer_rows, outer_rows
from megajax.ssm.hybrid_layer_allocation import MAMBA, SHARED
from megajax.ssm.mamba_config import MambaConfig

_SYMBOLS = {"mamba": MAMBA, "linear_attention": MAMBA, "hybrid": SHARED}
_LONG_CONTEXT = 16384
"""`max_position_embeddings` with `use_long_context`."""


def _pattern(fields: Fields) -> str:
    layers, kinds = fields.optional("num_hidden_layers"), fields.take("layers_block_type")
    if not isinstance(kinds, list) or not set(kinds) <= set(_SYMBOLS):
        raise ConfigError(f"config.json: layers_block_type={kinds} must be a list of {', '.join(_SYMBOLS)}")
    if layers is not None and layers != len(kinds):
        raise ConfigError(f"config.json: layers_block_type names {len(kinds)} layers for num_hidden_layers={layers}")
    return "".join(_SYMBOLS[kind] for kind in kinds)


def _read(fields: Fields) -> dict[str, Any]:
    ignore(fields, "attention_hidden_size attention_head_dim head_dim mamba_headdim kv_channels num_query_groups")
    ignore(fields, "hybrid_layer_ids use_mamba_kernels use_mem_eff_path use_conv_bias num_logits_to_keep layer_types")
    pattern, hidden, heads = _pattern(fields), fields.size("hidden_size"), fields.size("num_attention_heads")
    groups, ffn, mixers = (fields.take(name) for name in ("num_key_value_heads", "intermediate_size", "n_mamba_heads"))
    bias, head_dim = fields.flag("add_bias_linear"), 2 * hidden // heads
    longest = fields.size("max_position_embeddings")
    longest = _LONG_CONTEXT if fields.flag("use_long_context") else longest
    rope = read_rope(fields, longest)
    least_step = fields.number("time_step_min")
    blocks, tied = fields.size("num_mem_blocks"), fields.flag("tie_word_embeddings")
    if not tied and pattern.count(SHARED) > blocks:  # transformers 5 ties all that it shares by this one field
        raise ConfigError(
            "config.json: tie_word_embeddings=false gives each layer a block of its own in transformers; it must be"
            f" true, or num_mem_blocks={blocks} at least {pattern.count(SHARED)}"
        )
    return {
        **PLAIN,
        "num_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else positive_integer("num_key_value_heads", groups),
        "kv_channels": head_dim,
        "softmax_scale": (head_dim / 2) ** -0.5,
        "ffn_hidden_size": 4 * hidden if ffn is None else positive_integer("intermediate_size", ffn),
        "gated_linear_unit": True,
        "activation_func": fields.activation("hidden_act"),
        "add_mlp_bias": bias,
        "mamba_proj_bias": bias,
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": longest,
        "share_embeddings_and_output_weights": tied,
        "layernorm_epsilon": fields.number("rms_norm_eps"),
        "init_method_std": fields.number("initializer_range"),
        "hidden_dropout": 0.0,
        "attention_dropout": fields.number("attention_dropout"),
        "mamba_num_heads": mixers,
        "mamba_head_dim": fields.size("mamba_expand") * hidden // mixers,
        "mamba_state_dim": fields.size("mamba_d_state"),
        "mamba_num_groups": fields.size("mamba_ngroups"),
        "mamba_d_conv": fields.size("mamba_d_conv"),
        "mamba_chunk_size": fields.size("chunk_size"),
        "mamba_dt_min": least_step,
        "mamba_dt_max": fields.number("time_step_max"),
        "mamba_dt_init_floor": fields.number("time_step_floor"),
        # Its mixers do not step by less than the least step of their first weights.
        "mamba_dt_clamp_min": least_step,
        "num_shared_blocks": blocks,
        "shared_adapter_rank": fields.size("adapter_rank"),
        "shared_attention_adapter": fields.flag("use_shared_attention_adapter"),
        **(rope if fields.flag("use_mem_rope") else {"position_embedding_type": "none"}),
    }


def _write(given: TransformerConfig) -> dict[str, Any]:
    config = hybrid(given)
    if SHARED not in config.layer_pattern or not set(config.layer_pattern) <= {MAMBA, SHARED}:
        raise ConfigError(f"hybrid_override_pattern={config.layer_pattern!r} must consist of {MAMBA} and {SHARED}")
    kinds = {MAMBA: "linear_attention", SHARED: "hybrid"}
    return {
        "num_hidden_layers": config.num_layers,
        "layers_block_type": [kinds[symbol] for symbol in config.layer_pattern],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": ACTIVATION_NAMES[config.activation_func],
        "add_bias_linear": config.mamba_proj_bias,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "attention_dropout": config.attention_dropout,
        "n_mamba_heads": config.mamba_num_heads,
        "mamba_expand": expansion(config),
        "mamba_d_state": config.mamba_state_dim,
        "mamba_ngroups": config.mamba_num_groups,
        "mamba_d_conv": config.mamba_d_conv,
        "chunk_size": config.mamba_chunk_size,
        "time_step_min": config.mamba_dt_clamp_min,
        "time_step_max": config.mamba_dt_max,
        "time_step_floor": config.mamba_dt_init_floor,
        "num_mem_blocks": config.num_shared_blocks,
        "adapter_rank": config.shared_adapter_rank,
        "use_shared_attention_adapter": config.shared_attention_adapter,
        "use_mem_rope": config.position_embedding_type != "none",
        **write_rope(config),
    }


def _layer_rows(inside: str) -> tuple[Row, ...]:
    """The tensors of a Mamba-2 layer; inside: its name within one that has more."""
    return (
        Row(f"layers.{{i}}.{inside}input_layernorm.weight", ("norm/scale",)),
        *mixer_rows(f"{inside}mamba"),
        Row("layers.{i}.linear.weight", ("linear/kernel",), transposed=True),
    )


_ATTENTION, _MLP = "shared_transformer.self_attn", "shared_transformer.feed_forward"
_BOTH = ("mlp/linear_gate", "mlp/linear_fc1")


def _block_rows() -> Iterator[Row]:
    """The tensors that layers share, under the first of the layers."""
    yield Row("layers.{i}.shared_transformer.input_layernorm.weight", ("input_layernorm/scale",))
    yield Row("layers.{i}.shared_transformer.pre_ff_layernorm.weight", ("pre_mlp_layernorm/scale",))
    for part in "qkv":
        for inner in ("", "/linear"):  # the latter beside an adapter
            yield from linear(f"{_ATTENTION}.{part}_proj", f"self_attention/linear_{part}{inner}")
    yield from linear(f"{_ATTENTION}.o_proj", "self_attention/linear_proj")
    yield from linear(f"{_MLP}.gate_up_proj", *_BOTH)
    yield from linear(f"{_MLP}.down_proj", "mlp/linear_fc2")


def _adapter_rows() -> Iterator[Row]:
    """The tensors of layer S number `k`, under the first of the layers that have its block."""

    def row(name: str, number: int, *parts: str) -> Row:
        kernels = tuple(f"{part}/kernel" for part in parts)
        return Row(f"layers.{{i}}.{name}_list.{{k}}.{number}.weight", kernels, transposed=True)

    for part in "qkv":
        for number, half in enumerate(("adapter_down", "adapter_up")):
            yield row(f"{_ATTENTION}.linear_{part}_adapter", number, f"self_attention/linear_{part}/{half}")
    yield row(f"{_MLP}.gate_up_proj_adapter", 0, "mlp/adapter_down")
    yield row(f"{_MLP}.gate_up_proj_adapter", 1, "mlp/adapter_gate", "mlp/adapter_fc1")


def _plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    mixed = hybrid(config)
    plan = rows_plan(architecture.rows, leaves, config, prefix)
    where = layer_reader(config, model.layer_specs)
    shared = [i for i, symbol in enumerate(mixed.layer_pattern) if symbol == SHARED]
    for block, first in enumerate(shared[: mixed.num_shared_blocks]):
        plan |= rows_plan(_block_rows(), leaves, config, prefix, folder=f"shared_block_{block}/weights/", i=first)
    for i, symbol in enumerate(mixed.layer_pattern):
        stack, row = where(i)
        folder = f"decoder/{stack}/"
        rows = _layer_rows("mamba_decoder." if symbol == SHARED else "")
        plan |= rows_plan(rows, leaves, config, prefix, folder=folder, row=row, i=i)
        if symbol == SHARED:
            k = shared.index(i)
            first = shared[k % mixed.num_shared_blocks]
            adapters = _adapter_rows()
            plan |= rows_plan(adapters, leaves, config, prefix, folder=f"{folder}adapters/", row=row, i=first, k=k)
    return plan | rows_plan([architecture.head] if architecture.head else [], leaves, config)


ZAMBA2 = Architecture(
    name="Zamba2ForCausalLM",
    base="Zamba2Model",
    model_type="zamba2",
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "hidden_size": 2560,
        "tie_word_embeddings": True,
        "layers_block_type": None,
        "intermediate_size": None,
        "hidden_act": "gelu",
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 256,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "add_bias_linear": False,
        "num_mem_blocks": 1,
        "adapter_rank": 128,
        "use_shared_attention_adapter": False,
        "use_mem_rope": False,
        "use_long_context": False,
    },
    read=_read,
    write=_write,
    prefix="model.",
    build=MambaModel,
    config_type=MambaConfig,
    rows=outer_rows("embed_tokens", "final_layernorm"),
    plan=_plan,
)
