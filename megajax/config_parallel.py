"""How the devices are divided: the options of parallelism."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megajax.config_checks import require, require_positive

ContextComm = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the devices are divided. Devices that the other axes leave over are data parallel."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    """Also shard the residual stream over the tensor-parallel axis (needs tensor_model_parallel_size > 1)."""
    context_parallel_size: int = 1
    """Shards of the sequence inside attention and MLP."""
    cp_comm_type: ContextComm = "p2p"
    """How attention sees the whole sequence: p2p passes keys and values around a ring, all_gather collects them, a2a
    trades the sequence for heads (Ulysses), a2a+p2p does both, see hierarchical_context_parallel_sizes."""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None
    """Sizes of the a2a and of the p2p group, for cp_comm_type a2a+p2p."""
    expert_model_parallel_size: int = 1
    """Shards of the experts, carved out of data parallelism."""
    zero: Literal[0, 1, 2, 3] = 1
    """Over data parallelism: 0 replicates, 1 shards the optimizer state, 2 the gradients too, 3 also the parameters."""
    num_distributed_optimizer_instances: int = 1
    """Copies of what zero shards: it is sharded inside each of so many groups of data-parallel devices."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
        require_positive(self, "num_distributed_optimizer_instances")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel=True has no effect with tensor_model_parallel_size=1; raise it or drop the flag",
        )
        require(
            self.num_distributed_optimizer_instances == 1 or self.zero > 0,
            f"num_distributed_optimizer_instances={self.num_distributed_optimizer_instances} has no effect with zero=0;"
            " raise zero or drop it",
        )
        self._check_context()

    def _check_context(self) -> None:
        sizes = self.hierarchical_context_parallel_sizes
        if self.cp_comm_type != "a2a+p2p":
            require(
                sizes is None,
                f"hierarchical_context_parallel_sizes={sizes} has no effect with cp_comm_type={self.cp_comm_type!r};"
                " use a2a+p2p",
            )
        elif sizes is None or math.prod(sizes) != self.context_parallel_size:
            require(
                False,
                f"hierarchical_context_parallel_sizes={sizes} must be two sizes whose product is"
                f" context_parallel_size={self.context_parallel_size}",
            )

    @property
    def ulysses_size(self) -> int:
        """Shards of the sequence that attention trades for heads."""
        if self.cp_comm_type == "a2a":
            return self.context_parallel_size
        return self.hierarchical_context_parallel_sizes[0] if self.hierarchical_context_parallel_sizes else 1

    @property
    def ring_size(self) -> int:
        """Shards of the sequence between which keys and values travel."""
        return self.context_parallel_size // self.ulysses_size

    @property
    def model_parallel_size(self) -> int:
        """Devices that share one copy of the data."""
        return self.tensor_model_parallel_size * self.context_parallel_size
