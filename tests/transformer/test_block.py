"""A stack of layers: what recomputation, scanning and folding must not change."""

# SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import ConfigError, TransformerConfig
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.ops.attention import AttentionMask
from megajax.spec import ModuleSpec
from megajax.transformer.block import LayerInputs, TransformerBlock, stack_layout
from megajax.transformer.layer import TransformerLayer

CONFIG = TransformerConfig(
    num_layers=3, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24, vocab_size=29,
    max_sequence_length=8, init_method_std=0.3, hidden_dropout=0.2, attention_dropout=0.2,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 29, size=(2, 8))
FULL = {"recompute_granularity": "full"}
RECOMPUTE: dict[str, dict[str, Any]] = {
    **{f"uniform {n}": {**FULL, "recompute_method": "uniform", "recompute_num_layers": n} for n in (1, 2, 3)},
    **{f"block {n}": {**FULL, "recompute_method": "block", "recompute_num_layers": n} for n in (1, 2, 5)},
    **{
        f"selective {m}": {"recompute_granularity": "selective", "recompute_modules": (m,)}
        for m in ("core_attn", "mlp", "layernorm")
    },
}


@functools.cache
def params() -> Any:
    return GPTModel(CONFIG).init(jax.random.key(0), TOKENS)["params"]


def loss_and_gradients(config: TransformerConfig, deterministic: bool, parameters: Any = None, **model: Any) -> Any:
    rngs = None if deterministic else {"dropout": jax.random.key(1)}
    labels = (TOKENS + 1) % 29

    def loss(p: Any) -> Any:
        losses: Any = GPTModel(config, **model).apply(
            {"params": p}, TOKENS, labels=labels, deterministic=deterministic, rngs=rngs
        )
        return losses.mean()

    return jax.jit(jax.value_and_grad(loss))(params() if parameters is None else parameters)


@functools.cache
def reference(deterministic: bool) -> Any:
    return loss_and_gradients(CONFIG, deterministic)


def require_close(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_changes_neither_loss_nor_gradients_nor_dropout_masks(name: str) -> None:
    require_close(loss_and_gradients(CONFIG.replace(**RECOMPUTE[name]), deterministic=False), reference(False))


def test_dropout_is_on_when_asked_and_differs_between_layers_and_keys() -> None:
    assert abs(reference(False)[0] - reference(True)[0]) > 1e-4


def test_recomputation_is_in_the_program() -> None:
    def saved(config: TransformerConfig) -> int:
        text = str(jax.make_jaxpr(lambda p: loss_and_gradients(config, True, p))(params()))
        return text.count("remat")

    assert saved(CONFIG.replace(**RECOMPUTE["uniform 1"])) > saved(CONFIG)
    assert saved(CONFIG.replace(**RECOMPUTE["selective mlp"])) > saved(CONFIG)


def unequal_specs(config: TransformerConfig) -> tuple[Any, ...]:
    """The same layers, but no two builders are equal, so that each is a stack of its own."""
    spec = get_gpt_layer_local_spec(config)
    return tuple(spec.replace(module=functools.partial(TransformerLayer)) for _ in range(config.num_layers))


def test_scan_equals_unrolled_layers() -> None:
    specs = unequal_specs(CONFIG)
    layout = stack_layout(CONFIG, specs)
    assert [segment.repeats for segment in layout] == [1, 1, 1]
    unrolled = {**params(), "decoder": {"final_layernorm": params()["decoder"]["final_layernorm"]}}
    for i in range(3):
        unrolled["decoder"][f"layers_{i}"] = jax.tree.map(lambda a, i=i: a[i : i + 1], params()["decoder"]["layers"])
    loss, gradients = loss_and_gradients(CONFIG, False, unrolled, transformer_layer_spec=specs)
    decoder = gradients["decoder"]
    layers = [decoder.pop(f"layers_{i}") for i in range(3)]
    decoder["layers"] = jax.tree.map(lambda *rows: jnp.concatenate(rows), *layers)
    require_close((loss, gradients), reference(False))


def test_patterns_fold_into_stacks_and_recompute_alike() -> None:
    config = CONFIG.replace(num_layers=5, window_size=(2, 0), window_attn_skip_freq=2)
    specs = (get_gpt_layer_local_spec(config),) * 5
    names = [[stack.name for stack in segment.stacks] for segment in stack_layout(config, specs)]
    assert names == [["layers_0", "layers_1"], ["layers_4"]]
    parameters = GPTModel(config).init(jax.random.key(0), TOKENS)["params"]
    expected = loss_and_gradients(config, False, parameters)
    for name in ("uniform 2", "block 5"):
        require_close(loss_and_gradients(config.replace(**RECOMPUTE[name]), False, parameters), expected)


def test_every_layers_output_is_recorded_on_request() -> None:
    block: Any = TransformerBlock(CONFIG, (get_gpt_layer_local_spec(CONFIG),) * 3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 16)), jnp.float32)
    inputs = LayerInputs(AttentionMask(causal=True))
    variables = block.init(jax.random.key(0), x, inputs)
    y, recorded = block.apply(variables, x, inputs, mutable=["intermediates"])
    (outputs,) = recorded["intermediates"]["layers"]
    assert outputs.shape == (3, 2, 8, 16)
    np.testing.assert_array_equal(outputs[-1], y)


def test_a_wrong_number_of_specs_is_one_line() -> None:
    block: Any = TransformerBlock(CONFIG, (get_gpt_layer_local_spec(CONFIG),) * 2)
    with pytest.raises(ConfigError, match="2 layer specs for num_layers=3"):
        block.init(jax.random.key(0), jnp.zeros((1, 4, 16)), LayerInputs(AttentionMask(causal=True)))


def test_building_a_model_leaves_its_spec_unchanged() -> None:
    spec = get_gpt_layer_local_spec(CONFIG)
    before = repr(spec)
    jax.eval_shape(GPTModel(CONFIG, spec).init, jax.random.key(0), TOKENS)
    assert repr(spec) == before
    assert isinstance(spec, ModuleSpec)
