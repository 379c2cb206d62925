"""The optimizer against torch (golden files), a plain numpy loop (Lion) and Megatron's rules of parameter groups."""

# SPDX-License-Identifier: Apache-2.0
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megajax.config import OptimizerConfig
from megajax.training.optimizer import (
    clip_by_global_norm,
    embedding_and_output_mask,
    global_norm,
    make_optimizer,
    matrix_mask,
    weight_decay_mask,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "optimizer"

LAYER = {
    "input_layernorm": {"scale": ("layers", "norm"), "bias": ("layers", "norm")},
    "self_attention": {
        "linear_q": {"kernel": ("layers", "embed", "heads"), "bias": ("layers", "heads")},
        "q_layernorm": {"scale": ("layers", "head_dim"), "bias": ("layers", "head_dim")},
        "core_attention": {"softmax_offset": ("layers", "heads")},
    },
    "mlp": {"experts": {"kernel": ("layers", "experts", "embed", "mlp"), "bias": ("layers", "experts", "mlp")}},
}
AXES = {
    "embedding": {
        "word_embeddings": {"embedding": ("vocab", "embed")},
        "position_embeddings": {"embedding": ("positions", "embed")},
    },
    "decoder": {"layers": LAYER, "final_layernorm": {"scale": ("norm",)}},
    "output_layer": {"kernel": ("embed", "vocab"), "bias": ("vocab",)},
}
SIZES = {"layers": 3, "embed": 6, "heads": 4, "norm": 6, "head_dim": 2, "experts": 2, "mlp": 5, "vocab": 8}
SIZES |= {"positions": 7}


def shape_of(axes):
    return tuple(SIZES[name] for name in axes)


def random_tree(seed, dtype=jnp.float32):
    leaves, structure = jax.tree.flatten(AXES, is_leaf=lambda node: isinstance(node, tuple))
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=shape_of(axes)), dtype) for axes in leaves])


def chosen(mask):
    """Paths that a mask marks, as `a/b/c`."""
    return {
        "/".join(key.key for key in path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value is True
    }


def train(optimizer, params, grads_of, rates):
    """Parameters after each step; `grads_of(i, params)` are the gradients of step i."""

    @jax.jit
    def step(grads, state, params, rate):
        updates, state = optimizer.update(grads, state, params, **rate)
        return optax.apply_updates(params, updates), state

    state, trace = jax.jit(optimizer.init)(params), []
    for i, rate in enumerate(rates):
        params, state = step(grads_of(i, params), state, params, rate)
        trace.append(jax.tree.map(np.asarray, params))
    return trace


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(optimizer="adam", adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-6),
        OptimizerConfig(optimizer="sgd", sgd_momentum=0.9),
    ],
    ids=lambda config: config.optimizer,
)
def test_equals_torch(config):
    golden = dict(np.load(GOLDEN / f"{config.optimizer}.npz"))
    axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    trace = train(
        make_optimizer(config, axes),
        {name: jnp.asarray(golden[f"{name}_0"]) for name in axes},
        lambda i, _: {name: jnp.asarray(golden[f"grad_{name}"][i]) for name in axes},
        [{"learning_rate": lr, "weight_decay": wd} for lr, wd in zip(golden["lr"], golden["wd"], strict=True)],
    )
    for i, params in enumerate(trace):
        for name in axes:
            np.testing.assert_allclose(params[name], golden[name][i], rtol=1e-5, atol=2e-6)


def test_lion_equals_a_plain_loop():
    config = OptimizerConfig(optimizer="lion", lion_beta1=0.95, lion_beta2=0.98)
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
    rates = [{"learning_rate": 0.1 / (i + 1), "weight_decay": 0.1 * i} for i in range(5)]
    trace = train(
        make_optimizer(config, {"kernel": ("embed", "mlp")}),
        {"kernel": jnp.asarray(p, jnp.float32)},
        lambda i, _: {"kernel": jnp.asarray(grads[i], jnp.float32)},
        rates,
    )
    m = np.zeros_like(p)
    for g, rate, got in zip(grads, rates, trace, strict=True):
        p = p - rate["learning_rate"] * (np.sign(0.95 * m + 0.05 * g) + rate["weight_decay"] * p)
        m = 0.98 * m + 0.02 * g
        np.testing.assert_allclose(got["kernel"], p, atol=1e-6)


def test_weight_decay_spares_vectors_however_they_are_stacked():
    matrices = {
        "embedding/word_embeddings/embedding",
        "embedding/position_embeddings/embedding",
        "decoder/layers/self_attention/linear_q/kernel",
        "decoder/layers/mlp/experts/kernel",
        "output_layer/kernel",
    }
    assert chosen(weight_decay_mask(AXES)) == matrices
    norms = {"decoder/layers/self_attention/q_layernorm/scale"}
    assert chosen(weight_decay_mask(AXES, apply_wd_to_qk_layernorm=True)) == matrices | norms


def test_weight_decay_alone_moves_only_what_decays():
    """Without gradients SGD is nothing but weight decay."""
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd"), AXES)
    after = train(optimizer, params, lambda i, _: zeros, [{"learning_rate": 0.5, "weight_decay": 0.1}])[0]
    for before, now, decays in zip(*map(jax.tree.leaves, (params, after, weight_decay_mask(AXES))), strict=True):
        np.testing.assert_allclose(now, before * (0.95 if decays else 1.0), rtol=1e-6)


def test_decoupled_learning_rate_reaches_embedding_and_output_only():
    outer = embedding_and_output_mask(AXES)
    assert chosen(outer) == {
        "embedding/word_embeddings/embedding",
        "embedding/position_embeddings/embedding",
        "output_layer/kernel",
        "output_layer/bias",
    }
    params, grads = random_tree(0), random_tree(1)
    rates = [{"learning_rate": 0.5, "decoupled_learning_rate": 0.0, "weight_decay": 0.1}]
    for config, frozen in ((OptimizerConfig(decoupled_lr=1.0), True), (OptimizerConfig(), False)):
        after = train(make_optimizer(config, AXES), params, lambda i, _: grads, rates)[0]
        for before, now, is_outer in zip(*map(jax.tree.leaves, (params, after, outer)), strict=True):
            assert np.array_equal(before, now) == (frozen and is_outer)


def test_muon_takes_the_matrices_and_the_scalar_optimizer_the_rest():
    kernels = {"decoder/layers/self_attention/linear_q/kernel", "decoder/layers/mlp/experts/kernel"}
    assert chosen(matrix_mask(AXES)) == kernels
    params, grads = random_tree(0), random_tree(1)
    by_muon, by_lion = (
        train(
            make_optimizer(OptimizerConfig(optimizer=name, muon_scalar_optimizer="lion"), AXES),
            params,
            lambda i, _: grads,
            [{"learning_rate": 0.1, "weight_decay": 0.0}],
        )[0]
        for name in ("muon", "lion")
    )
    for a, b, is_matrix in zip(*map(jax.tree.leaves, (by_muon, by_lion, matrix_mask(AXES))), strict=True):
        assert np.array_equal(a, b) == (not is_matrix)


ALL = [OptimizerConfig(optimizer=name, decoupled_lr=1.0) for name in ("adam", "sgd", "lion", "muon")]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.optimizer)
def test_state_is_float32_and_maps_back_to_parameters(config):
    """bfloat16 parameters keep float32 state, and optax finds the parameters inside the state (to shard it)."""
    params = random_tree(0, jnp.bfloat16)
    optimizer = make_optimizer(config, AXES)
    state = jax.eval_shape(optimizer.init, params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    matches = optax.tree_map_params(
        optimizer,
        lambda leaf, axes: leaf if isinstance(leaf, optax.MaskedNode) else leaf.shape == shape_of(axes),
        state,
        AXES,
        transform_non_params=lambda leaf: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert jax.tree.leaves(matches) == [True] * len(floats)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.optimizer)
def test_learns_a_quadratic(config):
    target = random_tree(1)
    rates = [{"learning_rate": 0.03, "decoupled_learning_rate": 0.03, "weight_decay": 0.0}] * 40
    trace = train(
        make_optimizer(config, AXES),
        jax.tree.map(jnp.zeros_like, target),
        lambda i, params: jax.tree.map(lambda p, t: p - np.asarray(t), params, target),
        rates,
    )
    for end, goal in zip(*map(jax.tree.leaves, (trace[-1], target)), strict=True):
        assert np.linalg.norm(end - goal) < 0.7 * np.linalg.norm(goal)


def test_clipping_is_megatrons():
    grads = {"a": jnp.full((3,), 2.0), "b": jnp.full((2, 2), -1.0, jnp.bfloat16)}  # norm 4
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert float(norm) == 4.0
    np.testing.assert_allclose(clipped["a"], np.full(3, 2.0 * (1.0 / (4.0 + 1e-6))), rtol=1e-7)
    assert clipped["b"].dtype == jnp.bfloat16
    for unchanged in (4.1, 0):
        same, norm = clip_by_global_norm(grads, unchanged)
        assert float(norm) == 4.0
        assert all(jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (same, grads)), strict=True))


def test_norm_accumulates_in_float32():
    assert float(global_norm([jnp.full((1000,), 256.0, jnp.float16)])) == pytest.approx(256 * 1000**0.5)
