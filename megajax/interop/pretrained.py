"""What weights become when they are read: a family, its config, a model and its parameters."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

from flax import linen as nn

from megajax.config import TransformerConfig


class Pretrained(NamedTuple):
    """`pretrained.model.apply({"params": pretrained.params}, tokens)` runs it.

    family: name in `megajax.models.registry`. params: the tree that `model.init` gives, as plain arrays.
    """

    family: str
    config: TransformerConfig
    model: nn.Module
    params: Any
