"""Texts with missing spans: Megatron's T5 data set, what the trainer makes of it, and how users give one."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from megajax.config import Config, ConfigError
from megajax.data.build import Datasets, Sizes
from megajax.data.indexed_dataset import TokenSequences
from megajax.data.masked_dataset import MaskingConfig, SentenceSamples, Vocabulary, mask_tokens
from megajax.data.sentences import build_sentence_datasets
from megajax.data.special_tokens import SpecialTokens, special_tokens
from megajax.data.tokenizers import Tokenizer
from megajax.models import language
from megajax.models.request import Asked, Request
from megajax.models.t5.t5_config import T5Config

ROLES = ("pad", "bos", "eos")
_COUNTED_SAMPLES = 512


def t5_tokens(tokenizer: Tokenizer, sentinels: int) -> SpecialTokens:
    """The special tokens of this family: those that stand for missing spans are "sentinel_0" and on."""
    return special_tokens(tokenizer, ROLES, sentinels)


def most_masked(mask_prob: float, sequence_length: int) -> int:
    """Tokens that a sample may lose at most, and so its spans."""
    return max(1, int(mask_prob * (sequence_length - 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5DatasetConfig:
    """How sentences become samples; names are Megatron's.

    Attributes:
      sequence_length: of the encoder's text.
      special: ids of pad, bos and eos. sentinels: ids that stand for missing spans, in this order.
      vocab_size: ids in the data are below it.
      continues: ids of pieces that go on with the word before them.
    """

    sequence_length: int
    sequence_length_decoder: int
    special: dict[str, int]
    sentinels: tuple[int, ...]
    vocab_size: int
    seed: int = 1234
    continues: tuple[int, ...] = ()
    short_sequence_probability: float = 0.1
    masking: MaskingConfig = dataclasses.field(
        default_factory=lambda: MaskingConfig(masking_max_ngram=10, masking_use_geometric_distribution=True)
    )


class T5Dataset:
    """Consecutive sentences without some spans of tokens, and the spans.

    Counterpart of `megatron/core/datasets/t5_dataset.py`: the same samples in the same order.

    Args:
      tokens: a sequence for each sentence.
      documents: the documents of this split.
      num_samples: build at least this many; None is one epoch.
      cache_path: folder that keeps the index between runs.

    Raises:
      ConfigError: there are no sentences, or lengths or sentinels do not suffice.
    """

    def __init__(
        self,
        tokens: TokenSequences,
        documents: np.ndarray,
        num_samples: int | None,
        config: T5DatasetConfig,
        *,
        cache_path: str | os.PathLike[str] | None = None,
    ):
        self.tokens, self.config = tokens, config
        self.samples = SentenceSamples(
            tokens,
            documents,
            num_samples,
            max_tokens=config.sequence_length - 2,
            short_sequence_probability=config.short_sequence_probability,
            min_sentences=1,
            seed=config.seed,
            vocab_size=config.vocab_size,
            cache_path=cache_path,
        )
        self.cache_key = {
            **self.samples.cache_key,
            "lengths": [config.sequence_length, config.sequence_length_decoder],
            "masking": dataclasses.asdict(config.masking),
        }
        continues = np.zeros(config.vocab_size, bool)
        continues[list(config.continues)] = True
        self._vocabulary = Vocabulary(frozenset(), continues, ())

    def __len__(self) -> int:
        return len(self.samples)

    def megatron_sample(self, index: int) -> dict[str, Any]:
        """Megatron's fields: text_enc, enc_mask int64 [T]; text_dec, dec_mask, loss_mask, labels (-1 behind the end)
        int64 [S]; truncated."""
        config, special = self.config, self.config.special
        sentences, target = self.samples.sentences(index)
        tokens = [token for sentence in sentences for token in sentence]
        truncated, tokens = len(tokens) > target, tokens[:target]
        random = np.random.RandomState((config.seed + index) % 2**32)
        spans = mask_tokens(
            tokens, target, config.masking, self._vocabulary, lambda _, token: token, random, random
        ).spans  # fmt: skip
        text, written, end = [], [], 0
        for sentinel, (positions, missing) in zip(config.sentinels, spans, strict=False):
            text += [*tokens[end : positions[0]], sentinel]
            written += [sentinel, *missing]
            end = positions[-1] + 1
        text += tokens[end:]
        text_enc = _padded(text, config.sequence_length, special["pad"])
        text_dec = _padded([special["bos"], *written], config.sequence_length_decoder, special["pad"])
        return {
            "text_enc": text_enc,
            "text_dec": text_dec,
            "labels": _padded([*written, special["eos"]], config.sequence_length_decoder, -1),
            "loss_mask": _padded([1] * (1 + len(written)), config.sequence_length_decoder, 0),
            "truncated": int(truncated),
            "enc_mask": (text_enc != special["pad"]).astype(np.int64),
            "dec_mask": (text_dec != special["pad"]).astype(np.int64),
        }

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """encoder_input int32 [T], encoder_mask bool [T]; decoder_input, labels int32 [S], decoder_mask bool [S],
        loss_mask fp32 [S]."""
        sample = self.megatron_sample(range(len(self))[index])
        return {
            "encoder_input": sample["text_enc"].astype(np.int32),
            "encoder_mask": sample["enc_mask"].astype(bool),
            "decoder_input": sample["text_dec"].astype(np.int32),
            "decoder_mask": sample["dec_mask"].astype(bool),
            "labels": sample["labels"].astype(np.int32),
            "loss_mask": sample["loss_mask"].astype(np.float32),
        }

    def token_frequencies(self, vocab_size: int) -> np.ndarray:
        """float64[vocab_size]: the share of each id in what the decoder has to write, in the first samples."""
        counts = np.zeros(vocab_size, np.int64)
        for index in range(min(len(self), _COUNTED_SAMPLES)):
            labels = self.megatron_sample(index)["labels"]
            counts += np.bincount(labels[labels >= 0], minlength=vocab_size)
        return counts / max(int(counts.sum()), 1)


def _padded(ids: list[int], length: int, pad: int) -> np.ndarray:
    return np.pad(np.array(ids, np.int64), (0, length - len(ids)), constant_values=pad)


def datasets(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Samples from text, see `T5Dataset`."""
    model = config.model
    assert isinstance(model, T5Config)
    assert model.decoder_seq_length is not None
    special = t5_tokens(tokenizer, model.vocab_extra_ids).ids
    dataset_config = T5DatasetConfig(
        sequence_length=config.data.seq_length,
        sequence_length_decoder=model.decoder_seq_length,
        special=special,
        sentinels=tuple(special[f"sentinel_{i}"] for i in range(model.vocab_extra_ids)),
        vocab_size=tokenizer.vocab_size,
        seed=config.train.seed,
        continues=tuple(tokenizer.continuations()),
        short_sequence_probability=model.short_seq_prob,
        masking=MaskingConfig(
            masking_probability=model.mask_prob, masking_max_ngram=10, masking_use_geometric_distribution=True
        ),
    )
    cache = config.data.data_cache_path

    def build(tokens: TokenSequences, documents: np.ndarray, samples: int | None) -> T5Dataset:
        return T5Dataset(tokens, documents, samples, dataset_config, cache_path=cache)

    return build_sentence_datasets(config.data, tokenizer, sizes, build)


def ask(config: T5Config, tokenizer: Tokenizer, request: Request) -> Asked:
    """A text to read; <extra_id_0> and on stand for missing spans in it, and in front of them in what is written.

    Raises:
      ConfigError: the text is empty, longer than the model reads, or has spans of other names.
    """
    language.refuse_images(request)
    special = t5_tokens(tokenizer, config.vocab_extra_ids).ids
    names = {special[f"sentinel_{i}"]: f"<extra_id_{i}>" for i in range(config.vocab_extra_ids)}
    ids = _ids(request, tokenizer, {name: sentinel for sentinel, name in names.items()})
    longest = config.max_sequence_length
    if not ids or len(ids) > (longest or len(ids)):
        raise ConfigError(f"--prompt: has {len(ids)} tokens; the model reads 1 to {longest or 'any number'}")
    text = np.array([ids], np.int32)
    arrays = {
        "encoder_input": text,
        "encoder_mask": np.ones(text.shape, bool),
        "decoder_input": np.array([[special["bos"]]], np.int32),
    }

    def shown(new: Sequence[int]) -> str:
        runs = [(known, list(run)) for known, run in groupby(new, lambda one: one in names)]
        return "".join("".join(names[i] for i in run) if k else tokenizer.detokenize(run) for k, run in runs)

    return Asked(arrays, special["eos"], shown)


def _ids(request: Request, tokenizer: Tokenizer, sentinels: dict[str, int]) -> list[int]:
    """Ids of a text in which sentinels may stand, also those that the tokenizer does not know."""
    for name in re.findall(r"<extra_id_\d+>", request.text):
        if name not in sentinels and tokenizer.token_id(name) is None:
            raise ConfigError(
                f"--prompt: names {name}; the model has {len(sentinels)} such spans, from <extra_id_0> on"
            )
    if all(tokenizer.token_id(name) is not None for name in sentinels):
        return request.tokenize(request.text)
    ids: list[int] = []
    *pieces, last = re.split(r"(<extra_id_\d+>)", request.text)
    for piece in pieces:
        ids += [sentinels[piece]] if piece in sentinels else tokenizer.tokenize(piece)
    return ids + request.tokenize(last)


def check_lengths(model: T5Config, seq_length: int) -> T5Config:
    """The config with the decoder's length, if it has none.

    Raises:
      ConfigError: it, or the number of sentinels, does not suffice.
    """
    masked = most_masked(model.mask_prob, seq_length)
    if masked > model.vocab_extra_ids:
        raise ConfigError(
            f"vocab_extra_ids={model.vocab_extra_ids} is less than the {masked} spans that seq_length={seq_length} and"
            f" mask_prob={model.mask_prob} may give; raise it"
        )
    needed = 1 + 2 * masked
    length = model.decoder_seq_length or -(-needed // 8) * 8
    if length < needed:
        raise ConfigError(
            f"decoder_seq_length={length} is less than the {needed} tokens that seq_length={seq_length} and"
            f" mask_prob={model.mask_prob} may need; raise it or leave it out"
        )
    return model.replace(decoder_seq_length=length)
