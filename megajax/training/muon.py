"""Muon: momentum whose update is orthogonalised by a Newton-Schulz iteration, for the weight matrices of a network.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), and Megatron's
`megatron/core/optimizer/emerging_optimizers.py` over NVIDIA's Emerging-Optimizers, whose constants these are.

Shape suffixes: `m` rows (input features), `n` columns (output features), `...` stacked layers.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from megajax.config import ConfigError, OptimizerConfig

CoefficientType = Literal["quintic", "simple", "polar_express"]
ScaleMode = Literal["spectral", "unit_rms_norm", "shape_scaling"]

COEFFICIENTS: dict[CoefficientType, tuple[tuple[float, float, float], ...]] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., arXiv 2505.16932
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}
_NORM_EPS = 1e-7


def newton_schulz_coefficients(kind: CoefficientType, num_steps: int) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each of `num_steps` iterations.

    `simple` and `quintic` repeat their set as a whole; `polar_express` goes on with its last member, which converges.

    Raises:
      ConfigError: `num_steps` would stop in the middle of a set.
    """
    members = COEFFICIENTS[kind]
    if kind == "polar_express":
        if num_steps < len(members):
            raise ConfigError(
                f"muon_num_ns_steps={num_steps} is too few for muon_coefficient_type='polar_express';"
                f" use {len(members)} or more"
            )
        return members + members[-1:] * (num_steps - len(members))
    if num_steps < 1 or num_steps % len(members):
        raise ConfigError(
            f"muon_num_ns_steps={num_steps} must be a multiple of {len(members)}, the length of"
            f" muon_coefficient_type={kind!r}"
        )
    return members * (num_steps // len(members))


def orthogonalize(update: jax.Array, coefficients: tuple[tuple[float, float, float], ...]) -> jax.Array:
    """Brings the singular values of each matrix near 1 and keeps its singular vectors: U S V^T -> about U V^T.

    X_0 = update / |update|_F, then X <- a X + (b A + c A^2) X with A = X X^T, on the side with fewer rows.

    Args:
      update: [..., m, n]; every matrix is orthogonalised alone. float32.
      coefficients: (a, b, c) of each iteration.
    """
    wide = update.shape[-2] <= update.shape[-1]
    x = update if wide else update.mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), _NORM_EPS)

    def iterate(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x, None

    x, _ = jax.lax.scan(iterate, x, jnp.asarray(coefficients, x.dtype))
    return x if wide else x.mT


def update_scale(fan_in: int, fan_out: int, mode: ScaleMode) -> float:
    """How an orthogonal update of a [fan_in, fan_out] matrix is scaled; the sizes are those of the whole matrix.

    spectral sqrt(max(out, in)); unit_rms_norm sqrt(out / in); shape_scaling sqrt(max(1, out / in)).
    """
    squared = {
        "spectral": max(fan_out, fan_in),
        "unit_rms_norm": fan_out / fan_in,
        "shape_scaling": max(1.0, fan_out / fan_in),
    }[mode]
    return squared**0.5


class ScaleByMuonState(NamedTuple):
    """The exponential moving average of the gradients, float32, shaped like the parameters."""

    momentum: Any


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    coefficient_type: CoefficientType = "quintic",
    num_ns_steps: int = 5,
    scale_mode: ScaleMode = "spectral",
    extra_scale_factor: float = 1.0,
) -> optax.GradientTransformation:
    """Muon without learning rate and weight decay, in the manner of `optax.scale_by_adam`.

        M <- mu M + (1 - mu) g
        u = scale * orthogonalize((1 - mu) g + mu M if nesterov else M)

    Every leaf is a stack of matrices [..., in, out]. Stacked layers are orthogonalised one by one, and sharding the
    stack over data parallelism is all that a layer-wise distributed Muon takes. Query, key and value have separate
    kernels in megajax, so they are orthogonalised apart, as with Megatron's `muon_split_qkv`; so are the two halves of
    a gated MLP, which Megatron treats as one matrix.

    Raises:
      ConfigError: the number of iterations does not fit the coefficients.
    """
    coefficients = newton_schulz_coefficients(coefficient_type, num_ns_steps)

    def init(params: Any) -> ScaleByMuonState:
        return ScaleByMuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def direction(average: jax.Array, gradient: jax.Array) -> jax.Array:
        smooth = (1 - momentum) * gradient + momentum * average if nesterov else average
        fan_in, fan_out = smooth.shape[-2:]
        return orthogonalize(smooth, coefficients) * (update_scale(fan_in, fan_out, scale_mode) * extra_scale_factor)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByMuonState]:
        del params
        average = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, updates)
        return jax.tree.map(direction, average, updates), ScaleByMuonState(average)

    return optax.GradientTransformation(init, update)


def muon_from_config(config: OptimizerConfig) -> optax.GradientTransformation:
    """`scale_by_muon` with the `muon_*` options of `config`."""
    return scale_by_muon(
        momentum=config.muon_momentum,
        nesterov=config.muon_use_nesterov,
        coefficient_type=config.muon_coefficient_type,
        num_ns_steps=config.muon_num_ns_steps,
        scale_mode=config.muon_scale_mode,
        extra_scale_factor=config.muon_extra_scale_factor,
    )
