"""Special tokens that a model needs: by their usual names, or new ids behind the tokenizer's vocabulary."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megajax.data.tokenizers import Tokenizer

NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("[BOS]", "<bos>", "<s>", "<pad>", "[CLS]"),
    "eos": ("[EOS]", "<eos>", "</s>", "[SEP]"),
}
"""Role -> names it goes by, the usual one first. `<pad>` begins a decoder's text in published T5 vocabularies."""


class SpecialTokens(NamedTuple):
    """ids: role -> id. vocab_size: of the tokenizer's ids and the new ones."""

    ids: dict[str, int]
    vocab_size: int


def special_tokens(tokenizer: Tokenizer, roles: Sequence[str], sentinels: int = 0) -> SpecialTokens:
    """The ids of `roles`, keys of `NAMES`, and of so many sentinels, "sentinel_0" and on.

    What the vocabulary does not name gets a new id behind it, in the order of the roles.
    """
    names = {role: NAMES[role] for role in roles}
    names |= {f"sentinel_{i}": (f"<extra_id_{i}>",) for i in range(sentinels)}
    ids, next_id = {}, tokenizer.vocab_size
    for role, candidates in names.items():
        known = next((i for i in map(tokenizer.token_id, candidates) if i is not None), None)
        ids[role] = next_id if known is None else known
        next_id += known is None
    return SpecialTokens(ids, next_id)
