"""GPT's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.megatron_config import megatron_settings, transformer_config
from megajax.interop.megatron_layouts import decoder_tensors, vocabulary_rows
from megajax.models.family import MegatronWeights
from megajax.models.gpt.gpt_model import GPTModel


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> TransformerConfig:
    """See `MegatronWeights.read_config`."""
    rows = vocabulary_rows(tensors)
    model_kwargs = {"vocab_size": rows, **model_kwargs}
    positions = tensors.get("embedding.position_embeddings.weight")
    if positions is not None and model_kwargs.get("max_sequence_length") is None:
        model_kwargs["max_sequence_length"] = len(positions)
    config = transformer_config(fields, model_kwargs)
    if rows > config.padded_vocab_size:
        config = config.replace(make_vocab_size_divisible_by=rows)
    if config.share_embeddings_and_output_weights:
        _drop_tied_copy(tensors)
    return config


def _drop_tied_copy(tensors: dict[str, np.ndarray]) -> None:
    """The last pipeline stage of a tied model keeps the embedding a second time, as its output layer."""
    copy = tensors.pop("output_layer.weight", None)
    if copy is not None and not np.array_equal(copy, tensors["embedding.word_embeddings.weight"]):
        raise ConfigError(
            "output_layer.weight differs from the embedding although share_embeddings_and_output_weights=True;"
            " set it to False"
        )


MEGATRON = MegatronWeights(read_config, megatron_settings, GPTModel, decoder_tensors)
