"""What the matrix products and kernels of a compiled program compute, and what they go by."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re
from collections.abc import Callable

from megajax.parallel.hlo import Instruction, arrays_of, flops_of

RERUN = "rematted_computation"
"""In the name of what `jax.checkpoint` runs a second time."""

SCALED_BLOCKS = "__cudnn$blockScaledDot"
"""cuDNN's product of fp8 arrays of which blocks have scales."""

BlocksOf = Callable[[int], int]
"""Rows of a block -> blocks that hold rows of experts, which only a run knows."""


def executed_flops(instruction: Instruction, blocks_of: BlocksOf) -> int:
    """Of a matrix product or a kernel of attention or experts; 0 of all else."""
    if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
        return flops_of(instruction)
    if "__cudnn$fmha" in instruction.attributes:
        return attention_flops(instruction)
    if SCALED_BLOCKS in instruction.attributes:  # [B, M, K] by [B, N, K]
        return 2 * math.prod(arrays_of(instruction.shape)[0]) * arrays_of(instruction.reads[0].shape)[0][-1]
    if told(instruction, "flops"):
        return told(instruction, "flops")
    return (rows_of_groups(instruction, blocks_of) or 0) * told(instruction, "flops_a_row")


def told(instruction: Instruction, what: str) -> int:
    """A number that a kernel of this library says of itself (`set_xla_metadata`); 0 of all else."""
    if instruction.opcode != "custom-call":
        return 0
    found = re.search(rf'frontend_attributes=\{{[^}}]*\b{what}="(\d+)"', instruction.attributes)
    return 0 if found is None else int(found[1])


def rows_of_groups(instruction: Instruction, blocks_of: BlocksOf) -> int | None:
    """Rows that a grouped kernel computes (`megajax.ops.grouped_kernel`); None of all else."""
    block = told(instruction, "rows_a_block")
    return block * blocks_of(block) if block else None


def recomputed_share(instruction: Instruction) -> float:
    """The share of its FLOPs that were done before: all under `jax.checkpoint`'s second run, as JAX names it, one of
    the five products of cuDNN attention's backward pass, the scores, and what other kernels say of themselves.
    """
    if RERUN in instruction.op_name:
        return 1.0
    again = told(instruction, "flops_again")
    if again:
        return again / told(instruction, "flops")
    return 0.2 if "__cudnn$fmha" in instruction.attributes and "Backward" in instruction.attributes else 0.0


def attention_flops(instruction: Instruction) -> int:
    """Of a call of cuDNN's attention on q [B, S, N, K] and k [B, T, G, K]: two products of 2 B N S T K forward and five
    backward, halved under a causal mask, as half of each is needed.
    """
    q, k = (arrays_of(read.shape)[0] for read in instruction.reads[:2])
    products = 5 if "Backward" in instruction.attributes else 2
    causal = re.search(r'"mask_type":\s*"[A-Z_]*CAUSAL', instruction.attributes) is not None
    return products * 2 * math.prod(q) * k[1] // (2 if causal else 1)


_XLA_KERNELS = {
    "__triton_gemm": "XLA: Triton matrix product",
    "__triton_nested_gemm_fusion": "XLA: Triton matrix product",
    "__triton": "XLA: Triton reduction",
    "__custom_fusion": "XLA: custom fusion",
}


def kernel_name(instruction: Instruction) -> str | None:
    """What a call of a library or a hand-written kernel goes by; None for what XLA generates for itself."""
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    if target is not None and "triton" in target[1]:
        name = re.search(r'\bname = "(\w+)"', instruction.attributes)
        return f"Pallas: {target[1] if name is None else name[1]}"
    if target is not None:
        return target[1]
    kind = re.search(r'"kind":"(__[\w$]+)"', instruction.attributes)
    return None if kind is None else _XLA_KERNELS.get(kind[1], kind[1])
