"""What somebody asks a model to write, and what the model reads of it."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from megajax.data.images import Preparation


class Request(NamedTuple):
    """What somebody wants a model to continue, or to answer.

    tokenize: a text to the ids that the model reads, with the special tokens around it that a published one expects.
    images: as `megajax.data.images.read_image` gives them. preparation: looks up how they become what the model reads,
      for a model that reads some; None: as the family's own data set does it.
    """

    text: str
    tokenize: Callable[[str], list[int]]
    images: Sequence[np.ndarray] = ()
    preparation: Callable[[], Preparation] | None = None


class Asked(NamedTuple):
    """A request as a model reads it.

    arrays: [1, ...] by name, for `megajax.inference.generate`.
    end: the id behind which nothing more is meant.
    text: what is shown of it and of the ids that the model has written.
    """

    arrays: Mapping[str, np.ndarray]
    end: int
    text: Callable[[Sequence[int]], str]
