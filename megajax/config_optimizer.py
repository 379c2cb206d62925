"""Options of the optimizer: a part of `megajax.config`."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Literal

from megajax.config_checks import require, require_fraction, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rate and weight decay schedules, clipping and loss scaling.

    Schedules run in samples, as in Megatron's `OptimizerParamScheduler`; `*_iters` are multiplied by the global
    batch size.
    """

    optimizer: Literal["adam", "sgd", "lion", "muon"] = "adam"
    lr: float = 1e-3
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_samples: int | None = None
    decoupled_lr: float | None = None
    """Learning rate of the embedding and the output layer."""
    decoupled_min_lr: float | None = None
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    apply_wd_to_qk_layernorm: bool = False
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    lion_beta1: float = 0.95
    lion_beta2: float = 0.98
    muon_momentum: float = 0.95
    muon_use_nesterov: bool = False
    muon_num_ns_steps: int = 5
    muon_coefficient_type: Literal["quintic", "simple", "polar_express"] = "quintic"
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    muon_extra_scale_factor: float = 1.0
    muon_scalar_optimizer: Literal["adam", "lion"] = "adam"
    loss_scale: float | None = None
    """fp16: a constant loss scale; None is dynamic."""
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"lr={self.lr} must not be negative")
        require(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} must be between 0 and lr={self.lr}")
        require(self.clip_grad >= 0, f"clip_grad={self.clip_grad} must not be negative; 0 turns clipping off")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        require_positive(self, "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
        require_positive(self, "adam_eps", "loss_scale", "loss_scale_window", "hysteresis")
        require_fraction(self, "adam_beta1", "adam_beta2", "sgd_momentum", "lion_beta1", "lion_beta2", "muon_momentum")
        for one, other in (
            ("lr_decay_iters", "lr_decay_samples"),
            ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
            ("lr_warmup_iters", "lr_warmup_samples"),
        ):
            both = getattr(self, one) and getattr(self, other)
            require(not both, f"{one}={getattr(self, one)} excludes {other}={getattr(self, other)}; set one of them")
        if self.lr_warmup_fraction is not None:
            require(
                not (self.lr_warmup_iters or self.lr_warmup_samples),
                f"lr_warmup_fraction={self.lr_warmup_fraction} excludes lr_warmup_iters and lr_warmup_samples",
            )
            require_fraction(self, "lr_warmup_fraction")
        wsd = self.lr_wsd_decay_iters or self.lr_wsd_decay_samples
        require(self.lr_decay_style != "WSD" or wsd is not None, "lr_decay_style='WSD' needs lr_wsd_decay_iters")
        require(self.lr_decay_style == "WSD" or not wsd, "lr_wsd_decay_iters has no effect; set lr_decay_style='WSD'")
        require(
            self.weight_decay_incr_style == "constant"
            or (self.start_weight_decay is not None and self.end_weight_decay is not None),
            f"weight_decay_incr_style={self.weight_decay_incr_style!r} needs start_weight_decay and end_weight_decay",
        )
