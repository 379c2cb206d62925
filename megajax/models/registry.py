"""The model families by name: the only place that lists them."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib
from collections.abc import Iterator, Mapping

from megajax.config import ConfigError
from megajax.models.bert.bert_family import BERT
from megajax.models.family import Family
from megajax.models.gpt.gpt_family import GPT
from megajax.models.mamba.mamba_family import HYBRIDS
from megajax.models.multimodal.llava_family import LLAVA
from megajax.models.retro.retro_family import RETRO
from megajax.models.t5.t5_family import T5
from megajax.models.vision.clip_family import CLIP
from megajax.models.vision.radio_family import RADIO


class Registry(Mapping[str, Family]):
    """megajax's families by name, and anybody's by `module:VARIABLE`, which imports the module.

    A family from elsewhere goes by what it was asked for, in a checkpoint too, so that it is found again.
    """

    def __init__(self, families: tuple[Family, ...]):
        self._own = {family.name: family for family in families}

    def __getitem__(self, name: str) -> Family:
        if name in self._own:
            return self._own[name]
        module, colon, variable = name.partition(":")
        if not colon:
            raise KeyError(name)
        try:
            family = vars(importlib.import_module(module))[variable]
        except ImportError as error:
            raise ConfigError(f"--model {name}: {error}; is its folder the current one, or on PYTHONPATH?") from error
        except (KeyError, ValueError):
            raise ConfigError(
                f"--model {name}: {module or 'the module'} has no variable {variable or 'named'}"
            ) from None
        if not isinstance(family, Family):
            raise ConfigError(f"--model {name} is a {type(family).__name__}; expected a megajax.models.family.Family")
        return dataclasses.replace(family, name=name, default=dataclasses.replace(family.default, model_family=name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


FAMILIES = Registry((GPT, BERT, T5, HYBRIDS, CLIP, RADIO, LLAVA, RETRO))
