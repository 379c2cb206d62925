"""BERT and Megatron-BERT in Hugging Face's format: with both heads, with that of masked tokens, with none."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.codec import Codec
from megajax.interop.hf_architecture import Architecture, Row, Tensor, layer_plan, rows_plan
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields
from megajax.models.bert.bert_config import BertConfig
from megajax.models.bert.bert_model import BertModel

_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
_MEGATRON_DEFAULTS = _DEFAULTS | {
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_HEADS: Mapping[str, Mapping[str, bool]] = {
    "ForPreTraining": {"add_lm_head": True, "add_binary_head": True, "add_pooler": True},
    "ForMaskedLM": {"add_lm_head": True, "add_binary_head": False, "add_pooler": False},
    "Model": {"add_lm_head": False, "add_binary_head": False, "add_pooler": True},
}


def _read(fields: Fields, *, heads: Mapping[str, bool], post_norm: bool) -> dict[str, Any]:
    fields.refuse("add_cross_attention")
    fields.refuse("is_decoder")
    positions = fields.take("position_embedding_type")
    if positions != "absolute":
        raise ConfigError(f"config.json: position_embedding_type={positions!r} is not supported; only 'absolute' is")
    activation = fields.activation("hidden_act")
    return {
        "num_layers": fields.size("num_hidden_layers"),
        "hidden_size": fields.size("hidden_size"),
        "num_attention_heads": fields.size("num_attention_heads"),
        "ffn_hidden_size": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": fields.size("max_position_embeddings"),
        "num_tokentypes": fields.size("type_vocab_size"),
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
        "activation_func": activation,
        "lm_head_activation": activation if heads["add_lm_head"] else "gelu",
        "layernorm_epsilon": fields.number("layer_norm_eps"),
        "hidden_dropout": fields.number("hidden_dropout_prob"),
        "attention_dropout": fields.number("attention_probs_dropout_prob"),
        "init_method_std": fields.number("initializer_range"),
        "apply_residual_connection_post_layernorm": post_norm,
        **heads,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert isinstance(config, BertConfig)
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_sequence_length or _DEFAULTS["max_position_embeddings"],
        "type_vocab_size": config.num_tokentypes,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "hidden_act": ACTIVATION_NAMES[config.activation_func],
        "layer_norm_eps": config.layernorm_epsilon,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_method_std,
    }


def _linear(name: str, part: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", (f"{part}/kernel",), transposed=True), Row(f"{name}.bias", (f"{part}/bias",))


def _norm(name: str, part: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", (f"{part}/scale",)), Row(f"{name}.bias", (f"{part}/bias",))


_EMBEDDINGS = (
    Row("embeddings.word_embeddings.weight", ("embedding/word_embeddings/embedding",), vocabulary=True),
    Row("embeddings.position_embeddings.weight", ("embedding/position_embeddings/embedding",)),
    Row("embeddings.token_type_embeddings.weight", ("embedding/tokentype_embeddings/embedding",)),
    *_linear("pooler.dense", "pooler/dense"),
)
_LAYER = (
    *_linear("encoder.layer.{i}.attention.self.query", "self_attention/linear_q"),
    *_linear("encoder.layer.{i}.attention.self.key", "self_attention/linear_k"),
    *_linear("encoder.layer.{i}.attention.self.value", "self_attention/linear_v"),
    *_linear("encoder.layer.{i}.attention.output.dense", "self_attention/linear_proj"),
    *_linear("encoder.layer.{i}.intermediate.dense", "mlp/linear_fc1"),
    *_linear("encoder.layer.{i}.output.dense", "mlp/linear_fc2"),
)
_HEAD = (
    *_linear("cls.predictions.transform.dense", "lm_head/dense"),
    *_norm("cls.predictions.transform.LayerNorm", "lm_head/layer_norm"),
    Row("cls.predictions.bias", ("output_layer/bias",), vocabulary=True),
    *_linear("cls.seq_relationship", "binary_head"),
)
_DECODER = Row("cls.predictions.decoder.weight", ("output_layer/kernel",), transposed=True, vocabulary=True)


def _plan(
    architecture: Architecture, config: TransformerConfig, model: Any, leaves: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    specs, block, last = model.layer_specs, "encoder", config.num_layers - 1
    plan = rows_plan(_EMBEDDINGS, leaves, config, prefix)
    plan |= layer_plan(_LAYER, leaves, config, specs, prefix, block=block)
    if config.apply_residual_connection_post_layernorm:
        # See `BertConfig`: the norm after a layer is the next one's first.
        between = _norm("encoder.layer.{i}.attention.output.LayerNorm", "pre_mlp_layernorm")
        plan |= layer_plan(between, leaves, config, specs, prefix, block=block)
        first = layer_plan(_norm("{i}", "input_layernorm"), leaves, config, specs, block=block)
        for leaf in ("weight", "bias"):
            plan[f"{prefix}embeddings.LayerNorm.{leaf}"] = first[f"0.{leaf}"]
            for i in range(last):
                plan[f"{prefix}encoder.layer.{i}.output.LayerNorm.{leaf}"] = first[f"{i + 1}.{leaf}"]
        plan |= rows_plan(
            _norm(f"encoder.layer.{last}.output.LayerNorm", "encoder/final_layernorm"), leaves, config, prefix
        )
    else:
        norms = (
            *_norm("encoder.layer.{i}.attention.ln", "input_layernorm"),
            *_norm("encoder.layer.{i}.ln", "pre_mlp_layernorm"),
        )
        plan |= layer_plan(norms, leaves, config, specs, prefix, block=block)
        plan |= rows_plan(_norm("encoder.ln", "encoder/final_layernorm"), leaves, config, prefix)
    plan |= rows_plan([*_HEAD, *([] if architecture.head is None else [architecture.head])], leaves, config)
    if "output_layer/kernel" in leaves:
        # transformers then reads the bias inside `decoder`, and keeps the other one without using it.
        used = plan["cls.predictions.bias"]
        plan["cls.predictions.decoder.bias"] = used
        unused = Codec(used.shape, lambda _: np.zeros(used.shape, used.dtype), lambda _: [])
        plan["cls.predictions.bias"] = Tensor((), False, None, used.dtype, unused)
    return plan


def _architecture(base: str, kind: str, **parts: Any) -> Architecture:
    """One of the classes of a base, "Bert" or "MegatronBert"."""
    heads, post_norm = _HEADS[kind], base == "Bert"
    head = {"head": _DECODER, "prefix": "bert."} if heads["add_lm_head"] else {"head": None, "prefix": ""}
    # Files often hold heads that their class does not use, and what older versions saved twice.
    unused = [r"embeddings\.position_ids", r"cls\.predictions\.decoder\.bias"]
    unused += [] if heads["add_binary_head"] else [r"cls\.seq_relationship\..*"]
    unused += [] if heads["add_pooler"] else [r"pooler\..*"]
    unused += [] if heads["add_lm_head"] else [r"cls\.predictions\..*"]
    renamed = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    return Architecture(
        name=base + kind,
        base=None,
        read=partial(_read, heads=heads, post_norm=post_norm),
        write=_write,
        build=BertModel,
        config_type=BertConfig,
        plan=_plan,
        ignored="|".join(unused),
        older_names=renamed if heads["add_lm_head"] else (*renamed, (r"^bert\.", "")),
        **head,
        **parts,
    )


ARCHITECTURES = tuple(
    _architecture(base, kind, model_type=model_type, defaults=defaults)
    for base, model_type, defaults in (
        ("Bert", "bert", _DEFAULTS),
        ("MegatronBert", "megatron-bert", _MEGATRON_DEFAULTS),
    )
    for kind in _HEADS
)
