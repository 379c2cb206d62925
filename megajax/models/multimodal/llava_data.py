"""Questions about real images: scikit-learn's handwritten digits, and what they are."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megajax.config import Config, ConfigError
from megajax.data.build import Datasets, Sizes
from megajax.data.tokenizers import Tokenizer
from megajax.models.multimodal.llava_config import LLaVAConfig
from megajax.models.vision.vision_data import DIGIT_WORDS, Digits, Sample, at_size, datasets_of, load_digits, shifted

QUESTION = "Which digit is this? "


class Text(NamedTuple):
    """tokens, labels int32 [T]: an image, the question, the answer. loss_mask fp32 [S]: the answer, where the language
    model sees it."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray


def question_and_answer(config: LLaVAConfig, tokenizer: Tokenizer, answer: str, slots: int) -> Text:
    """The text of one sample, of as many tokens as fill `slots` when the image is put in.

    Raises:
      ConfigError: it has more.
    """
    image, each = config.img_seq_len, config.image_placeholders == "each"
    begin = [config.image_token_index] * (image if each else 1)
    question, said = tokenizer.tokenize(QUESTION), [*tokenizer.tokenize(answer), tokenizer.eod]
    length = slots if each else slots - image + 1
    filled = len(begin) + len(question) + len(said)
    if filled > length:
        needed = slots + filled - length
        raise ConfigError(
            f"seq_length={slots} is less than the {needed} of image, question and answer {answer!r}; raise it"
        )
    text = np.array([*begin, *question, *said, *[tokenizer.eod] * (length + 1 - filled)], np.int32)
    mask = np.zeros(slots, np.float32)
    first = image + len(question) - 1  # the slot that has to predict the answer's first token
    mask[first : first + len(said)] = 1.0
    return Text(text[:-1], text[1:], mask)


def samples(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """images fp32 [1, C, H, W], tokens and labels int32 [T], loss_mask fp32 [S]."""
    model = config.model
    assert isinstance(model, LLaVAConfig)
    texts = [question_and_answer(model, tokenizer, word, config.data.seq_length) for word in DIGIT_WORDS]

    def make(digits: Digits, training: bool) -> Callable[[np.random.Generator, int], Sample]:
        def sample(rng: np.random.Generator, index: int) -> Sample:
            image = shifted(digits.images[index], rng) if training else digits.images[index]
            text = texts[digits.labels[index]]
            return {"images": at_size(image, model.img_h, model.img_w)[None], **text._asdict()}

        return sample

    return datasets_of(load_digits(), make, sizes, config.train.seed)
