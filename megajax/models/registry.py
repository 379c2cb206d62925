"""The model families by name: the only place that lists them."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping

from megajax.models.family import Family
from megajax.models.gpt.gpt_family import GPT

FAMILIES: Mapping[str, Family] = {family.name: family for family in (GPT,)}
