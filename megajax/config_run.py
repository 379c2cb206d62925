"""Options of a run: its data, its checkpoints, how long it trains and what it reports."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

from megajax.config_checks import parse_split, require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is tokenized, split and loaded."""

    data: tuple[str, ...] = ()
    """FILE.txt, FILE.jsonl or PREFIX(.bin/.idx); several make a blend, each may follow its weight. Nothing given:
    the English documentation that ships inside Python."""
    json_key: str = "text"
    split: str = "969,30,1"
    """Relative sizes of train, validation and test."""
    tokenizer: str = "byte"
    """`byte`, `null:VOCAB` (numbers as text), or the path of a `tokenizer.json`, a sentencepiece `.model` or a tiktoken
    file."""
    seq_length: int = 256
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    """Documents packed into one sample do not see each other."""
    eod_mask_loss: bool = False
    data_cache_path: str | None = None
    num_workers: int = 0
    """Processes that read ahead; 0 reads in a thread."""

    def __post_init__(self) -> None:
        require_positive(self, "seq_length")
        require(self.num_workers >= 0, f"num_workers={self.num_workers} must not be negative")
        parse_split(self.split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and when the training state is saved, and what is read at the start."""

    save: str | None = None
    """Folder of the checkpoints; None is `<run_dir>/checkpoints`."""
    load: str | None = None
    """Folder to start from when `save` holds nothing yet; None starts fresh."""
    save_interval: int | None = None
    """Steps between checkpoints; None saves at the end only."""
    save_retain: int = 2
    """Keep this many of the newest checkpoints."""
    async_save: bool = True
    finetune: bool = False
    """Take only the weights from `load`: step, optimizer and data start anew."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "save_retain")
        require(not self.finetune or self.load is not None, "finetune=True needs load=FOLDER with the weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: how long, how much at a time, what is reported, when it stops."""

    train_iters: int = 500
    train_samples: int | None = None
    """Train for this many samples instead of `train_iters` steps."""
    micro_batch_size: int = 8
    """Samples that one data-parallel shard processes at once."""
    global_batch_size: int | None = None
    """Samples a step; None is micro_batch_size times the data-parallel size. More than that accumulates gradients."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """(start, increment, samples): the global batch grows from start to global_batch_size over these samples."""
    calculate_per_token_loss: bool = True
    """True weights every token alike. False is Megatron's default: the mean over microbatches of their means."""
    seed: int = 1234
    run_dir: str | None = None
    """Folder for everything the run writes; None is `runs/<model>`."""
    log_interval: int = 10
    eval_interval: int = 100
    eval_iters: int = 10
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    max_skipped_steps: int = 10
    """Stop after this many skipped updates in a row (NaN, infinity, or a spike)."""
    spike_factor: float = 0.0
    """Skip an update whose gradient norm exceeds this many times its running mean; 0 is off."""
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    profile_step_start: int | None = None
    profile_step_end: int | None = None
    sample_prompt: str = "The "
    sample_tokens: int = 160
    """Tokens of the text printed at the end; 0 prints none."""

    def __post_init__(self) -> None:
        require_positive(self, "train_iters", "train_samples", "micro_batch_size", "global_batch_size", "log_interval")
        require_positive(self, "eval_interval", "eval_iters", "exit_interval", "exit_duration_in_mins")
        require_positive(self, "max_skipped_steps")
        require(self.sample_tokens >= 0, f"sample_tokens={self.sample_tokens} must not be negative")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"spike_factor={self.spike_factor} must be 0 (off) or above 1",
        )
        if self.rampup_batch_size is not None:
            start, increment, samples = self.rampup_batch_size
            require(
                start > 0 and increment > 0 and samples >= 0,
                f"rampup_batch_size={self.rampup_batch_size} must be start > 0, increment > 0, samples >= 0",
            )
