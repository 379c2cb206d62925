"""A model's own arguments, which stand above those of its config."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any, TypeVar

from flax import linen as nn

from megajax.config import TransformerConfig

ConfigT = TypeVar("ConfigT", bound=TransformerConfig)


def with_arguments(config: TransformerConfig, config_type: type[ConfigT], module: nn.Module) -> ConfigT:
    """`config` as a `config_type`, with those fields of `module` that have the name of an option and are not None."""
    if not isinstance(config, config_type):
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        config = config_type(**given)
    options = {field.name for field in dataclasses.fields(config_type) if field.init}
    own: dict[str, Any] = {
        field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.name in options
    }
    return config.replace(**{name: value for name, value in own.items() if value is not None})
