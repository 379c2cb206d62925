"""How one tensor of a foreign file holds several parameters, where laying them side by side does not say it."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Codec(NamedTuple):
    """Between a tensor of a file and the parameters in it, each with the dims it has here.

    shape: of the tensor in the file. join: parameters -> tensor. split: its inverse.
    """

    shape: tuple[int, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
