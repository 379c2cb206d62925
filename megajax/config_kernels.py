"""Which kernels compute a model: plain JAX, or those made for the GPU at hand."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config_checks import require

TransformerImpl = Literal["auto", "local", "transformer_engine"]
AttentionBackend = Literal["auto", "fused", "flash", "unfused", "local"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Choice of kernels. What was chosen, and why, is printed when a run starts and by `python -m megajax.doctor`."""

    transformer_impl: TransformerImpl = "auto"
    """local: plain JAX; transformer_engine: fused kernels, an error where there is none; auto: fused ones where a GPU
    has them."""
    attention_backend: AttentionBackend = "auto"
    """fused: cuDNN; flash: Pallas; unfused or local: plain JAX; auto: the first of these that can do it."""

    def __post_init__(self) -> None:
        require(
            self.transformer_impl != "local" or self.attention_backend in ("auto", "unfused", "local"),
            f"attention_backend={self.attention_backend!r} is not possible with transformer_impl='local'; drop one",
        )
        require(
            self.transformer_impl != "transformer_engine" or self.attention_backend not in ("unfused", "local"),
            f"attention_backend={self.attention_backend!r} is not possible with transformer_impl='transformer_engine';"
            " use transformer_impl='auto'",
        )
