"""The model families by name: the only place that lists them."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping

from megajax.models.bert.bert_family import BERT
from megajax.models.family import Family
from megajax.models.gpt.gpt_family import GPT
from megajax.models.mamba.mamba_family import HYBRIDS
from megajax.models.multimodal.llava_family import LLAVA
from megajax.models.t5.t5_family import T5
from megajax.models.vision.clip_family import CLIP
from megajax.models.vision.radio_family import RADIO

FAMILIES: Mapping[str, Family] = {family.name: family for family in (GPT, BERT, T5, HYBRIDS, CLIP, RADIO, LLAVA)}
