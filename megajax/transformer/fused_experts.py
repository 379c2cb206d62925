"""The MLPs of experts by the fastest kernel that `megajax.kernels` knows for their products."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax.numpy as jnp

from megajax import kernels
from megajax.config_kernels import GroupedGemmBackend
from megajax.kernels import Capability, ExpertsUse
from megajax.ops.grouped import LOOP, GroupedKernel
from megajax.ops.grouped_kernel import LEAST, kernel_for
from megajax.parallel.expert import Dispatcher
from megajax.transformer.moe import Experts


class FusedExperts(Experts):
    """`Experts`, their parameters and their call, by a grouped kernel.

    The kernel is chosen when a call is traced and told to `kernels.recording`.

    Attributes:
      gpu: the compute capability of the devices that will run it; None is no NVIDIA GPU.
      wanted, strict: as in `kernels.choose_experts`.

    Raises:
      ConfigError: the kernel that was asked for cannot do it.
    """

    gpu: Capability | None = None
    wanted: GroupedGemmBackend = "auto"
    strict: bool = False

    def kernel(self, dispatcher: Dispatcher, dtype: Any, widths: tuple[int, int]) -> GroupedKernel:
        """What the table chooses."""
        use = ExpertsUse(
            dtype=jnp.dtype(dtype).name,
            padded=dispatcher.pads,
            aligned=all(width % LEAST == 0 for width in widths),
        )
        choice = kernels.choose_experts(use, self.gpu, self.wanted, strict=self.strict)
        kernels.record(choice)
        return kernel_for(self.gpu) if choice.kernel == "grouped" and self.gpu is not None else LOOP
