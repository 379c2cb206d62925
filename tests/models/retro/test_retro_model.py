"""What RETRO may see and what it may not, whatever its weights; and that how it is run changes nothing."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.backends import LocalSpecProvider
from megajax.config import ConfigError, TransformerConfig
from megajax.inference.generate import init_cache
from megajax.models.common.layer_parts import cross_attention_spec
from megajax.models.retro.chunks import chunks, in_sequence, num_chunks, readers
from megajax.models.retro.config import RetroConfig
from megajax.models.retro.decoder_attention import RetroDecoderCrossAttention
from megajax.models.retro.decoder_spec import get_retro_decoder_block_spec
from megajax.models.retro.encoder_attention import RetroEncoderCrossAttention
from megajax.models.retro.model import RETROModel
from megajax.models.retro.retrieval import ChunkDatabase
from megajax.models.retro.retro_generate import generate
from megajax.ops.attention import AttentionMask

M, K, R, VOCAB = 4, 2, 8, 30
CONFIG = RetroConfig(
    num_layers=6,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=24,
    init_method_std=0.5,
    vocab_size=VOCAB,
    max_sequence_length=160,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    retro_chunk_length=M,
    retro_num_neighbors=K,
    retro_encoder_hidden_dropout=0.0,
    retro_encoder_attention_dropout=0.0,
)


def texts(length: int, batch: int = 1) -> tuple[Any, Any]:
    """(tokens, neighbours) of random texts."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(VOCAB, size=(batch, length))
    return tokens, rng.integers(VOCAB, size=(batch, num_chunks(length, M), K, R))


@functools.cache
def parameters(config: RetroConfig = CONFIG) -> Any:
    variables: Any = jax.jit(RETROModel(config).init)(jax.random.key(0), *texts(8))
    return nn.unbox(variables)["params"]


@functools.partial(jax.jit, static_argnames="config")
def _apply(params: Any, tokens: Any, context: Any, config: RetroConfig, given: dict[str, Any]) -> Any:
    return RETROModel(config).apply({"params": params}, tokens, context, **given)


def call(tokens: Any, context: Any, config: RetroConfig = CONFIG, **given: Any) -> np.ndarray:
    return np.asarray(_apply(parameters(config), tokens, context, config, given))


def assert_close(found: Any, expected: Any) -> None:
    """Up to what two programs that add in other orders differ by: logits are about 10."""
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("length", "layers"), [(10, 6), (11, 9)])
def test_a_token_sees_what_is_before_it_and_neighbors_of_complete_chunks(length: int, layers: int) -> None:
    """By gradient: every token of text and neighbours has a row of the position table of its own."""
    config = CONFIG.replace(num_layers=layers)
    tokens, context = texts(length)
    L, size = context.shape[1], context.size
    given = {
        "position_ids": jnp.arange(length)[None],
        "context_position_ids": length + jnp.arange(size).reshape(context.shape),
    }

    def logits(table: jax.Array) -> Any:
        params = jax.tree.map(lambda x: x, parameters(config))
        params["embedding"]["position_embeddings"] = {"embedding": table}
        return jnp.sin(RETROModel(config).apply({"params": params}, tokens, context, **given)).sum(axis=-1)[0]  # type: ignore[arg-type]

    table = parameters(config)["embedding"]["position_embeddings"]["embedding"]
    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(logits))(table))).max(axis=-1)  # [S, rows of the table]
    np.testing.assert_array_equal(jacobian[:, :length] > 0, np.tri(length, dtype=bool))
    seen = (jacobian[:, length : length + size] > 0).reshape(length, L, K * R)
    assert (seen.all(-1) == seen.any(-1)).all()
    for chunk in range(L):
        last = length - 1 - (L - 1 - chunk) * M  # of the chunk; a short one is the first
        expected = np.arange(length) >= last
        if layers == 6:  # the only layer that reads is the last: nothing passes it on
            expected &= np.arange(length) < last + M
        np.testing.assert_array_equal(seen[:, chunk, 0], expected, err_msg=str(chunk))


def test_chunks_and_readers() -> None:
    x = jnp.arange(1, 11.0)[None, :, None]  # ten tokens, the first chunk has two
    np.testing.assert_array_equal(chunks(x, 4)[..., 0], [[1, 2, 0, 0], [3, 4, 5, 6], [7, 8, 9, 10]])
    np.testing.assert_array_equal(readers(x, 4)[..., 0], [[2, 3, 4, 5], [6, 7, 8, 9], [10, 0, 0, 0]])
    np.testing.assert_array_equal(in_sequence(readers(x, 4), 1, 10)[0, :, 0], [0, *range(2, 11)])
    for length in (1, 3, 4, 5, 8):
        x = jnp.arange(2 * length * 3, dtype=jnp.float32).reshape(2, length, 3)
        assert chunks(x, 4).shape == readers(x, 4).shape == (2 * num_chunks(length, 4), 4, 3)


def test_order_of_neighbors_and_shape_of_their_array_do_not_matter() -> None:
    tokens, context = texts(12, batch=2)
    expected = call(tokens, context)
    assert_close(call(tokens, context[:, :, ::-1]), expected)
    np.testing.assert_array_equal(call(tokens, context.reshape(-1, R)), expected)
    alone = call(tokens[1:], context[1:])
    assert_close(alone, expected[1:])


def test_the_encoder_knows_the_order_of_tokens_where_it_has_positions() -> None:
    tokens, context = texts(8)
    backwards = context[..., ::-1]
    rope = CONFIG.replace(position_embedding_type="rope")
    for config, knows in ((rope, False), (rope.replace(retro_encoder_rotary=True), True)):
        difference = np.abs(call(tokens, backwards, config) - call(tokens, context, config)).max()
        assert (difference > 1e-2) == knows


def turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """x [..., S, head size] at these places [S]: the two halves of a head are complex numbers that turn."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * places[:, None] * 10000.0 ** (-np.arange(half) / half))
    y = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([y.real, y.imag], axis=-1)


def attended(params: Any, x: np.ndarray, places: np.ndarray, context: np.ndarray, of_context: np.ndarray) -> np.ndarray:
    """Cross-attention of x [S, D] to a context [T, D], with a rotary embedding of their places."""

    def heads(name: str, inputs: np.ndarray) -> np.ndarray:
        return (inputs @ params[name]["kernel"] + params[name]["bias"]).reshape(len(inputs), 2, -1).swapaxes(0, 1)

    q, k = turned(heads("linear_q", x), places), turned(heads("linear_k", context), of_context)
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    y = (scores / scores.sum(-1, keepdims=True) @ heads("linear_v", context)).swapaxes(0, 1).reshape(len(x), -1)
    return y @ params["linear_proj"]["kernel"] + params["linear_proj"]["bias"]


@pytest.mark.parametrize("length", [12, 10])
def test_places_of_neighbors_are_those_of_the_chunk_and_what_follows_it(length: int) -> None:
    """Text and neighbours read each other with places counted from the start of the chunk; a short one is the first."""
    config = CONFIG.replace(position_embedding_type="rope", retro_cross_attention_rotary=True)
    rng = np.random.default_rng(0)
    L, D = num_chunks(length, M), CONFIG.hidden_size
    ends = length - M * np.arange(L)[::-1]  # of each chunk
    submodules = cross_attention_spec(LocalSpecProvider()).submodules
    x, neighbors = rng.normal(size=(1, length, D)), rng.normal(size=(L * K, R, D))

    decoder = RetroDecoderCrossAttention(config, submodules)
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(neighbors, jnp.float32)
    params = nn.unbox(decoder.init(jax.random.key(0), *inputs, mask=AttentionMask()))
    found = np.asarray(decoder.apply(params, *inputs, mask=AttentionMask()))[0]
    wanted = np.zeros((length, D))
    for chunk, end in enumerate(ends):
        readers_ = np.arange(end - 1, min(end - 1 + M, length))
        context = neighbors[chunk * K : (chunk + 1) * K].reshape(-1, D)
        places = readers_ - max(0, end - M)
        wanted[readers_] = attended(params["params"]["attn"], x[0, readers_], places, context, np.tile(np.arange(R), K))
    np.testing.assert_allclose(found, wanted, atol=1e-5)

    encoder = RetroEncoderCrossAttention(config, submodules, attention_dropout=0.0)
    inputs = inputs[1], chunks(inputs[0], M)
    params = nn.unbox(encoder.init(jax.random.key(0), *inputs, mask=AttentionMask()))
    read: Any = encoder.apply(params, *inputs, mask=AttentionMask())
    for chunk in range(L):
        for neighbor in range(chunk * K, (chunk + 1) * K):
            text = np.asarray(inputs[1][chunk], float)
            wanted = attended(params["params"]["attn"], neighbors[neighbor], np.arange(R), text, np.arange(M))
            np.testing.assert_allclose(read.output[neighbor], wanted, atol=1e-5)


def test_hidden_tokens_of_neighbors_change_nothing() -> None:
    tokens, context = texts(12, batch=2)
    mask = np.random.default_rng(0).random(context.shape) < 0.7
    others = np.where(mask, context, (context + 1) % VOCAB)
    expected = call(tokens, context, context_mask=mask)
    np.testing.assert_array_equal(call(tokens, others, context_mask=mask), expected)
    assert np.abs(call(tokens, context) - expected).max() > 1e-2
    whole = np.ones(context.shape, bool)
    assert_close(call(tokens, context, context_mask=whole), call(tokens, context))


def test_padding_behind_a_text_changes_nothing() -> None:
    tokens, context = texts(8)
    longer_tokens, longer_context = texts(16)
    longer_tokens[:, :8], longer_context[:, :2] = tokens, context
    assert_close(call(longer_tokens, longer_context)[:, :8], call(tokens, context))


def test_cached_steps_equal_the_full_pass_across_the_ends_of_chunks() -> None:
    """From a prompt without a complete chunk past the ends of two; two layers read neighbours."""
    config, prompt, length = CONFIG.replace(num_layers=9), 2, 9
    model, params = RETROModel(config), parameters(config)
    tokens, context = texts(12, batch=2)
    full = call(tokens, context, config)
    given = {"tokens": tokens[:, :prompt], "context_tokens": context[:, : prompt // M]}
    cache = init_cache(model, params, given, length=length)

    @functools.partial(jax.jit, static_argnames="method")
    def step(cache: Any, *arguments: Any, method: str) -> Any:
        logits, updated = model.apply({"params": params, "cache": cache}, *arguments, method=method, mutable=["cache"])
        return logits, updated["cache"]

    logits, cache = step(cache, given, method="read")
    assert_close(logits, full[:, prompt - 1])
    for place in range(prompt, length):
        found = context[:, place // M] if (place + 1) % M == 0 else None
        logits, cache = step(cache, tokens[:, place], place, found, method="read_on")
        assert_close(logits, full[:, place])


def test_writing_looks_up_each_chunk_once_it_is_complete() -> None:
    """What is chosen from, from a prompt of two chunks and a token on, is what the full pass says of the text."""
    config = CONFIG.replace(
        position_embedding_type="rope", retro_encoder_rotary=True, retro_cross_attention_rotary=True
    )  # fmt: skip
    database = ChunkDatabase(list(np.random.default_rng(1).integers(VOCAB, size=(5, 21))), M, pad=0)
    prompt, rows = texts(9)[0][0].tolist(), []

    def choose(logits: jax.Array, place: int) -> jax.Array:
        assert place == len(prompt) + len(rows)
        rows.append(np.asarray(logits[0]))
        return logits.argmax(axis=-1)

    new = generate(RETROModel(config), parameters(config), prompt, database, num_tokens=7, choose=choose)
    text = np.array([*prompt, *new])
    found = database.search(text.reshape(-1, M), K, [[]] * 4, span=2)
    full = call(text[None], database.read(found, R)[None], config)[0]
    assert_close(np.stack(rows), full[len(prompt) - 1 : -1])
    np.testing.assert_array_equal(new, np.stack(rows).argmax(axis=-1))


def test_hidden_tokens_are_seen_through_neighbors_of_their_chunk_alone() -> None:
    tokens, context = texts(12)
    mask = np.arange(12)[None] != 1
    other = np.where(mask, tokens, (tokens + 1) % VOCAB)
    hidden, without = (call(x, context, attention_mask=mask) for x in (tokens, other))
    changed = np.abs(hidden - without)[0].max(axis=-1) > 1e-4
    # The first chunk ends with token 3. Its neighbors read all of it, as in Megatron; tokens 3 to 6 read them.
    np.testing.assert_array_equal(np.flatnonzero(changed), [1, 3, 4, 5, 6])


def test_loss_is_that_of_the_logits() -> None:
    tokens, context = texts(12, batch=2)
    labels = np.roll(tokens, -1, axis=1)
    logs = jax.nn.log_softmax(call(tokens, context), axis=-1)
    expected = -np.take_along_axis(np.asarray(logs), labels[..., None], axis=-1)[..., 0]
    assert_close(call(tokens, context, labels=labels), expected)
    weights = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 12)
    loss_sum: Any = jax.jit(functools.partial(RETROModel(CONFIG).apply, method="loss_sum"))
    summed = loss_sum({"params": parameters()}, tokens, context, labels, weights)
    np.testing.assert_allclose(summed.weighted_sum, (weights * expected).sum(), rtol=1e-5)
    assert_close(summed.per_token, expected)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("how", ["uniform", pytest.param("block", marks=SLOW), pytest.param("selective", marks=SLOW)])
def test_recomputation_changes_no_gradient(how: str) -> None:
    tokens, context = texts(8)
    again: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": how, "recompute_num_layers": 2}
    if how == "selective":
        again = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp", "layernorm")}

    def gradient(config: RetroConfig) -> Any:
        def loss(params: Any) -> Any:
            return RETROModel(config).apply({"params": params}, tokens, context, labels=tokens).sum()  # type: ignore[union-attr]

        return jax.jit(jax.grad(loss))(parameters())

    def close(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-5, rtol=1e-4)

    jax.tree.map(close, gradient(dataclasses.replace(CONFIG, **again)), gradient(CONFIG))


@functools.partial(jax.jit, static_argnames="config")
def _train_output(params: Any, tokens: Any, context: Any, config: RetroConfig, seed: int) -> Any:
    rngs = {"dropout": jax.random.key(seed)}
    return RETROModel(config).apply({"params": params}, tokens, context, deterministic=False, rngs=rngs)


@pytest.mark.parametrize(
    "name", ["hidden_dropout", "attention_dropout", "retro_encoder_hidden_dropout", "retro_encoder_attention_dropout"]
)
def test_dropout_is_drawn_in_training(name: str) -> None:
    tokens, context = texts(8)
    config = CONFIG.replace(**{name: 0.5})
    assert config.draws_noise
    assert not CONFIG.draws_noise
    quiet = call(tokens, context)
    first, second = (np.asarray(_train_output(parameters(), tokens, context, config, seed)) for seed in (0, 1))
    assert np.abs(first - quiet).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_layers_that_read_are_megatrons() -> None:
    assert CONFIG.retro_layer_numbers == (6,)
    assert CONFIG.replace(num_layers=15).retro_layer_numbers == (6, 9, 12, 15)
    assert CONFIG.replace(num_layers=24).retro_layer_numbers == (9, 12, 15, 18, 21, 24)
    specs = get_retro_decoder_block_spec(CONFIG.replace(num_layers=9), LocalSpecProvider())
    encoders: Any = [spec.submodules.cross_attention for spec in specs]  # type: ignore[attr-defined]
    assert [i for i, spec in enumerate(encoders, 1) if spec is not None] == [6, 9]
    assert [bool(spec.params["encoder_block_spec"]) for spec in encoders if spec is not None] == [True, False]


def test_a_plain_config_will_do() -> None:
    plain = TransformerConfig(num_layers=6, hidden_size=16, num_attention_heads=2)
    model = RETROModel(plain, vocab_size=VOCAB, max_sequence_length=128)
    assert model.resolved_config.retro_chunk_length == 64
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64), int), jnp.zeros((1, 1, 2, 128), int))
    assert "encoder" in shapes["params"]["decoder"]["layers_5"]["cross_attention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retro_chunk_length": 0}, "retro_chunk_length=0"),
        ({"retro_encoder_hidden_dropout": 1.0}, "retro_encoder_hidden_dropout=1.0"),
        ({"num_query_groups": 1}, "num_query_groups=1"),
        ({"window_size": (4, 0)}, "window_size"),
        ({"retro_encoder_rotary": True}, "retro_encoder_rotary=True has no effect with position_embedding_type="),
        ({"retro_cross_attention_rotary": True}, "retro_cross_attention_rotary=True has no effect with position_"),
        ({"mtp_num_layers": 1}, "mtp_num_layers"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**options)


def test_impossible_models_and_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_layers=5 leaves no layer that reads neighbors; give 6"):
        _ = CONFIG.replace(num_layers=5).retro_layer_numbers
    tokens, context = texts(12)
    for wrong in (context[:, :2], context[0, 0], np.zeros((4, R), int)):
        with pytest.raises(ConfigError, match="1 sequences of 12 tokens have 3 chunks"):
            call(tokens, wrong)
