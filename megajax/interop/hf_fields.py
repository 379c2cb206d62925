"""Reading a Hugging Face config.json field by field, so that none that matters is passed over."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from megajax.config import Activation, ConfigError

# Which file this is, and who wrote it; the precision of the files, which their own headers say
_FILE = """architectures model_type auto_map _name_or_path name_or_path transformers_version _commit_hash dtype
torch_dtype is_llama_config transformers.js_config unsloth_version unsloth_fixed n_ctx"""
# Token ids and text: the tokenizer's and the generation loop's business
_TEXT = """bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id decoder_start_token_id
forced_bos_token_id forced_eos_token_id tokenizer_class prefix suppress_tokens begin_suppress_tokens
task_specific_params"""
# What calls return, how they run, and generation settings that older versions kept here
_CALLS = """use_cache return_dict output_attentions output_hidden_states output_scores return_dict_in_generate
output_past pretraining_tp chunk_size_feed_forward _attn_implementation attn_implementation _attn_implementation_autoset
_flash_attn_2_enabled torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing reorder_and_upcast_attn is_decoder
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences remove_invalid_values exponential_decay_length_penalty"""
# Heads of other tasks
_HEADS = """id2label label2id num_labels _num_labels problem_type finetuning_task summary_type summary_use_proj
summary_activation summary_proj_to_labels summary_first_dropout classifier_dropout"""
PLUMBING = frozenset(name for group in (_FILE, _TEXT, _CALLS, _HEADS) for name in group.split())
"""Fields that do not change what a causal language model computes."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "squared_relu",
    "quick_gelu": "quick_gelu",
}
ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "relu": "relu",
    "squared_relu": "relu2",
    "quick_gelu": "quick_gelu",
}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return data


class Fields:
    """The fields of one config.json. Each is taken once; what nobody took is refused by `finish`."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._left = dict(values)
        self._defaults = defaults

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Changes what fields that the file leaves out are: only its content says which architecture it is for."""
        self._defaults = defaults

    def take(self, name: str) -> Any:
        """The field, or the architecture's default for one that the file leaves out."""
        if name in self._left:
            return self._left.pop(name)
        if name in self._defaults:
            return self._defaults[name]
        raise ConfigError(f"config.json has no field {name}, which this architecture needs")

    def optional(self, name: str) -> Any:
        """The field, or None."""
        return self._left.pop(name, None)

    def size(self, name: str) -> int:
        """A field that must be a whole number above 0."""
        return positive_integer(name, self.take(name))

    def number(self, name: str) -> float:
        """A field that must be a number."""
        return number(name, self.take(name))

    def flag(self, name: str) -> bool:
        """A field that must be true or false (null counts as false)."""
        value = self.take(name)
        if value not in (None, False, True):
            raise ConfigError(f"config.json: {name}={value!r} must be true or false")
        return bool(value)

    def activation(self, name: str) -> Activation:
        """megajax's name of an activation function."""
        value = self.take(name)
        if value not in ACTIVATIONS:
            raise ConfigError(f"config.json: {name}={value!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str) -> None:
        """A feature that must be off: false, null, empty or absent."""
        value = self.optional(name)
        if value not in (None, False, [], {}, ""):
            raise ConfigError(f"config.json: {name}={value!r} is not supported by megajax")

    def finish(self) -> None:
        """Refuses every field that was not taken, unless it is plumbing, or off."""
        for name in list(self._left):
            if name in PLUMBING:
                del self._left[name]
            else:
                self.refuse(name)


def positive_integer(name: str, value: Any) -> int:
    """`value` if it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {name}={value!r} must be a whole number above 0")
    return value


def number(name: str, value: Any) -> float:
    """`value` as a float if it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {name}={value!r} must be a number")
    return float(value)
