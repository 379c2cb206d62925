"""GPT-2 as Hugging Face stores it: [in, out] kernels, q, k and v in one tensor, learned positions."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

from megajax.config import TransformerConfig
from megajax.interop.hf_architecture import Architecture, Row
from megajax.interop.hf_fields import ACTIVATION_NAMES, Fields, positive_integer
from megajax.models.gpt.gpt_model import GPTModel

_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def _read(fields: Fields) -> dict[str, Any]:
    fields.refuse("add_cross_attention")
    fields.number("embd_pdrop")  # training only; megajax drops embeddings at the rate of the residual stream
    hidden = fields.size("n_embd")
    inner = fields.take("n_inner")
    return {
        "num_layers": fields.size("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": fields.size("n_head"),
        "ffn_hidden_size": 4 * hidden if inner is None else positive_integer("n_inner", inner),
        "vocab_size": fields.size("vocab_size"),
        "max_sequence_length": fields.size("n_positions"),
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings"),
        "activation_func": fields.activation("activation_function"),
        "scale_attn_by_inverse_layer_idx": fields.flag("scale_attn_by_inverse_layer_idx"),
        "softmax_scale": None if fields.flag("scale_attn_weights") else 1.0,
        "layernorm_epsilon": fields.number("layer_norm_epsilon"),
        "hidden_dropout": fields.number("resid_pdrop"),
        "attention_dropout": fields.number("attn_pdrop"),
        "init_method_std": fields.number("initializer_range"),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_sequence_length or _DEFAULTS["n_positions"],
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "activation_function": ACTIVATION_NAMES[config.activation_func],
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights": config.softmax_scale != 1.0,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_method_std,
    }


_QKV = ("linear_q", "linear_k", "linear_v")

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    base="GPT2Model",
    model_type="gpt2",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    prefix="transformer.",
    build=GPTModel,
    rows=(
        Row("wte.weight", ("embedding/word_embeddings/embedding",), vocabulary=True),
        Row("wpe.weight", ("embedding/position_embeddings/embedding",)),
        Row("ln_f.weight", ("decoder/final_layernorm/scale",)),
        Row("ln_f.bias", ("decoder/final_layernorm/bias",)),
    ),
    layer_rows=(
        Row("h.{i}.ln_1.weight", ("input_layernorm/scale",)),
        Row("h.{i}.ln_1.bias", ("input_layernorm/bias",)),
        Row("h.{i}.attn.c_attn.weight", tuple(f"self_attention/{name}/kernel" for name in _QKV)),
        Row("h.{i}.attn.c_attn.bias", tuple(f"self_attention/{name}/bias" for name in _QKV)),
        Row("h.{i}.attn.c_proj.weight", ("self_attention/linear_proj/kernel",)),
        Row("h.{i}.attn.c_proj.bias", ("self_attention/linear_proj/bias",)),
        Row("h.{i}.ln_2.weight", ("pre_mlp_layernorm/scale",)),
        Row("h.{i}.ln_2.bias", ("pre_mlp_layernorm/bias",)),
        Row("h.{i}.mlp.c_fc.weight", ("mlp/linear_fc1/kernel",)),
        Row("h.{i}.mlp.c_fc.bias", ("mlp/linear_fc1/bias",)),
        Row("h.{i}.mlp.c_proj.weight", ("mlp/linear_fc2/kernel",)),
        Row("h.{i}.mlp.c_proj.bias", ("mlp/linear_fc2/bias",)),
    ),
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
