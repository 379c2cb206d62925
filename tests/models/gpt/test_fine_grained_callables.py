"""The pieces of a layer are the layer, and a forward pass beside a backward pass changes neither."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.config import ConfigError, ParallelConfig, TransformerConfig
from megajax.models.common.model_chunk_schedule_plan import FORWARD_BESIDE_BACKWARD, Microbatch, ModelChunkSchedulePlan
from megajax.models.gpt.fine_grained_callables import Prediction, get_fine_grained_func
from megajax.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.ops.attention import AttentionMask
from megajax.parallel.hlo import executed
from megajax.parallel.mesh import make_mesh
from megajax.parallel.sharding import axis_rules
from megajax.transformer.block import LayerInputs

BATCH, SEQ, HIDDEN, LAYERS = 8, 4, 16, 3
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8, "moe_aux_loss_coeff": 0.1,
    "moe_router_load_balancing_type": "aux_loss", "add_bias_linear": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"hidden_dropout": 0.3, "recompute_granularity": "selective", "sandwich_norm": True},
    "experts": EXPERTS | {"moe_shared_expert_intermediate_size": 8, "hidden_dropout": 0.3},
    "alltoall": EXPERTS | {"moe_token_dispatcher_type": "alltoall", "moe_latent_size": 8},
    "drops": EXPERTS | {"moe_token_dispatcher_type": "alltoall", "moe_expert_capacity_factor": 1.0},
    "latent_attention": EXPERTS
    | {"multi_latent_attention": True, "kv_lora_rank": 8, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4, "v_head_dim": 4},
}


def _config(model: str, **further: Any) -> TransformerConfig:
    quiet: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=24, vocab_size=32,
        position_embedding_type="rope", init_method_std=0.3, **quiet | MODELS[model] | further,
    )  # fmt: skip


@contextlib.contextmanager
def _on(parallel: ParallelConfig | None, config: TransformerConfig) -> Iterator[None]:
    if parallel is None:
        yield
        return
    mesh = make_mesh(parallel, jax.devices()[:4])
    rules = tuple(axis_rules(parallel, config, 4).table.items())
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def _layers(config: TransformerConfig) -> tuple[Any, Any]:
    """(a layer, parameters [L, ...])."""
    layer = get_gpt_decoder_block_spec(config, LocalSpecProvider())[0](config=config, parent=None)
    x, inputs = jnp.zeros((BATCH, SEQ, HIDDEN)), LayerInputs(AttentionMask(causal=True))
    keys = jax.random.split(jax.random.key(3), LAYERS)
    init = jax.vmap(lambda key: layer.init(key, x, mask=inputs.mask)["params"])
    return layer, nn.meta.unbox(jax.jit(init)(keys))


def _microbatch(seed: int, dropout: float) -> tuple[Microbatch, Any]:
    """(what is read, gradient of what is returned)."""
    rng = np.random.default_rng(seed)
    x, g = (jnp.asarray(rng.normal(size=(BATCH, SEQ, HIDDEN)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.arange(SEQ)[None] >= rng.integers(1, SEQ, size=(BATCH, 1)), jnp.int32)
    mask = AttentionMask(causal=True, q_segment_ids=segments, kv_segment_ids=segments)
    return Microbatch(x, LayerInputs(mask, aux_weight=jnp.float32(2)), jax.random.key(seed) if dropout else None), g


def _plain(layer: Any, params: Any, microbatch: Microbatch, g: Any) -> Any:
    """(output, gradients of parameters and input) of the layers themselves."""
    given = {name: value for name, value in microbatch.inputs._asdict().items() if value is not None}

    def run(params: Any, x: Any) -> Any:
        def one(x: Any, row: Any) -> Any:
            index, p = row
            rngs = None if microbatch.key is None else {"dropout": jax.random.fold_in(microbatch.key, index)}
            return layer.apply({"params": p}, x, rngs=rngs, deterministic=microbatch.key is None, **given), None

        return jax.lax.scan(one, x, (jnp.arange(LAYERS), params))[0]

    y, pullback = jax.vjp(run, params, microbatch.x)
    return y, *pullback(g)


def _assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        atol = 1e-5 * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))


EP = ParallelConfig(expert_model_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("dense", None),
        pytest.param("experts", None, marks=pytest.mark.slow),
        ("alltoall", EP),
        pytest.param("drops", EP, marks=pytest.mark.slow),
        pytest.param("experts", EP, marks=pytest.mark.slow),
        pytest.param("latent_attention", None, marks=pytest.mark.slow),
    ],
)
def test_both_passes_are_those_of_the_layers(model: str, parallel: ParallelConfig | None) -> None:
    config = _config(model)
    layer, params = _layers(config)
    pieces = get_fine_grained_func(layer)
    (one, g_one), (two, g_two) = (_microbatch(seed, config.hidden_dropout) for seed in (1, 2))

    @jax.jit
    def run(params: Any, one: Microbatch, two: Microbatch, g_one: Any, g_two: Any) -> Any:
        plan = ModelChunkSchedulePlan.of(pieces, params, one)
        y_one, kept = plan.forward(params, one)
        y_two, kept, d_params, dx = plan.forward_backward(params, two, kept, g_one)
        return (y_one, d_params, dx), (y_two, *plan.backward(params, kept, g_two))

    with _on(parallel, config):
        found = run(params, one, two, g_one, g_two)
        wanted = [jax.jit(lambda *args: _plain(layer, *args))(params, *pair) for pair in ((one, g_one), (two, g_two))]
    _assert_equal(found[0], wanted[0])
    _assert_equal(found[1], wanted[1])


def test_kept_are_no_parameters() -> None:
    config = _config("dense")
    layer, params = _layers(config)
    microbatch, _ = _microbatch(1, 0.3)
    plan = ModelChunkSchedulePlan.of(get_fine_grained_func(layer), params, microbatch)
    _, kept = jax.eval_shape(plan.forward, params, microbatch)
    weights = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 2}
    assert not weights & {leaf.shape for part in kept.leaves for leaf in part}


@pytest.mark.slow
def test_prediction_layer_is_its_pieces() -> None:
    config = _config("experts", mtp_num_layers=1, hidden_dropout=0.0)
    model = GPTModel(config)
    tokens = jnp.zeros((BATCH, SEQ), jnp.int32)
    params = nn.meta.unbox(model.init(jax.random.key(0), tokens)["params"])["mtp_0"]
    layer = model.bind({}).mtp[0].clone(parent=None, name=None)
    microbatch, _ = _microbatch(1, 0.0)
    x = Prediction(microbatch.x, microbatch.x[:, ::-1])
    inputs = {name: value for name, value in microbatch.inputs._asdict().items() if value is not None}
    wanted: Any = layer.apply({"params": params}, x.hidden, x.embedded, inputs, deterministic=True)
    state: Any = x
    for piece in get_fine_grained_func(layer):
        state = piece(params, state, microbatch.inputs, None)
    np.testing.assert_allclose(state, wanted, rtol=1e-6)


def test_the_order_runs_each_pass_in_its_own_order() -> None:
    order = ["attn", "moe_dispatch", "mlp", "moe_combine", "mtp_post_process"]
    assert [name for kind, name in FORWARD_BESIDE_BACKWARD if kind == "F"] == order
    assert [name for kind, name in FORWARD_BESIDE_BACKWARD if kind == "B"] == order[::-1]


@pytest.mark.slow
def test_every_exchange_has_work_that_does_not_wait_for_it() -> None:
    """In the loop's body, each all-to-all has matrix products that neither read its result nor make what it sends."""
    config = _config("alltoall")
    layer, params = _layers(config)
    pieces = get_fine_grained_func(layer)
    microbatch, g = _microbatch(1, 0.0)
    with _on(EP, config):
        plan = ModelChunkSchedulePlan.of(pieces, params, microbatch)
        _, kept = jax.jit(plan.forward)(params, microbatch)
        compiled = jax.jit(plan.forward_backward).lower(params, microbatch, kept, g).compile()
    body = [instruction for instruction, where in executed(str(compiled.as_text())) if where.loops == (LAYERS,)]
    exchanges = [i for i in body if i.opcode.startswith("all-to-all")]
    assert len(exchanges) >= 4, "two of each pass"

    def behind(start: Any) -> set[str]:
        found, left = set(), [start]
        while left:
            instruction = left.pop()
            if instruction.name not in found:
                found.add(instruction.name)
                left += instruction.reads
        return found

    dots = [i for i in body if i.opcode in ("dot", "fusion", "custom-call")]
    needed = {dot.name: behind(dot) for dot in dots}
    for exchange in exchanges:
        needs = behind(exchange)
        assert any(dot.name not in needs and exchange.name not in needed[dot.name] for dot in dots)


def test_what_would_be_recomputed_is_refused() -> None:
    layer, _ = _layers(_config("dense"))
    full = layer.clone(
        config=layer.config.replace(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    )
    with pytest.raises(ConfigError, match="recompute_granularity='full' recomputes what is overlapped"):
        get_fine_grained_func(full)
