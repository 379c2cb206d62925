"""The optimizer: Adam, SGD, Lion or Muon as a chain of optax parts, with Megatron's parameter groups and clipping.

Learning rate and weight decay come with every update, so that the schedules stay functions of the samples consumed:

    optimizer = make_optimizer(config, logical_axes)
    state = optimizer.init(params)
    grads, grad_norm = clip_by_global_norm(grads, config.clip_grad)
    updates, state = optimizer.update(
        grads, state, params, learning_rate=lr, decoupled_learning_rate=decoupled_lr, weight_decay=wd
    )
    params = optax.apply_updates(params, updates)

Logical axes are a tree like the parameters whose leaves are tuples of axis names. Groups are made of names and axes,
never of the number of dimensions: a norm's scale that is stacked over layers is a matrix only by accident.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from megajax.config import OptimizerConfig
from megajax.parallel.gradient_sums import is_fp8_meta, with_fp8_meta, without_fp8_meta
from megajax.training.muon import muon_from_config

Axes = tuple[str | None, ...]

_STACKED_AXES = frozenset({"layers", "every_stage", "inner_layers", "experts"})
"""Axes along which independent parameters are stacked; they do not make a matrix of a vector."""
_NO_DECAY_NAMES = frozenset({"bias", "scale", "softmax_offset"})
EXPERT_BIAS = "expert_bias"
"""A parameter whose gradient is none, but the number of tokens that chose each expert."""
_QK_NORMS = frozenset({"q_layernorm", "k_layernorm"})
_EMBEDDING_AND_OUTPUT = frozenset({"embedding", "output_layer"})


def make_optimizer(
    config: OptimizerConfig, logical_axes: Any, *, bias_update_rate: float = 0.0, frozen: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.optimizer` names; all of its arithmetic and state is float32.

    With u the direction, p a parameter, wd = 0 outside of `weight_decay_mask`:

    * adam (AdamW, as Apex's FusedAdam): `p <- p - lr (m_hat / (sqrt(v_hat) + eps) + wd p)`
    * lion: `p <- p - lr (sign(b1 m + (1 - b1) g) + wd p)`, `m <- b2 m + (1 - b2) g`
    * muon: `p <- p - lr (u + wd p)` on weight matrices (`scale_by_muon`), `muon_scalar_optimizer` on everything else
    * sgd (as torch's): `m <- momentum m + g + wd p`, `p <- p - lr m`

    The update function takes the keyword arguments `learning_rate`, `weight_decay` and, if `config.decoupled_lr` is
    set, `decoupled_learning_rate` (for the embedding and the output layer); each is a scalar, traced or not.

    Args:
      logical_axes: a tree like the parameters with tuples of axis names as leaves.
      bias_update_rate: step of the biases that balance experts (`balance_experts`); they have no other part in this.
      frozen: names at the top of the parameter tree below which nothing changes, and nothing is kept.

    Raises:
      ConfigError: the options of Muon contradict each other.
    """

    def role(path: tuple[str, ...], axes: Axes) -> str:
        if path[0] in frozen:
            return "frozen"
        return "balanced" if path[-1] == EXPERT_BIAS else "trained"

    logical_axes = without_fp8_meta(logical_axes)
    roles = _map_with_names(role, logical_axes)
    optimizer = _make_optimizer(config, logical_axes)
    if set(jax.tree.leaves(roles)) == {"trained"}:
        return _of_parameters(optimizer)
    parts: dict[Any, optax.GradientTransformation] = {
        "trained": optimizer,
        "balanced": balance_experts(bias_update_rate),
        "frozen": optax.set_to_zero(),
    }
    return _of_parameters(optax.partition(parts, roles))


def _of_parameters(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, which does not see what is kept for fp8 beside the parameters, and changes nothing of it."""

    def init(params: Any) -> Any:
        return inner.init(without_fp8_meta(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        new, state = inner.update(without_fp8_meta(updates), state, without_fp8_meta(params), **extra_args)
        return with_fp8_meta(new, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _make_optimizer(config: OptimizerConfig, logical_axes: Any) -> optax.GradientTransformationExtraArgs:
    mask = weight_decay_mask(logical_axes, apply_wd_to_qk_layernorm=config.apply_wd_to_qk_layernorm)
    decay = optax.masked(add_scheduled_weight_decay(), mask)
    descend = _descend(config, logical_axes)
    kind = config.optimizer
    if kind == "sgd":
        momentum = optax.trace(decay=config.sgd_momentum, accumulator_dtype=jnp.float32)
        return in_float32(optax.chain(decay, momentum, descend))
    direction = _muon(config, logical_axes) if kind == "muon" else _elementwise(config, kind)
    return in_float32(optax.chain(direction, decay, descend))


def _muon(config: OptimizerConfig, logical_axes: Any) -> optax.GradientTransformation:
    labels = _labels(matrix_mask(logical_axes), "matrix", "other")
    return optax.partition(
        {"matrix": muon_from_config(config), "other": _elementwise(config, config.muon_scalar_optimizer)}, labels
    )


def _elementwise(config: OptimizerConfig, kind: Literal["adam", "lion"]) -> optax.GradientTransformation:
    if kind == "lion":
        return optax.scale_by_lion(b1=config.lion_beta1, b2=config.lion_beta2, mu_dtype=jnp.float32)
    return optax.scale_by_adam(b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_eps, mu_dtype=jnp.float32)


def _descend(config: OptimizerConfig, logical_axes: Any) -> optax.GradientTransformation:
    """Minus the learning rate; the embedding and the output layer may have their own."""
    if config.decoupled_lr is None:
        return scale_by_minus("learning_rate")
    labels = _labels(embedding_and_output_mask(logical_axes), "decoupled", "other")
    return optax.partition(
        {"decoupled": scale_by_minus("decoupled_learning_rate"), "other": scale_by_minus("learning_rate")}, labels
    )


def _labels(mask: Any, yes: str, no: str) -> Any:
    return jax.tree.map(lambda chosen: yes if chosen else no, mask)


def scale_by_minus(name: str) -> optax.GradientTransformationExtraArgs:
    """`u <- -x u`, where x is the keyword argument `name` of the update function."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params
        step = -extra_args[name]
        return jax.tree.map(lambda u: step * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def add_scheduled_weight_decay() -> optax.GradientTransformationExtraArgs:
    """`u <- u + wd p`, where wd is the keyword argument `weight_decay` of the update function."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        weight_decay = extra_args["weight_decay"]
        return jax.tree.map(lambda u, p: u + weight_decay * p, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def balance_experts(rate: float) -> optax.GradientTransformation:
    """`b <- b + rate sign(mean(count) - count)`, where a bias's "gradient" counts the tokens of each expert [..., E].

    An expert that too many tokens chose becomes less attractive (arXiv:2408.15664; Megatron `get_updated_expert_bias`).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # Whole numbers on both sides: where a count is the mean, rounding must not decide the sign.
        above = jax.tree.map(lambda c: c.shape[-1] * c - jnp.sum(c, -1, keepdims=True), updates)
        return jax.tree.map(lambda a: -rate * jnp.sign(a), above), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with gradients and parameters converted to float32 on the way in; so its state is float32 too."""
    inner = optax.with_extra_args_support(inner)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return inner.init(cast(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return inner.update(cast(updates), state, cast(params), **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def weight_decay_mask(logical_axes: Any, *, apply_wd_to_qk_layernorm: bool = False) -> Any:
    """True for the parameters that weight decay pulls to zero: matrices, embeddings among them.

    Biases, the scales of norms, softmax offsets and other vectors are left alone, as in Megatron;
    `apply_wd_to_qk_layernorm` puts the scales of the query and key norms back in.
    """

    def decays(path: tuple[str, ...], axes: Axes) -> bool:
        if apply_wd_to_qk_layernorm and path[-1] == "scale" and _QK_NORMS & set(path):
            return True
        return path[-1] not in _NO_DECAY_NAMES and _rank(axes) >= 2

    return _map_with_names(decays, logical_axes)


def embedding_and_output_mask(logical_axes: Any) -> Any:
    """True for the parameters of the embedding and of the output layer: those with a learning rate of their own."""
    return _map_with_names(lambda path, axes: bool(_EMBEDDING_AND_OUTPUT & set(path[:-1])), logical_axes)


def matrix_mask(logical_axes: Any) -> Any:
    """True for the weight matrices that Muon orthogonalises: two dimensions, and neither embedding nor output layer."""

    def is_matrix(path: tuple[str, ...], axes: Axes) -> bool:
        outer = _EMBEDDING_AND_OUTPUT & set(path[:-1])
        return path[-1] not in _NO_DECAY_NAMES and _rank(axes) == 2 and not outer

    return _map_with_names(is_matrix, logical_axes)


def _rank(axes: Axes) -> int:
    """Dimensions of one layer's (one expert's) parameter."""
    return sum(axis not in _STACKED_AXES for axis in axes)


def _map_with_names(function: Callable[[tuple[str, ...], Axes], Any], logical_axes: Any) -> Any:
    """Maps `function(path as names, axes)` over the tuples of a tree of logical axes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, axes: function(tuple(key.key for key in path), axes),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def global_norm(tree: Any) -> jax.Array:
    """The 2-norm of all leaves as one vector, accumulated in float32; what is no gradient is left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for path, leaf in leaves if not _is_no_gradient(path)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """Scales all gradients by `max_norm / (norm + 1e-6)` where that is below 1; `max_norm` 0 leaves them alone.

    Source: `megatron/core/optimizer/clip_grads.py`; optax's own has no 1e-6 and so differs in the last digits.

    Returns:
      The gradients, and their norm before clipping (float32).
    """
    norm = global_norm(grads)
    if max_norm == 0:
        return grads, norm
    coefficient = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    clipped = jax.tree_util.tree_map_with_path(
        lambda path, g: g if _is_no_gradient(path) else (g * coefficient).astype(g.dtype), grads
    )
    return clipped, norm


def _is_no_gradient(path: Any) -> bool:
    """Whether a "gradient" counts tokens, or is the magnitude of something."""
    return is_fp8_meta(path) or (bool(path) and path[-1] == jax.tree_util.DictKey(EXPERT_BIAS))
