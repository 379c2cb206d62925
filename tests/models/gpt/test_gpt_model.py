"""GPTModel: what a token may see, how packed and padded rows behave, how many parameters there are."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.config import ConfigError, TransformerConfig, heterogeneous_layers_from_json
from megajax.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megajax.models.gpt.gpt_model import GPTModel
from megajax.ops.attention import AttentionMask
from megajax.transformer.block import LayerInputs, TransformerBlock

CONFIG = TransformerConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24, vocab_size=29,
    max_sequence_length=12, init_method_std=0.3, position_embedding_type="rope", normalization="RMSNorm",
    gated_linear_unit=True, activation_func="silu", add_bias_linear=False,
)  # fmt: skip
POSITIONS = ("rope", "yarn", "learned_absolute", "none")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 29, size=(2, 12))


def gpt(config: TransformerConfig, **arguments: Any) -> Any:
    """As Any: linen's types say that `apply` may return a tuple."""
    return GPTModel(config, **arguments)


def build(**changes: Any) -> tuple[Any, Any]:
    model = gpt(CONFIG.replace(**changes))
    return model, nn.unbox(model.init(jax.random.key(0), TOKENS)["params"])


@pytest.mark.parametrize("changes", [{}, {"window_size": (3, 0)}, {"position_embedding_type": "learned_absolute"}])
def test_no_logit_depends_on_a_later_token(changes: dict[str, Any]) -> None:
    """By gradient: the embedding of each position gets its own copy, and the logits' Jacobian is triangular."""
    model, params = build(num_layers=1, **changes)
    width, S = 3, 6

    def logits(embedded_SD: Any) -> Any:
        # Token i is row i of the table, so that the table's rows are the positions.
        own = {"embedding": {**params["embedding"], "word_embeddings": {"embedding": embedded_SD}}}
        head = {**params, **own, "output_layer": {"kernel": jnp.ones((16, 29))}}
        untied = gpt(model.config.replace(share_embeddings_and_output_weights=False))
        return untied.apply({"params": head}, jnp.arange(S)[None])[0, :, 0]

    jacobian = jax.jacobian(logits)(jnp.asarray(RNG.normal(size=(29, 16)), jnp.float32))[:, :S]
    influence = np.abs(jacobian).max(-1)
    query, key = np.arange(S)[:, None], np.arange(S)[None]
    visible = (key <= query) & (key >= query - width if "window_size" in changes else True)
    assert (influence[~visible] == 0).all()
    assert (influence[visible] > 0).all()


@pytest.mark.parametrize("kind", POSITIONS)
def test_packed_documents_equal_rows_of_their_own(kind: str) -> None:
    model, params = build(position_embedding_type=kind)
    segments = np.array([[0] * 5 + [1] * 4 + [2] * 3])
    packed = model.apply({"params": params}, TOKENS[:1], segment_ids=segments)
    for document in range(3):
        where = np.flatnonzero(segments[0] == document)
        alone = model.apply({"params": params}, TOKENS[:1, where])
        np.testing.assert_allclose(packed[:, where], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", POSITIONS)
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    model, params = build(position_embedding_type=kind)
    alone = model.apply({"params": params}, TOKENS[:, :7])
    keep = np.zeros((2, 12), bool)
    keep[:, :7] = True
    right = model.apply({"params": params}, np.where(keep, TOKENS, 1), attention_mask=keep)
    np.testing.assert_allclose(right[:, :7], alone, atol=2e-5, rtol=1e-4)
    keep = keep[:, ::-1]
    tokens = np.ones_like(TOKENS)
    tokens[:, 5:] = TOKENS[:, :7]
    left = model.apply(
        {"params": params}, tokens, attention_mask=keep, position_ids=np.maximum(np.arange(12) - 5, 0)[None]
    )
    np.testing.assert_allclose(left[:, 5:], alone, atol=2e-5, rtol=1e-4)


def test_padding_of_the_vocabulary_changes_neither_logits_nor_losses_nor_gradients() -> None:
    model, params = build()
    padded = gpt(model.config.replace(make_vocab_size_divisible_by=16))
    assert padded.config.padded_vocab_size == 32
    table = params["embedding"]["word_embeddings"]["embedding"]
    more = {**params, "embedding": {"word_embeddings": {"embedding": jnp.concatenate([table, jnp.ones((3, 16))])}}}

    def loss(model: Any, params: Any) -> Any:
        weights = jnp.ones(TOKENS.shape)
        return model.apply({"params": params}, TOKENS, (TOKENS + 1) % 29, weights, method="loss_sum").weighted_sum

    np.testing.assert_allclose(
        padded.apply({"params": more}, TOKENS), model.apply({"params": params}, TOKENS), atol=1e-6, rtol=1e-5
    )
    expected, gradients = jax.value_and_grad(lambda p: loss(model, p))(params)
    got, padded_gradients = jax.value_and_grad(lambda p: loss(padded, p))(more)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    rows = padded_gradients["embedding"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(rows[29:], 0)
    np.testing.assert_allclose(rows[:29], gradients["embedding"]["word_embeddings"]["embedding"], atol=1e-5)


def test_the_training_loss_is_the_weighted_sum_of_the_token_losses() -> None:
    model, params = build(label_smoothing=0.1, z_loss_coeff=0.01)
    labels, weights = (TOKENS + 1) % 29, RNG.uniform(size=TOKENS.shape).astype(np.float32)
    fused = model.apply({"params": params}, TOKENS, labels, weights, method="loss_sum")
    per_token = model.apply({"params": params}, TOKENS, labels=labels)
    np.testing.assert_allclose(fused.per_token, per_token, rtol=1e-5)
    np.testing.assert_allclose(fused.weighted_sum, (per_token * weights).sum(), rtol=1e-5)


def test_bf16_is_close_to_fp32_and_keeps_fp32_logits() -> None:
    model, params = build()
    half, _ = build(bf16=True)
    got = half.apply({"params": params}, TOKENS)
    expected = model.apply({"params": params}, TOKENS)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_counts_of_megatrons_own_tests() -> None:
    config = TransformerConfig(num_layers=2, hidden_size=12, num_attention_heads=4)
    model = gpt(config, vocab_size=100, max_sequence_length=4, share_embeddings_and_output_weights=False)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    assert count(params) == 6240
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["decoder"]["layers"])
    assert count(layer) == 1884
    assert count(layer["mlp"]) == 1212
    assert count(layer["self_attention"]) + count(layer["input_layernorm"]) == 648
    assert count(params["embedding"]) == 1248


@pytest.mark.parametrize(("gate", "expected"), [(False, 66304), (True, 82816)])
def test_parameter_counts_of_attention_with_the_norm_that_megatron_fuses_into_it(gate: bool, expected: int) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=128, num_attention_heads=4, attention_output_gate=gate)
    model = gpt(config, vocab_size=8, position_embedding_type="none")
    layers = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))["params"]["decoder"]["layers"]
    assert count(layers["self_attention"]) + count(layers["input_layernorm"]) == expected


def test_parameter_count_of_a_block() -> None:
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    spec = get_gpt_layer_local_spec(config)
    block: Any = TransformerBlock(config, (spec,) * 2, spec.submodules.input_layernorm)
    inputs = LayerInputs(AttentionMask(causal=True))
    assert count(jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 4, 64)), inputs)) == 100096


NO_OP, LINEAR = {"no_op": True}, {"replace_with_linear": True}


@pytest.mark.parametrize(
    ("attention", "mlp", "expected"),
    [
        ({"n_heads_in_group": 4}, {"ffn_mult": 5.25}, 1486901248),
        (NO_OP, {"ffn_mult": 5.25}, 1444954112),
        ({"num_query_groups": 8}, NO_OP, 1310736384),
        (LINEAR, {"ffn_mult": 5.25}, 1461735424),
        ({"num_query_groups": 8}, LINEAR, 1327517696),
    ],
)
def test_parameter_counts_of_heterogeneous_models(attention: dict, mlp: dict, expected: int) -> None:
    first = {"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 14336}}
    layers = heterogeneous_layers_from_json(
        {"block_configs": [first, {"attention": attention, "ffn": mlp}]}, hidden_size=4096, num_attention_heads=32
    )
    config = TransformerConfig(
        num_layers=2, hidden_size=4096, num_attention_heads=32, vocab_size=128256, position_embedding_type="rope",
        normalization="RMSNorm", gated_linear_unit=True, activation_func="silu", add_bias_linear=False,
        share_embeddings_and_output_weights=False, heterogeneous_layers=layers,
    )  # fmt: skip
    params = jax.eval_shape(gpt(config).init, jax.random.key(0), jnp.zeros((1, 4), int))
    assert count(params) == expected


def test_arguments_of_the_model_replace_fields_of_its_config() -> None:
    model = gpt(CONFIG, vocab_size=40, rotary_base=500.0, rope_scaling=True, share_embeddings_and_output_weights=False)
    config = model.resolved_config
    assert (config.vocab_size, config.rotary_base, config.rope_scaling_type) == (40, 500.0, "llama3")
    assert "output_layer" in model.init(jax.random.key(0), TOKENS)["params"]


def test_missing_sizes_are_named() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ConfigError, match="vocab_size=None"):
        gpt(config).init(jax.random.key(0), TOKENS)
    with pytest.raises(ConfigError, match="max_sequence_length=None"):
        gpt(config, vocab_size=29).init(jax.random.key(0), TOKENS)


def test_layers_of_multi_token_prediction_go_on_counting_in_a_window_pattern() -> None:
    """Megatron numbers them on: `layer_number + num_layers` in `multi_token_prediction.py`."""
    config = TransformerConfig(
        num_layers=4, hidden_size=16, num_attention_heads=2, window_size=(4, 0), window_attn_skip_freq=3
    )
    layers = [config.for_layer(index).window_size for index in range(4)]
    further = [config.for_further_layer(depth).window_size for depth in range(3)]
    assert layers + further == [(4, 0), (4, 0), None, (4, 0), (4, 0), None, (4, 0)]
