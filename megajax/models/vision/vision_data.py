"""Real images that need no download: scikit-learn's handwritten digits, with words for them."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megajax.config import Config, ConfigError
from megajax.data.build import Datasets, Sizes
from megajax.data.tokenizers import Tokenizer

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "a photo of the number {}", "the digit {}", "{}, written by hand")
"""Ways to say what an image shows; the first is the one that a trained model is asked with."""
SIDE = 8
"""Rows and columns of a digit."""
_HELD_OUT = 360
"""Digits that no model is trained on: half for validation, half for tests."""
Sample = dict[str, np.ndarray]


class Digits(NamedTuple):
    """images: fp32 [N, 3, 8, 8], from -1 (paper) to 1 (ink). labels: int32 [N], the digit."""

    images: np.ndarray
    labels: np.ndarray


class DigitSplits(NamedTuple):
    """What models are trained on, and what they are not. No image is in two of them."""

    train: Digits
    validation: Digits
    test: Digits


def load_digits() -> DigitSplits:
    """The 1,797 digits of scikit-learn (Alpaydin and Kaynak, 1998), in a fixed random order.

    Raises:
      ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ConfigError(
            "the default images are those of scikit-learn, which is not installed; pip install 'megajax[vision]'"
        ) from None
    bunch: Any = load()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    gray = (bunch.images[order].astype(np.float32) / 8.0 - 1.0)[:, None]
    images, labels = np.repeat(gray, 3, axis=1), bunch.target[order].astype(np.int32)
    ends = (len(labels) - _HELD_OUT, len(labels) - _HELD_OUT // 2, len(labels))
    starts = (0, *ends[:2])
    return DigitSplits(*(Digits(images[a:b], labels[a:b]) for a, b in zip(starts, ends, strict=True)))


def at_size(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images [..., 8, 8] enlarged to [..., height, width] by repeating pixels.

    Raises:
      ConfigError: the size is no multiple of 8.
    """
    if height % SIDE or width % SIDE:
        raise ConfigError(f"img_h={height}, img_w={width}: digits are {SIDE} x {SIDE}; make both a multiple of {SIDE}")
    return images.repeat(height // SIDE, axis=-2).repeat(width // SIDE, axis=-1)


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image [..., H, W] moved by up to one pixel in each direction; paper comes in at the edges."""
    down, right = rng.integers(-1, 2, size=2)
    moved = np.full_like(image, -1.0)
    H, W = image.shape[-2:]
    moved[..., max(0, down) : H + min(0, down), max(0, right) : W + min(0, right)] = image[
        ..., max(0, -down) : H + min(0, -down), max(0, -right) : W + min(0, -right)
    ]
    return moved


class ImageSamples:
    """Samples that `make(rng, image index)` makes, each from another image until all have had their turn.

    Sample i depends on nothing but the seed and i.

    Args:
      count: images there are.
      length: samples.
      shuffle: whether each turn has an order of its own; else images come as they are stored.
    """

    def __init__(
        self, make: Callable[[np.random.Generator, int], Sample], count: int, length: int, *, seed: int, shuffle: bool
    ) -> None:
        self._make, self._count, self._length, self._seed, self._shuffle = make, count, length, seed, shuffle
        self._turn, self._order = -1, np.arange(count)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        turn, at = divmod(int(index), self._count)
        order = self._order_of(turn) if self._shuffle else np.arange(self._count)
        return self._make(np.random.default_rng((self._seed, int(index))), int(order[at]))

    def _order_of(self, turn: int) -> np.ndarray:
        known, order = self._turn, self._order
        if known != turn:  # threads may do this twice, which changes nothing
            order = np.random.default_rng((self._seed, turn, self._count)).permutation(self._count)
            self._turn, self._order = -1, order
            self._turn = turn
        return order


def datasets_of(
    splits: DigitSplits,
    make: Callable[[Digits, bool], Callable[[np.random.Generator, int], Sample]],
    sizes: Sizes,
    seed: int,
) -> Datasets:
    """Data sets of samples; make: (digits, whether they are trained on) -> what makes one."""

    def build(digits: Digits, size: int | None, training: bool) -> ImageSamples:
        count = len(digits.labels)
        length = count if size is None else max(size, 1)
        return ImageSamples(make(digits, training), count, length, seed=seed, shuffle=training)

    return Datasets(
        build(splits.train, sizes.train, True),
        build(splits.validation, sizes.validation, False),
        build(splits.test, sizes.test, False),
    )


def refuse_text(config: Config) -> None:
    """Refuses `data`, which is text. Raises ConfigError."""
    if config.data.data:
        raise ConfigError(
            f"data={' '.join(config.data.data)}: --model {config.model_family} reads images, for now those of"
            " scikit-learn; drop it"
        )


def padded(ids: Sequence[int], length: int, pad: int, what: str) -> np.ndarray:
    """Token ids int32 [length], filled up with `pad`. Raises ConfigError where they are more."""
    if len(ids) > length:
        raise ConfigError(f"seq_length={length} is less than the {len(ids)} tokens of {what}; raise it")
    return np.array([*ids, *[pad] * (length - len(ids))], np.int32)


def caption_tokens(tokenizer: Tokenizer, caption: str, length: int) -> np.ndarray:
    """A caption's tokens and the end-of-document id, int32 [length], filled up with that id."""
    return padded([*tokenizer.tokenize(caption), tokenizer.eod], length, tokenizer.eod, f"{caption!r} and its end")


def caption_samples(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Digits and captions: images fp32 [3, H, W], tokens int32 [S], label int32 [], loss_mask fp32 [1]."""
    H, W, S = config.model.img_h, config.model.img_w, config.data.seq_length  # pyright: ignore
    table = [[caption_tokens(tokenizer, c.format(word), S) for c in CAPTIONS] for word in DIGIT_WORDS]

    def make(digits: Digits, training: bool) -> Callable[[np.random.Generator, int], Sample]:
        def sample(rng: np.random.Generator, index: int) -> Sample:
            image, label = digits.images[index], digits.labels[index]
            if training:
                image = shifted(image, rng)
            caption = int(rng.integers(len(CAPTIONS))) if training else 0
            return {
                "images": at_size(image, H, W),
                "tokens": table[label][caption],
                "loss_mask": np.ones(1, np.float32),
            }

        return sample

    return datasets_of(load_digits(), make, sizes, config.train.seed)


def class_samples(config: Config, tokenizer: Tokenizer, sizes: Sizes) -> Datasets:
    """Digits and their class: images fp32 [3, H, W], labels int32 [1], loss_mask fp32 [1]."""
    del tokenizer
    H, W = config.model.img_h, config.model.img_w  # pyright: ignore

    def make(digits: Digits, training: bool) -> Callable[[np.random.Generator, int], Sample]:
        def sample(rng: np.random.Generator, index: int) -> Sample:
            image = shifted(digits.images[index], rng) if training else digits.images[index]
            label = digits.labels[index : index + 1]
            return {"images": at_size(image, H, W), "labels": label, "loss_mask": np.ones(1, np.float32)}

        return sample

    return datasets_of(load_digits(), make, sizes, config.train.seed)
