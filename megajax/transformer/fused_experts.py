"""The MLPs of experts by the fastest kernel that `megajax.kernels` knows for their products."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax.numpy as jnp

from megajax import kernels
from megajax.config_kernels import Fp8, GroupedGemmBackend
from megajax.kernels import Capability, ExpertsUse
from megajax.ops import grouped_blocks, grouped_fp8
from megajax.ops.fp8_blocks import MX_BLOCK
from megajax.ops.grouped import LOOP, GroupedKernel
from megajax.ops.grouped_kernel import LEAST, block_parts, fp8_parts_for, kernel_for, mx_parts
from megajax.parallel.expert import Dispatcher
from megajax.transformer.fp8 import FORMATS
from megajax.transformer.moe import Experts


class FusedExperts(Experts):
    """`Experts`, their parameters and their call, by a grouped kernel.

    The kernel is chosen when a call is traced and told to `kernels.recording`.

    Attributes:
      gpu: the compute capability of the devices that will run it; None is no NVIDIA GPU.
      wanted, strict: as in `kernels.choose_experts`.
      fp8: what products of experts that drop no token are computed in; each expert's rows and kernels are scaled by
        their largest magnitudes, under delayed scaling by those of earlier steps, under blockwise and mxfp8 by those of
        tiles and blocks. None is the dtype of activations.

    Raises:
      ConfigError: the kernel that was asked for cannot do it.
    """

    gpu: Capability | None = None
    wanted: GroupedGemmBackend = "auto"
    strict: bool = False
    fp8: Fp8 | None = None

    def in_fp8(self) -> Fp8 | None:
        """Not where the table knows of no such kernel, nor in layers that are left out."""
        return None if self.config.leaves_fp8_out or self._dispatcher(tokens=1).pads else self.fp8

    def kernel(self, dispatcher: Dispatcher, dtype: Any, widths: tuple[int, int]) -> GroupedKernel:
        """What the table chooses."""
        fp8 = None if self.config.leaves_fp8_out else self.fp8
        least = LEAST if fp8 is None else grouped_fp8.LEAST
        use = ExpertsUse(
            dtype=jnp.dtype(dtype).name,
            padded=dispatcher.pads,
            aligned=all(width % least == 0 for width in widths),
            fp8=None if fp8 is None else fp8.recipe,
            as_mxfp8=fp8 is not None and fp8.as_mxfp8,
        )
        choice = kernels.choose_experts(use, self.gpu, self.wanted, strict=self.strict)
        kernels.record(choice)
        gpu = self.gpu if choice.kernel.startswith("grouped") else None
        if fp8 is None:
            return LOOP if gpu is None else kernel_for(gpu)
        if fp8.recipe == "blockwise":
            of_gpu = mx_parts if fp8.as_mxfp8 else block_parts
            parts = grouped_blocks.LOOP_PARTS if gpu is None else of_gpu()
            return grouped_blocks.block_grouped_kernel(parts, *FORMATS[fp8.format])
        if fp8.recipe == "mxfp8":
            parts = grouped_blocks.LOOP_PARTS if gpu is None else mx_parts()
            return grouped_blocks.block_grouped_kernel(parts, *FORMATS[fp8.format], tile=MX_BLOCK, square=False)
        parts = grouped_fp8.LOOP_PARTS if gpu is None else fp8_parts_for(gpu)
        return grouped_fp8.fp8_grouped_kernel(parts, *FORMATS[fp8.format], wgrad=fp8.wgrad)
