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
Fp8AmaxAlgo = Literal["most_recent", "max"]


@dataclasses.dataclass(frozen=True)
class Fp8:
    """How linear layers compute in fp8; the fields are those of `KernelConfig`. as_mxfp8: of blockwise, each tile is
    multiplied as four blocks of MXFP8, which GPUs from Blackwell on know."""

    format: Fp8Format
    recipe: Fp8Recipe = "tensorwise"
    margin: int = 0
    amax_history_len: int = 1
    amax_compute_algo: Fp8AmaxAlgo = "most_recent"
    wgrad: bool = True
    as_mxfp8: bool = False

    @property
    def title(self) -> str:
        """Of what computes linears, in `megajax.kernels`."""
        return f"fp8-{self.recipe}{'-as-mxfp8' if self.as_mxfp8 else ''}"

    def on(self, gpu: tuple[int, int]) -> Fp8:
        """As GPUs of this compute capability multiply it."""
        return dataclasses.replace(self, as_mxfp8=self.recipe == "blockwise" and gpu >= (10, 0))


_AS_OTHERS = {"first_last_layers_bf16": False, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8LayersConfig:
    """Which layers of a model do not compute in fp8 where the others do."""

    # Layers without fp8
    first_last_layers_bf16: bool = False
    """The first and the last layers compute as they do without fp8."""
    num_layers_at_start_in_bf16: int = 1
    """How many of the first ones, with first_last_layers_bf16."""
    num_layers_at_end_in_bf16: int = 1
    """How many of the last ones."""

    @property
    def leaves_fp8_out(self) -> bool:
        """Of the config of one layer (`TransformerConfig.for_layer`): whether it is one of those."""
        return self.first_last_layers_bf16 and self.num_layers_at_start_in_bf16 == self.num_layers_at_end_in_bf16 == 0

    def _fp8_of_layer(self, index: int, num_layers: int) -> dict[str, int]:
        """Changes that make the config that of layer `index`."""
        if not self.first_last_layers_bf16:
            return {}
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        if not start <= index < num_layers - end:
            return {"num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
        return _AS_OTHERS


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
    """Linears of the layers, and experts that drop no token, compute in fp8, all but the routers: e4m3, or hybrid,
    which has gradients in e5m2."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How tensors are scaled to fp8. tensorwise: each by its own largest magnitude. delayed: by those of earlier steps,
    which a run keeps among its parameters. blockwise: 128 numbers each, or 128 x 128 weights, by theirs, to a power of
    two; from Hopper on. mxfp8: 32 numbers each, likewise; from Blackwell on. custom is not supported."""
    fp8_margin: int = 0
    """Of delayed scaling: powers of two between the largest magnitude expected and the largest number of the type."""
    fp8_amax_history_len: int = 1
    """Of delayed scaling: how many steps' largest magnitudes are kept."""
    fp8_amax_compute_algo: Fp8AmaxAlgo = "most_recent"
    """Of delayed scaling: which of them count. most_recent: the last step's; max: the largest of all that are kept."""
    fp8_wgrad: bool = True
    """Of delayed scaling: gradients of weights are products in fp8, too."""

    @property
    def fp8(self) -> Fp8 | None:
        """How linear layers compute in fp8; None: they do not."""
        if self.fp8_format is None:
            return None
        return Fp8(
            format=self.fp8_format,
            recipe=self.fp8_recipe,
            margin=self.fp8_margin,
            amax_history_len=self.fp8_amax_history_len,
            amax_compute_algo=self.fp8_amax_compute_algo,
            wgrad=self.fp8_wgrad,
        )

    def __post_init__(self) -> None:
        require(
            self.fp8_amax_history_len >= 1,
            f"fp8_amax_history_len={self.fp8_amax_history_len} keeps nothing; set it to 1 or more",
        )
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
