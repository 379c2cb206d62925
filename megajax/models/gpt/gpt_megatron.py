"""GPT's weights in Megatron's checkpoints."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

import numpy as np

from megajax.config import TransformerConfig
from megajax.interop.megatron_config import megatron_settings, transformer_config
from megajax.interop.megatron_layouts import decoder_tensors
from megajax.interop.megatron_tables import fitted_to_tables, with_sizes_of_tables
from megajax.models.family import MegatronWeights
from megajax.models.gpt.gpt_model import GPTModel


def read_config(
    fields: Mapping[str, Any], model_kwargs: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> TransformerConfig:
    """See `MegatronWeights.read_config`."""
    return fitted_to_tables(transformer_config(fields, with_sizes_of_tables(model_kwargs, tensors)), tensors)


MEGATRON = MegatronWeights(read_config, megatron_settings, GPTModel, decoder_tensors)
