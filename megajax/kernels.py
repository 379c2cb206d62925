"""Which kernel fills a slot of a layer on which GPU, and why not a faster one: one table, never a silent fallback."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

from megajax.config import ConfigError
from megajax.config_kernels import Fp8Recipe, GroupedGemmBackend, KernelConfig

Capability = tuple[int, int]
"""CUDA's compute capability: (9, 0) is Hopper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionUse:
    """What attention is asked for.

    Attributes:
      dtype: of queries, keys and values.
      head_dim, value_dim: features of a query or key, and of a value.
      window: (left, right); -1 is unlimited.
      packed: segment ids keep the documents of a sequence apart.
      hidden_keys: a mask hides some keys from all queries; dense_mask: it differs between queries.
      varied_bias: one bias a sample. odd: an odd number of queries or keys.
      sink: `softmax_type` is not "vanilla". softcap: `attn_logit_softcapping` is set.
      cached: keys of earlier calls come before those of this one.
      ring, gathered: keys travel around a ring, or are gathered, under context parallelism; zigzag: balanced.
      cudnn_missing: the library is not there to compile with.
    """

    dtype: str
    head_dim: int
    value_dim: int
    causal: bool
    window: tuple[int, int] | None = None
    packed: bool = False
    hidden_keys: bool = False
    dense_mask: bool = False
    bias: bool = False
    varied_bias: bool = False
    odd: bool = False
    sink: bool = False
    softcap: bool = False
    dropout: bool = False
    cached: bool = False
    ring: bool = False
    gathered: bool = False
    zigzag: bool = False
    cudnn_missing: bool = False

    @property
    def windowed(self) -> bool:
        """Whether some key in the past or, without causality, in the future is out of reach."""
        left, right = self.window or (-1, -1)
        return left >= 0 or (right >= 0 and not self.causal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsUse:
    """What experts are asked for.

    Attributes:
      dtype: of their input.
      padded: all have the same number of rows, so that their products are one batched product.
      aligned: the widths of their linear maps, on a device, are multiples of 16, or of 32 in fp8.
      fp8: the recipe by which their products are wanted in fp8; None: they are not.
      as_mxfp8: as of `Fp8`.
    """

    dtype: str
    padded: bool = False
    aligned: bool = True
    fp8: Fp8Recipe | None = None
    as_mxfp8: bool = False


class Rule(NamedTuple):
    """What a kernel cannot do: whether it is asked for, and how one says so."""

    applies: Callable[[Any, Capability], bool]
    reason: str


_HALF = ("bfloat16", "float16")
_EVERY_FLASH_KERNEL = (
    Rule(lambda use, gpu: gpu < (8, 0), "needs compute capability 8.0 (A100) or more"),
    Rule(lambda use, gpu: use.dtype not in _HALF, "computes in bf16 or fp16; set bf16=True"),
    Rule(lambda use, gpu: use.dense_mask, "has no mask that differs between queries, which is O(S^2) of memory"),
)

# XLA's conditions for cuDNN 9.10 and later, in JAX's words: jax/_src/cudnn/fused_attention_stablehlo.py.
_CUDNN = (
    Rule(
        lambda use, gpu: use.dropout,
        "has no attention_dropout that differs from step to step; set attention_dropout=0",
    ),
    Rule(lambda use, gpu: use.softcap, "has no soft cap of scores, as attn_logit_softcapping asks for"),
    Rule(
        lambda use, gpu: use.cudnn_missing,
        "is not installed here, where the program is compiled; pip install --no-deps nvidia-cudnn-cu12",
    ),
    Rule(lambda use, gpu: use.head_dim % 8 > 0 or use.value_dim % 8 > 0, "needs head sizes that are multiples of 8"),
    Rule(lambda use, gpu: use.head_dim > 256, "has heads of up to 256 features"),
    Rule(lambda use, gpu: use.head_dim > 128 and gpu < (9, 0), "has heads of up to 128 features before Hopper"),
    Rule(lambda use, gpu: use.head_dim != use.value_dim and gpu < (9, 0), "has values of another size from Hopper on"),
    Rule(
        lambda use, gpu: use.packed,
        "keeps packed documents apart only with one log-sum-exp a document and position, or a dense bias",
    ),
    Rule(lambda use, gpu: use.varied_bias, "has no gradient of a bias that differs between samples"),
    Rule(lambda use, gpu: use.bias and use.odd, "needs even numbers of queries and keys beside a bias"),
    Rule(lambda use, gpu: use.hidden_keys, "would read a mask of keys as a dense bias"),
    Rule(lambda use, gpu: use.windowed and not use.causal, "has a window to the left of causal attention only"),
    Rule(
        lambda use, gpu: use.gathered and (use.causal or use.windowed),
        "does not know where a part of the sequence begins, as cp_comm_type='all_gather' needs; use p2p or a2a",
    ),
    Rule(lambda use, gpu: use.ring and use.causal and not use.zigzag, "needs the zigzag order in a ring"),
    Rule(
        lambda use, gpu: use.ring and use.windowed,
        "takes whole blocks and causal squares only in a ring (cp_comm_type p2p), no window; use a2a",
    ),
)

_PALLAS = (Rule(lambda use, gpu: max(use.head_dim, use.value_dim) > 512, "has heads of up to 512 features"),)

ATTENTION: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "cudnn": (*_EVERY_FLASH_KERNEL, *_CUDNN),
        "pallas": (*_EVERY_FLASH_KERNEL, *_PALLAS),
        "plain": (),
    }
)
"""Kernel -> what it cannot do; the fastest first."""

EXPERTS: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "grouped": (
            Rule(lambda use, gpu: gpu < (8, 0), "needs compute capability 8.0 (A100) or more"),
            Rule(lambda use, gpu: use.dtype not in _HALF, "computes in bf16 or fp16; set bf16=True"),
            Rule(
                lambda use, gpu: not use.aligned,
                "needs hidden_size (moe_latent_size) and a device's part of moe_ffn_hidden_size to be multiples of 16,"
                " or of 32 for fp8",
            ),
        ),
        "blocks": (),
    }
)
"""As `ATTENTION`, of experts that drop no token."""

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "cudnn": "cuDNN flash attention",
        "pallas": "Pallas flash attention",
        "plain": "plain JAX",
        "gemm": "cuBLAS or Triton, as XLA's autotuner finds",
        "fp8-tensorwise": "fp8, by cuBLASLt, scaled by each tensor's largest magnitude",
        "fp8-mxfp8": "MXFP8, by cuDNN, scaled by 32 numbers each",
        "fp8-blockwise": "fp8, by a Pallas kernel, scaled by 128 numbers, or 128 x 128 weights, each",
        "fp8-blockwise-as-mxfp8": "fp8, by cuDNN as MXFP8, scaled by 128 numbers, or 128 x 128 weights, each",
        "fp8-delayed": "fp8, by cuBLASLt, scaled by each tensor's largest magnitude in earlier steps",
        "xla": "XLA's own fusions",
        "grouped": "a grouped matrix product in Pallas",
        "blocks": "a loop of products",
        "grouped-fp8": "a grouped matrix product in Pallas, fp8, scaled by each expert's largest magnitudes",
        "blocks-fp8": "a loop of products, rounded to fp8 by each expert's largest magnitudes",
        "grouped-fp8-delayed": "a grouped matrix product in Pallas, fp8, scaled by each expert's largest magnitudes in"
        " earlier steps",
        "blocks-fp8-delayed": "a loop of products, rounded to fp8 by each expert's largest magnitudes in earlier steps",
        "grouped-fp8-blockwise": "a grouped matrix product in Pallas, fp8, scaled by 128 numbers, or 128 x 128 weights,"
        " each",
        "grouped-fp8-blockwise-as-mxfp8": "a grouped matrix product in Pallas, fp8 as MXFP8, scaled by 128 numbers, or"
        " 128 x 128 weights, each",
        "blocks-fp8-blockwise": "a loop of products, rounded to fp8 by 128 numbers, or 128 x 128 weights, each",
        "grouped-fp8-mxfp8": "a grouped matrix product in Pallas, MXFP8, scaled by 32 numbers each",
        "blocks-fp8-mxfp8": "a loop of products, rounded to MXFP8 by 32 numbers each",
    }
)

WANTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"auto": tuple(ATTENTION), "fused": ("cudnn", "pallas"), "unfused": ("plain",), "local": ("plain",)}
)
"""Value of `attention_backend` -> the kernels that are meant."""
_WANTED_OF_EXPERTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"auto": tuple(EXPERTS), "fused": ("grouped",), "unfused": ("blocks",)}
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a slot got. why: why nothing faster, "" where there is nothing faster."""

    slot: str
    kernel: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.slot}: {TITLES[self.kernel]}" + (f" ({self.why})" if self.why else "")


def refusal(
    kernel: str, use: Any, gpu: Capability | None, table: Mapping[str, tuple[Rule, ...]] = ATTENTION
) -> str | None:
    """Why a kernel of a table cannot do this on that GPU (None: no NVIDIA GPU); None where it can."""
    if gpu is None:
        return "needs an NVIDIA GPU" if table[kernel] else None
    return next((rule.reason for rule in table[kernel] if rule.applies(use, gpu)), None)


def choose_attention(use: AttentionUse, gpu: Capability | None, wanted: str, *, strict: bool = False) -> Choice:
    """The fastest kernel for a use.

    Args:
      gpu: None is no NVIDIA GPU.
      wanted: a value of `attention_backend`.
      strict: plain JAX is no answer, but for a cache of keys.

    Raises:
      ConfigError: none of the wanted kernels can do it.
    """
    if use.cached:
        return Choice(
            "attention to a cache", "plain", "flash kernels are used for whole sequences, not for what follows a cache"
        )
    reasons = {kernel: refusal(kernel, use, gpu) for kernel in WANTED[wanted]}
    return _first("attention", reasons, "plain", f"attention_backend={wanted!r}", strict)


def choose_experts(
    use: ExpertsUse, gpu: Capability | None, wanted: GroupedGemmBackend, *, strict: bool = False
) -> Choice:
    """The fastest kernel for experts; arguments as of `choose_attention`, wanted a value of `grouped_gemm_backend`.

    Raises:
      ConfigError: none of the wanted kernels can do it.
    """
    if use.padded:
        why = "fp8 is for experts that drop no token; set no moe_expert_capacity_factor" if use.fp8 else ""
        return Choice("experts", "plain" if gpu is None else "gemm", why)
    reasons = {kernel: refusal(kernel, use, gpu, EXPERTS) for kernel in _WANTED_OF_EXPERTS[wanted]}
    choice = _first("experts", reasons, "blocks", f"grouped_gemm_backend={wanted!r}", strict)
    if use.fp8 is None:
        return choice
    scaling = "" if use.fp8 == "tensorwise" else f"-{use.fp8}"
    if use.as_mxfp8 and choice.kernel == "grouped":
        scaling += "-as-mxfp8"
    return dataclasses.replace(choice, kernel=f"{choice.kernel}-fp8{scaling}")


def _first(slot: str, reasons: Mapping[str, str | None], plain: str, asked: str, strict: bool) -> Choice:
    """The first kernel that nothing speaks against; strict: it may not be `plain`."""
    against = []
    for kernel, reason in reasons.items():
        if reason is not None:
            against.append(f"{TITLES[kernel]} {reason}")
        elif not (strict and kernel == plain):
            return Choice(slot, kernel, "; ".join(against))
    field = "transformer_impl='transformer_engine'" if strict else asked
    raise ConfigError(f"{field} is not possible: {'; '.join(against)}; or use 'auto'")


_FP8_GPUS: Mapping[Fp8Recipe, tuple[Capability, str]] = MappingProxyType(
    {
        "tensorwise": ((8, 9), "Ada, Hopper"),
        "delayed": ((8, 9), "Ada, Hopper"),
        "blockwise": ((9, 0), "Hopper"),
        "mxfp8": ((10, 0), "Blackwell"),
    }
)
"""Recipe -> the least GPU for it, and what such are called."""


def choose_linears(gpu: Capability | None, wanted: KernelConfig) -> Choice:
    """What computes the linears of layers.

    Raises:
      ConfigError: fp8 is asked for and the GPU has none, or by a recipe that is not known here.
    """
    fp8, recipe = wanted.fp8, wanted.fp8_recipe
    if fp8 is None:
        return Choice("linears", "plain" if gpu is None else "gemm")
    if recipe not in _FP8_GPUS:
        raise ConfigError(f"fp8_recipe={recipe!r} is not supported; use one of {', '.join(map(repr, _FP8_GPUS))}")
    (least, name), (least_of_all, _) = _FP8_GPUS[recipe], _FP8_GPUS["tensorwise"]
    if gpu is None or gpu < least:
        field = f"fp8_format={fp8.format!r}" if least == least_of_all else f"fp8_recipe={recipe!r}"
        has_fp8 = gpu is not None and gpu >= least_of_all
        instead = "use tensorwise or delayed" if has_fp8 else "leave fp8_format out"
        here = "here is none" if gpu is None else f"this one has {gpu[0]}.{gpu[1]}"
        raise ConfigError(
            f"{field} needs an NVIDIA GPU of compute capability {least[0]}.{least[1]} ({name}) or more, {here};"
            f" {instead}"
        )
    return Choice("linears", fp8.on(gpu).title)


def other_slots(gpu: Capability | None, wanted: KernelConfig) -> tuple[Choice, ...]:
    """The slots that are the same in every layer."""
    # What XLA's fusions move, compiled for an H100, as a multiple of the fewest bytes there are: 1.0 forward, for
    # RMSNorm, LayerNorm and gated activations, and backward for these; 1.7 for RMSNorm backward and 3.0 for LayerNorm
    # backward, whose gradients of the scale take a pass of their own. cuDNN's norm, which XLA knows, moves 1.0 forward
    # and is not used backward, so it would be no gain.
    return (
        choose_linears(gpu, wanted),
        Choice("norms, activations, rotary embedding", "xla"),
    )


_RECORD: ContextVar[dict[Choice, None] | None] = ContextVar("choices of kernels", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[Choice, None]]:
    """Collects, in order and once each, the choices of what is traced inside."""
    found: dict[Choice, None] = {}
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


def record(choice: Choice) -> Choice:
    """Tells `recording`, if anyone listens."""
    found = _RECORD.get()
    if found is not None:
        found[choice] = None
    return choice
