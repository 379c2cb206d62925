"""Learning rate and weight decay as pure functions of the samples consumed so far.

The rules are those of Megatron's `OptimizerParamScheduler` (`megatron/core/optimizer_param_scheduler.py`). One
implementation serves both sides: a Python number is evaluated on the host in float64, a jax array (also a traced one)
in float32 inside the compiled step.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError, OptimizerConfig

Number = Any
"""A Python or numpy number or array (float64 on the host), or a jax array (float32)."""

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
IncreaseStyle = Literal["constant", "linear", "cosine"]

_COUNTER_LIMIT = 2**32
"""The training state counts samples in a uint32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate and weight decay over a run. All lengths are in samples. Make one with `make_schedule`.

    With n samples consumed, W = `warmup`, D = `decay`, A = `wsd_decay`, in this order:

    * n <= W, W > 0: `init_lr + (max_lr - init_lr) n / W`
    * constant: `max_lr`
    * n > D: `min_lr`
    * inverse-square-root: `max(min_lr, max_lr sqrt(max(W, 1) / max(n, 1)))`
    * otherwise `min_lr + c (max_lr - min_lr)`, with r = (n - W) / (D - W) and q = (n - (D - A)) / A, at least 0:
      linear `c = 1 - r`; cosine `c = (cos(pi r) + 1) / 2`; WSD of style linear `1 - q`, cosine `(cos(pi q) + 1) / 2`,
      exponential `2 0.5^q - 1`, minus_sqrt `1 - sqrt(q)`.

    The decoupled learning rate (embedding and output layer) follows the same rules between its own two ends.
    """

    init_lr: float
    max_lr: float
    min_lr: float
    decoupled_max_lr: float
    decoupled_min_lr: float
    warmup: float
    decay: int
    style: DecayStyle
    wsd_decay: int | None
    wsd_style: WSDStyle
    start_wd: float
    end_wd: float
    wd_steps: int
    wd_style: IncreaseStyle

    def learning_rate(self, samples: Number) -> Number:
        """The learning rate of an update made after `samples` samples."""
        return self._learning_rate(samples, self.max_lr, self.min_lr)

    def decoupled_learning_rate(self, samples: Number) -> Number:
        """The learning rate of the embedding and the output layer; equal to the other one if none was configured."""
        return self._learning_rate(samples, self.decoupled_max_lr, self.decoupled_min_lr)

    def weight_decay(self, samples: Number) -> Number:
        """The weight decay of an update made after `samples` samples: `start_wd + c (end_wd - start_wd)`.

        With r = samples / wd_steps: linear `c = r`, cosine `c = (cos(pi (1 - r)) + 1) / 2`. Past `wd_steps`, and
        for the constant style, it is `end_wd`.
        """
        n, xp = _prepare(samples)
        r = _after(n, 0, xp) / self.wd_steps
        coefficient = {"constant": 1.0 + 0.0 * r, "linear": r, "cosine": 0.5 * (xp.cos(math.pi * (1.0 - r)) + 1.0)}
        value = self.start_wd + coefficient[self.wd_style] * (self.end_wd - self.start_wd)
        return _select(xp, n > _count(self.wd_steps, xp), self.end_wd, value)

    def _learning_rate(self, samples: Number, max_lr: float, min_lr: float) -> Number:
        n, xp = _prepare(samples)
        warm = self.init_lr + (max_lr - self.init_lr) * _after(n, 0, xp) / (self.warmup or 1.0)
        warming = (n <= _count(self.warmup, xp)) & (self.warmup > 0)
        if self.style == "constant":
            return _select(xp, warming, warm, max_lr)
        if self.style == "inverse-square-root":
            at_least_one = xp.maximum(_after(n, 0, xp), 1.0)
            decayed = xp.maximum(max_lr * max(self.warmup, 1.0) ** 0.5 / at_least_one**0.5, min_lr)
        else:
            decayed = min_lr + self._coefficient(n, xp) * (max_lr - min_lr)
        return _select(xp, warming, warm, _select(xp, n > _count(self.decay, xp), min_lr, decayed))

    def _coefficient(self, n: Number, xp: Any) -> Number:
        """Where between `min_lr` (0) and `max_lr` (1) the decay stands."""
        if self.style == "WSD":
            assert self.wsd_decay is not None
            q = _after(n, self.decay - self.wsd_decay, xp) / self.wsd_decay
            q = xp.minimum(q, 1.0)
            return {
                "linear": 1.0 - q,
                "cosine": 0.5 * (xp.cos(math.pi * q) + 1.0),
                "exponential": 2.0 * 0.5**q - 1.0,
                "minus_sqrt": 1.0 - xp.sqrt(q),
            }[self.wsd_style]
        r = _after(n, self.warmup, xp) / (self.decay - self.warmup)
        return 1.0 - r if self.style == "linear" else 0.5 * (xp.cos(math.pi * r) + 1.0)


def _prepare(samples: Number) -> tuple[Number, Any]:
    """The counter and the array library that computes with it."""
    if isinstance(samples, jax.Array):
        return samples.astype(jnp.uint32), jnp
    return np.asarray(samples, np.float64), np


def _count(samples: float, xp: Any) -> Number:
    """The whole part of `samples` in the counter's type: a Python number above 2**31 overflows jax's int32."""
    return np.float64(math.floor(samples)) if xp is np else np.uint32(math.floor(samples))


def _after(n: Number, start: float, xp: Any) -> Number:
    """`max(n - start, 0)` in floating point.

    Whole samples are subtracted before the conversion: late in a long run a float32 no longer holds n itself exactly.
    """
    whole = _count(start, xp)
    past = (xp.maximum(n, whole) - whole).astype(xp.float64 if xp is np else xp.float32)
    return xp.maximum(past - (start - math.floor(start)), 0.0)


def _select(xp: Any, condition: Number, yes: Number, no: Number) -> Number:
    chosen = xp.where(condition, yes, no)
    return chosen[()] if xp is np else chosen.astype(jnp.float32)  # [()]: a number, not an array without dimensions


def make_schedule(
    config: OptimizerConfig,
    *,
    global_batch_size: int,
    train_iters: int | None = None,
    train_samples: int | None = None,
) -> Schedule:
    """Resolves the flags of `config` to samples, as Megatron's `get_optimizer_param_scheduler` does.

    Args:
      global_batch_size: the final one; `*_iters` mean steps of that size even while the batch size ramps up.
      train_iters: length of the run in steps. Lengths in `config` must then be in steps as well.
      train_samples: length of the run in samples; if given, lengths in `config` must be in samples too.

    Raises:
      ConfigError: units are mixed, the warm-up does not end before the decay does, or an option would have no effect.
    """
    by_samples = train_samples is not None
    total = train_samples if train_samples is not None else _in_samples(train_iters or 0, global_batch_size)
    if total <= 0:
        raise ConfigError("a schedule needs the length of the run; give train_iters or train_samples")
    _refuse_mixed_units(config, by_samples=by_samples)
    decay = _length(config.lr_decay_samples, config.lr_decay_iters, global_batch_size) or total
    wsd_decay = _length(config.lr_wsd_decay_samples, config.lr_wsd_decay_iters, global_batch_size)
    warmup: float = _length(config.lr_warmup_samples, config.lr_warmup_iters, global_batch_size) or 0
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * decay
    _check_lengths(config, warmup=warmup, decay=decay, wsd_decay=wsd_decay, total=total)
    decoupled_max_lr, decoupled_min_lr = _decoupled(config)
    start_wd, end_wd = _weight_decay_ends(config)
    return Schedule(
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        decoupled_max_lr=decoupled_max_lr,
        decoupled_min_lr=decoupled_min_lr,
        warmup=warmup,
        decay=decay,
        style=config.lr_decay_style,
        wsd_decay=wsd_decay,
        wsd_style=config.lr_wsd_decay_style,
        start_wd=start_wd,
        end_wd=end_wd,
        wd_steps=total,
        wd_style=config.weight_decay_incr_style,
    )


def _in_samples(iters: int, global_batch_size: int) -> int:
    return iters * global_batch_size


def _length(samples: int | None, iters: int | None, global_batch_size: int) -> int | None:
    """Whichever of the two is set, in samples."""
    return samples or (_in_samples(iters, global_batch_size) if iters else None)


def _refuse_mixed_units(config: OptimizerConfig, *, by_samples: bool) -> None:
    in_iters = {
        "lr_decay_iters": config.lr_decay_iters,
        "lr_warmup_iters": config.lr_warmup_iters,
        "lr_wsd_decay_iters": config.lr_wsd_decay_iters,
    }
    in_samples = {
        "lr_decay_samples": config.lr_decay_samples,
        "lr_warmup_samples": config.lr_warmup_samples,
        "lr_wsd_decay_samples": config.lr_wsd_decay_samples,
    }
    length, wrong = ("train_samples", in_iters) if by_samples else ("train_iters", in_samples)
    for name, value in wrong.items():
        if value:
            other = name.replace("iters", "samples") if by_samples else name.replace("samples", "iters")
            raise ConfigError(f"{name}={value} cannot be mixed with {length}; use {other}")


def _check_lengths(config: OptimizerConfig, *, warmup: float, decay: int, wsd_decay: int | None, total: int) -> None:
    if warmup >= decay:
        raise ConfigError(
            f"the learning rate warms up over {warmup:g} samples but its decay ends at {decay}; shorten lr_warmup_iters"
            " (or _samples), or lengthen lr_decay_iters (or _samples)"
        )
    if wsd_decay is not None and wsd_decay > decay - warmup:
        raise ConfigError(
            f"the WSD decay takes {wsd_decay} samples but only {decay - warmup:g} lie between the end of the warm-up"
            f" and the end of the decay at {decay}; shorten lr_wsd_decay_iters (or _samples)"
        )
    if max(decay, total) >= _COUNTER_LIMIT:
        raise ConfigError(
            f"the schedule runs over {max(decay, total)} samples but they are counted in 32 bits; stay below 2**32"
            " (use longer sequences, or a shorter lr_decay_iters or run)"
        )
    if config.lr_warmup_init > config.lr:
        raise ConfigError(f"lr_warmup_init={config.lr_warmup_init} must not exceed lr={config.lr}")


def _decoupled(config: OptimizerConfig) -> tuple[float, float]:
    """The two ends of the decoupled learning rate."""
    minimum = config.min_lr if config.decoupled_min_lr is None else config.decoupled_min_lr
    if config.decoupled_lr is None:
        if config.decoupled_min_lr is not None:
            raise ConfigError(f"decoupled_min_lr={minimum} has no effect without decoupled_lr; set decoupled_lr")
        return config.lr, config.min_lr
    if not 0 <= minimum <= config.decoupled_lr:
        raise ConfigError(
            f"decoupled_min_lr={minimum} must be between 0 and decoupled_lr={config.decoupled_lr}; set both"
        )
    return config.decoupled_lr, minimum


def _weight_decay_ends(config: OptimizerConfig) -> tuple[float, float]:
    start, end = config.start_weight_decay, config.end_weight_decay
    if config.weight_decay_incr_style == "constant":
        if start is not None or end is not None:
            raise ConfigError(
                f"start_weight_decay={start}, end_weight_decay={end} have no effect with"
                " weight_decay_incr_style='constant'; use 'linear' or 'cosine', or weight_decay alone"
            )
        return config.weight_decay, config.weight_decay
    assert start is not None  # OptimizerConfig asks for both
    assert end is not None
    if not 0 <= start <= end:
        raise ConfigError(f"start_weight_decay={start} must be between 0 and end_weight_decay={end}")
    return start, end
