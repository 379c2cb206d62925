"""Activation recomputation: which parts of a layer forget their activations and run again in the backward pass."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from megajax.config import TransformerConfig


def recomputed(module: nn.Module, part: str, config: TransformerConfig) -> Callable[..., Any]:
    """`module`, recomputed in the backward pass if `recompute_modules` names this `part` (selective recomputation,
    arXiv:2205.05198)."""
    if config.recompute_granularity != "selective" or part not in config.recompute_modules:
        return module

    def call(*args: Any, **kwargs: Any) -> Any:
        # Keyword arguments that are not arrays (deterministic=True) stay Python values: they are closed over.
        arrays = {name: value for name, value in kwargs.items() if not isinstance(value, bool)}
        static = {name: value for name, value in kwargs.items() if isinstance(value, bool)}

        def run(inner: nn.Module, *inner_args: Any) -> Any:
            *positional, keyword = inner_args
            return inner(*positional, **keyword, **static)  # type: ignore[operator]

        # Forward and backward are separate loops of a scan: nothing has to keep XLA from merging them, and the barrier
        # that would holds back what needs no activation, such as a gather, until all that is recomputed with is there.
        return nn.remat(run, prevent_cse=False)(module, *args, arrays)

    return call
