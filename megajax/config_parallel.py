"""How the devices are divided: the options of parallelism."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megajax.config_checks import require, require_positive

_SPLIT_OPTIONS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_PIPELINE_OPTIONS = (
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_engine",
    "microbatch_group_size_per_vp_stage",
    "pipeline_model_parallel_layout",
    *_SPLIT_OPTIONS,
)

PipelineSchedule = Literal["1f1b", "gpipe", "zb-h1"]
PipelineEngine = Literal["lockstep", "table"]
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
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Chunks of layers on each stage (interleaved pipeline)."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """Order of forwards and backwards: 1f1b; gpipe runs all forwards first and keeps their activations; zb-h1 computes
    the gradients of weights apart, when a stage would wait."""
    pipeline_engine: PipelineEngine | None = None
    """What runs the schedule. lockstep: a forward and a backward of every stage at each tick; 1f1b of one stack of
    layers only; keeps up to 2 p - 1 microbatches. table: any schedule, one operation of each stage a tick; 1f1b keeps
    p microbatches, as Megatron's; no ring of context parallelism. None: table where chunks divide into two equal
    parts, but lockstep where layers are computed again, experts are shared out, context has rings or zero > 1."""
    microbatch_group_size_per_vp_stage: int | None = None
    """Microbatches that pass one chunk before the next chunk's turn; None: the number of stages. Needs the table."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers lie where, as in Megatron: `Et*3|(tt|)*29,m|L`. None divides them evenly."""
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    expert_model_parallel_size: int = 1
    """Shards of the experts: a part of data parallelism or, where that does not suffice, of everything but stages."""
    expert_tensor_parallel_size: int | None = None
    """Shards of each expert; None: as tensor_model_parallel_size. With another size experts are laid out apart from
    attention (folding), over the same devices of a stage, in Megatron's order."""
    overlap_moe_expert_parallel_comm: bool | None = None
    """In lockstep a forward and a backward run in one loop over layers, so that tokens of one travel while the other
    computes. Takes a tick more, and memory for both. None: where devices share out experts."""
    zero: Literal[0, 1, 2, 3] = 1
    """Over data, expert and context parallelism: 0 replicates, 1 shards the optimizer state, 2 the gradients too, 3
    also the parameters."""
    num_distributed_optimizer_instances: int = 1
    """Copies of what zero shards: it is sharded inside each of so many groups of data-parallel devices."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
        require_positive(self, "num_distributed_optimizer_instances", "pipeline_model_parallel_size")
        require_positive(self, "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers")
        require_positive(self, "decoder_last_pipeline_num_layers", "expert_tensor_parallel_size")
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
        self._check_pipeline()

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

    def _check_pipeline(self) -> None:
        require_positive(self, "microbatch_group_size_per_vp_stage")
        require(
            self.pipeline_model_parallel_size > 1 or self.pipeline_schedule == "1f1b",
            f"pipeline_schedule={self.pipeline_schedule!r} has no effect with pipeline_model_parallel_size=1; drop it",
        )
        require(
            self.pipeline_engine != "lockstep" or self.pipeline_schedule == "1f1b",
            f"pipeline_schedule={self.pipeline_schedule!r} needs pipeline_engine='table'; leave pipeline_engine out",
        )
        # A collective-permute is one meeting of all its pairs, also of those whose stage branches elsewhere.
        require(
            not self.runs_a_table or not self.zigzag,
            f"cp_comm_type={self.cp_comm_type!r} needs pipeline_engine='lockstep'; use a2a or all_gather with"
            f" pipeline_schedule={self.pipeline_schedule!r} and the table",
        )
        require(
            self.microbatch_group_size_per_vp_stage is None or self.runs_a_table,
            f"microbatch_group_size_per_vp_stage={self.microbatch_group_size_per_vp_stage} needs"
            " pipeline_engine='table'; set it",
        )
        require(
            self.overlap_moe_expert_parallel_comm is None or self._may_run_beside,
            f"overlap_moe_expert_parallel_comm={self.overlap_moe_expert_parallel_comm} needs"
            " pipeline_model_parallel_size and expert_model_parallel_size > 1, and pipeline_engine='lockstep'; drop it",
        )
        names = [name for name in _PIPELINE_OPTIONS if getattr(self, name) not in (None, False, 1)]
        if self.pipeline_model_parallel_size == 1 and names:
            value = getattr(self, names[0])
            require(False, f"{names[0]}={value!r} has no effect with pipeline_model_parallel_size=1; drop it")
        layout = self.pipeline_model_parallel_layout
        others = [name for name in names if name in _SPLIT_OPTIONS]
        if layout is not None and others:
            require(False, f"{others[0]}={getattr(self, others[0])} excludes pipeline_model_parallel_layout; drop one")

    @property
    def resolved_expert_tensor_parallel_size(self) -> int:
        """Shards of each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def runs_a_table(self) -> bool:
        """Whether the table's engine is asked for, or nothing else runs the schedule."""
        return (self.pipeline_engine or ("lockstep" if self.pipeline_schedule == "1f1b" else "table")) == "table"

    @property
    def runs_beside(self) -> bool:
        """Whether the forward and the backward of a tick run side by side."""
        return self._may_run_beside and self.overlap_moe_expert_parallel_comm is not False

    @property
    def _may_run_beside(self) -> bool:
        has_stages = self.pipeline_model_parallel_size > 1 and not self.runs_a_table
        return has_stages and self.expert_model_parallel_size > 1

    @property
    def stages_branch(self) -> bool:
        """Whether a stage may leave out what is another's: layers that it has fewer of, multi-token prediction.

        To a permute all devices have to come, whatever their stage. Rings of attention have some, and so have gradients
        that ZeRO divides, of weights that tensor parallelism does not. What zb-h1 cuts in two must be no branch.
        """
        has_stages = self.pipeline_model_parallel_size > 1
        return has_stages and not self.zigzag and self.zero < 2 and self.pipeline_schedule != "zb-h1"

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
    def zigzag(self) -> bool:
        """Whether each device of a ring holds an early and a late part of the sequence, which balances causal work."""
        return self.ring_size > 1 and self.cp_comm_type in ("p2p", "a2a+p2p")
