"""Questions about real images: scikit-learn's handwritten digits, and what they are; and those that users ask."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from megajax.config import Config, ConfigError
from megajax.config_checks import require
from megajax.data.build import Datasets, Sizes
from megajax.data.images import Preparation, prepared
from megajax.data.tokenizers import Tokenizer
from megajax.models.multimodal.llava_config import IMAGE_TOKEN, LLaVAConfig
from megajax.models.request import Asked, Request
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


def ask(config: LLaVAConfig, tokenizer: Tokenizer, request: Request) -> Asked:
    """A text with images where it says <image>, or in front of it.

    Raises:
      ConfigError: there are no images, or not as many as the text names.
    """
    count = len(request.images)
    require(count > 0, "--image is missing: this model is asked about images; give --image FILE")
    text = request.text if IMAGE_TOKEN in request.text else IMAGE_TOKEN * count + request.text
    named = text.count(IMAGE_TOKEN)
    require(named == count, f"--prompt {request.text!r} names {named} images, and --image gives {count}; change one")
    shape = (config.vision_num_channels, config.img_h, config.img_w)
    how = request.preparation() if request.preparation else _preparation(config)
    images = np.stack([prepared(image, how, shape) for image in request.images])
    each = config.img_seq_len if config.image_placeholders == "each" else 1
    index = config.image_token_index
    ids = [id_ for one in _ids(text, tokenizer, request, index) for id_ in [one] * (each if one == index else 1)]

    def shown(new: Sequence[int]) -> str:
        runs = [(known, list(run)) for known, run in groupby([*ids, *new], lambda one: one == index)]
        return "".join(IMAGE_TOKEN * (len(run) // each) if k else tokenizer.detokenize(run) for k, run in runs)

    return Asked({"images": images[None], "tokens": np.array([ids], np.int32)}, tokenizer.eod, shown)


def _ids(text: str, tokenizer: Tokenizer, request: Request, index: int) -> list[int]:
    """Ids of a text, one for each <image> in it."""
    if tokenizer.token_id(IMAGE_TOKEN) == index:
        return request.tokenize(text)
    first, *others = text.split(IMAGE_TOKEN)
    ids = request.tokenize(first)
    for other in others:
        ids += [index, *tokenizer.tokenize(other)]
    return ids


def _preparation(config: LLaVAConfig) -> Preparation:
    """Of images as the trainer has them: from -1 to 1, or from 0 to 1 where the tower itself normalises them."""
    middle = 0.5 if config.vision_image_mean is None else 0.0
    spread = 0.5 if config.vision_image_mean is None else 1.0
    return Preparation(size=(config.img_h, config.img_w), mean=(middle,) * 3, std=(spread,) * 3)
