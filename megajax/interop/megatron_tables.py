"""What the tables of a Megatron checkpoint, of words and of positions, say about its model."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from megajax.config import ConfigError, TransformerConfig
from megajax.interop.megatron_layouts import StateDict

ConfigT = TypeVar("ConfigT", bound=TransformerConfig)


def vocabulary_rows(state_dict: StateDict) -> int:
    """Rows of the embedding table. Raises ConfigError where there is none or the output layer has others."""
    name, output = "embedding.word_embeddings.weight", "output_layer.weight"
    if name not in state_dict:
        raise ConfigError(f"the Megatron state dict lacks {name}")
    rows = len(state_dict[name])
    if output in state_dict and np.shape(state_dict[output])[:1] != (rows,):
        raise ConfigError(f"{output} has shape {np.shape(state_dict[output])}; {name} has {rows} rows")
    return rows


def with_sizes_of_tables(model_arguments: Mapping[str, Any], tensors: StateDict) -> dict[str, Any]:
    """A model's arguments, with `vocab_size` and `max_sequence_length` by the tables where they are not given."""
    arguments = {"vocab_size": vocabulary_rows(tensors), **model_arguments}
    positions = tensors.get("embedding.position_embeddings.weight")
    if positions is not None and arguments.get("max_sequence_length") is None:
        arguments["max_sequence_length"] = len(positions)
    return arguments


def fitted_to_tables(config: ConfigT, tensors: dict[str, np.ndarray]) -> ConfigT:
    """The config with the padding of the vocabulary that the tables have. A copy of a tied table is taken out.

    Raises:
      ConfigError: the copy differs.
    """
    rows = vocabulary_rows(tensors)
    if rows > config.padded_vocab_size:
        config = config.replace(make_vocab_size_divisible_by=rows)
    if config.share_embeddings_and_output_weights:
        # The last pipeline stage of a tied model keeps the embedding a second time, as its output layer.
        copy = tensors.pop("output_layer.weight", None)
        if copy is not None and not np.array_equal(copy, tensors["embedding.word_embeddings.weight"]):
            raise ConfigError(
                "output_layer.weight differs from the embedding although share_embeddings_and_output_weights=True;"
                " set it to False"
            )
    return config
