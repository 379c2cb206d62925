"""Which sentences make a sample: Megatron's `build_mapping` (`core/datasets/helpers.cpp`), bit for bit, without C++."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

LONGEST_SENTENCE = 512
"""Documents of several sentences, one of which has more tokens, are left out."""
_BLOCK = 4096
_N, _M = 312, 156


def build_sentence_index(
    documents: np.ndarray,
    sentence_lengths: np.ndarray,
    *,
    max_samples: int | None,
    max_tokens: int,
    short_sequence_probability: float,
    min_sentences: int,
    seed: int,
) -> np.ndarray:
    """uint32 or int64 [N, 3]: first sentence of a sample, the one after its last, tokens that it is to have.

    Every document is cut into consecutive samples, each as many sentences as it takes to reach its number of tokens;
    at times, by chance, a lower one than `max_tokens`. The samples are shuffled over all epochs.

    Args:
      documents: int64[D, 2], first sentence of each document and the one after its last.
      max_samples: epochs are added until there are so many samples; None: one epoch.
    """
    lengths = sentence_lengths.astype(np.int64)
    usable = [(int(a), int(b)) for a, b in documents if _is_usable(lengths[a:b], min_sentences)]
    ratio = 0 if short_sequence_probability == 0 else _rounded(1.0 / short_sequence_probability)
    random = _uint32_stream(seed)

    def target() -> int:
        if ratio == 0:
            return max_tokens
        draw = next(random)
        return 2 + draw % (max_tokens - 1) if draw % ratio == 0 else max_tokens

    rows: list[tuple[int, int, int]] = []
    sizes = lengths.tolist()
    while usable:
        for first, end in usable:
            rows += _samples_of(first, end, sizes, min_sentences, target)
        if max_samples is None or len(rows) >= max_samples:
            break
    index = np.array(rows, np.int64).reshape(-1, 3)
    small = index.size == 0 or (index.max() <= np.iinfo(np.uint32).max and len(sizes) <= np.iinfo(np.uint32).max)
    return index[_shuffled(len(rows), seed + 1)].astype(np.uint32 if small else np.int64)


def _is_usable(lengths: np.ndarray, min_sentences: int) -> bool:
    if len(lengths) == 0 or len(lengths) < min_sentences:
        return False
    return len(lengths) == 1 or int(lengths.max()) <= LONGEST_SENTENCE


def _rounded(x: float) -> int:
    """C's `round`: halves go away from zero."""
    return int(np.floor(x + 0.5))


def _samples_of(
    first: int, end: int, sizes: list[int], min_sentences: int, target: Callable[[], int]
) -> Iterator[tuple[int, int, int]]:
    start, tokens, wanted = first, 0, target()
    for sentence in range(first, end):
        tokens += sizes[sentence]
        left = end - sentence - 1
        if left == 0 or (tokens >= wanted and left > 1 and sentence + 1 - start >= min_sentences):
            yield start, sentence + 1, wanted
            # Drawn after the last sample of a document, too, where nobody uses it.
            start, tokens, wanted = sentence + 1, 0, target()


def _uint32_stream(seed: int) -> Iterator[int]:
    """`std::mt19937(seed)`."""
    generator = np.random.MT19937()
    generator.state = np.random.RandomState(seed).get_state(legacy=False)  # pyright: ignore
    while True:
        yield from generator.random_raw(_BLOCK).tolist()


def _shuffled(count: int, seed: int) -> np.ndarray:
    """The permutation that Megatron's shuffle with `std::mt19937_64(seed)` makes of 0, 1, ..."""
    order = list(range(count))
    at = np.arange(count - 1, 0, -1, dtype=np.uint64)
    for i, j in zip(at.tolist(), (uint64_draws(seed, len(at)) % (at + np.uint64(1))).tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def uint64_draws(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers of `std::mt19937_64(seed)`, uint64 (Nishimura, 2000)."""
    word = seed % 2**64
    words = [word]
    for i in range(1, _N):
        word = (6364136223846793005 * (word ^ (word >> 62)) + i) % 2**64
        words.append(word)
    state = np.array(words, np.uint64)
    blocks = [_next_block(state) for _ in range(-(-count // _N))]
    return np.concatenate([np.zeros(0, np.uint64), *blocks])[:count]


def _next_block(state: np.ndarray) -> np.ndarray:
    """Moves `state` on and returns its 312 numbers."""

    def twisted(now: np.ndarray, following: np.ndarray, distant: np.ndarray) -> np.ndarray:
        mixed = (now & np.uint64(0xFFFFFFFF80000000)) | (following & np.uint64(0x7FFFFFFF))
        odd = np.where(mixed & np.uint64(1), np.uint64(0xB5026F5AA96619E9), np.uint64(0))
        return distant ^ (mixed >> np.uint64(1)) ^ odd

    # Each word depends on its successor as it was, and on the one _M further as it is: three runs that do not overlap.
    for a, b, distant in ((0, _M, _M), (_M, _N - 1, 0)):
        state[a:b] = twisted(state[a:b], state[a + 1 : b + 1], state[distant : distant + b - a])
    state[-1:] = twisted(state[-1:], state[:1], state[_M - 1 : _M])
    x = state.copy()
    x ^= (x >> np.uint64(29)) & np.uint64(0x5555555555555555)
    x ^= (x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
    x ^= (x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
    return x ^ (x >> np.uint64(43))
