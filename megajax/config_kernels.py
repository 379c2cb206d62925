"""Which kernels compute a model: plain JAX, or those made for the GPU at hand."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config_checks import require

TransformerImpl = Literal["auto", "local", "transformer_engine"]
AttentionBackend = Literal["auto", "fused", "unfused", "local"]
GroupedGemmBackend = Literal["auto", "fused", "unfused"]
Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8", "custom"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Choice of kernels. What was chosen, and why, is printed when a run starts and by `python -m megajax.doctor`."""

    transformer_impl: TransformerImpl = "auto"
    """local: plain JAX; transformer_engine: fused kernels, an error where there is none; auto: fused ones where a GPU
    has them."""
    attention_backend: AttentionBackend = "auto"
    """fused: cuDNN or Pallas; unfused or local: plain JAX; auto: the first of these that can do it."""
    grouped_gemm_backend: GroupedGemmBackend = "auto"
    """How experts that drop no token are computed. fused: all their products in one kernel; unfused: a loop of products
    in plain JAX; auto: the first of these that can do it."""
    fp8_format: Fp8Format | None = None
    """Linears of the layers compute in fp8, all but the experts and routers: e4m3, or hybrid, which has gradients in
    e5m2."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How tensors are scaled to fp8. tensorwise: each by its own largest magnitude; others are not supported yet."""

    def __post_init__(self) -> None:
        require(
            self.transformer_impl != "local" or self.attention_backend in ("auto", "unfused", "local"),
            f"attention_backend={self.attention_backend!r} is not possible with transformer_impl='local'; drop one",
        )
        require(
            self.transformer_impl != "local" or self.grouped_gemm_backend != "fused",
            "grouped_gemm_backend='fused' is not possible with transformer_impl='local'; drop one",
        )
        require(
            self.transformer_impl != "transformer_engine" or self.grouped_gemm_backend != "unfused",
            "grouped_gemm_backend='unfused' is not possible with transformer_impl='transformer_engine'; use"
            " transformer_impl='auto'",
        )
        require(
            self.fp8_format is None or self.transformer_impl != "local",
            f"fp8_format={self.fp8_format!r} is not possible with transformer_impl='local'; drop one",
        )
        require(
            self.transformer_impl != "transformer_engine" or self.attention_backend not in ("unfused", "local"),
            f"attention_backend={self.attention_backend!r} is not possible with transformer_impl='transformer_engine';"
            " use transformer_impl='auto'",
        )
