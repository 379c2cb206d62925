"""What retrieval is worth: that RETRO learns to read its neighbours, and that a run measures it right."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from megajax.data.build import Datasets, Sizes
from megajax.data.tokenizers import build_tokenizer
from megajax.models.registry import FAMILIES
from megajax.models.retro import retro_data, retro_family
from megajax.models.retro.config import RetroConfig
from megajax.training.setup import build_program, on_mesh, place_batch

VOCAB, M, LENGTH, BATCH, STEPS = 32, 8, 32, 16, 200
MIX = np.random.default_rng(1).integers(1, 1 << 20, size=2 * M).astype(np.int32)
READER = RetroConfig(
    num_layers=6,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    vocab_size=VOCAB,
    make_vocab_size_divisible_by=1,
    max_sequence_length=LENGTH,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    retro_chunk_length=M,
    retro_num_neighbors=1,
    retro_encoder_num_layers=1,
    retro_encoder_hidden_dropout=0.0,
    retro_encoder_attention_dropout=0.0,
)


def noise_with_its_continuation(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Texts that nothing predicts, but that the neighbour of each chunk is the chunk itself, and goes on as it does."""
    text = rng.integers(VOCAB, size=(BATCH, LENGTH + M)).astype(np.int32)
    chunks = text.reshape(BATCH, -1, M)
    return {
        "tokens": text[:, :LENGTH],
        "labels": text[:, 1 : LENGTH + 1],
        "context_tokens": np.concatenate([chunks[:, :-1], chunks[:, 1:]], axis=2)[:, :, None],
        "position_ids": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "loss_mask": np.ones((BATCH, LENGTH), np.float32),
    }


RELATIVE = READER.replace(position_embedding_type="rope", retro_encoder_rotary=True, retro_cross_attention_rotary=True)


@pytest.mark.parametrize("model", [READER, RELATIVE], ids=["learned places", "relative places"])
def test_it_learns_to_copy_from_neighbors(model: RetroConfig) -> None:
    config = Config(
        model_family="retro",
        model=model,
        optimizer=OptimizerConfig(optimizer="muon", lr=1.5e-2, lr_decay_style="cosine", min_lr=1e-3),
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(train_iters=STEPS, micro_batch_size=BATCH),
    )
    program = build_program(config, FAMILIES["retro"], devices=jax.devices()[:1])
    state, rng = program.create_state(), np.random.default_rng(0)
    with on_mesh(program):
        for _ in range(STEPS):
            batch = place_batch(program, noise_with_its_continuation(rng), num_microbatches=1)
            state, _ = program.train_step(state, batch)
    unseen = noise_with_its_continuation(rng)
    apply = jax.jit(program.model.apply)

    def losses(context: np.ndarray) -> np.ndarray:
        return np.asarray(apply({"params": state.params}, unseen["tokens"], context, labels=unseen["labels"]))

    found = losses(unseen["context_tokens"])
    others = losses(np.roll(unseen["context_tokens"], 1, axis=0))
    assert found[:, : M - 1].mean() > np.log(VOCAB) - 0.2  # the first chunk is still incomplete: nothing to read
    assert found[:, M - 1 :].mean() < 0.4
    assert others[:, M - 1 :].mean() > np.log(VOCAB) - 0.2


def documents(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    words = ["apple", "pear", "plum", "fig", "date", "lime", "kiwi"]
    lines = [{"text": " ".join(rng.choice(words, size=rng.integers(5, 30)))} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    texts = documents(tmp_path_factory.mktemp("texts") / "texts.jsonl", 60)
    config = Config(
        model_family="retro",
        model=READER,
        data=DataConfig(data=(str(texts),), seq_length=4 * M, split="60,40"),
    )
    return retro_data.datasets(config, build_tokenizer("byte"), Sizes(10, 300, None))


def measured(datasets: Datasets, loss_of_chunk: Any) -> retro_family.NeighborLosses:
    """`neighbor_losses` of a model whose loss in every token of a chunk is `loss_of_chunk(tokens, neighbours)`."""

    def apply(_: Any, tokens: Any, context: Any, *, labels: Any) -> Any:
        del labels
        by_chunk = loss_of_chunk(tokens.reshape(tokens.shape[0], -1, M), context)
        return jnp.repeat(by_chunk, M, axis=1).astype(jnp.float32)

    config = SimpleNamespace(train=SimpleNamespace(seed=3))
    finished: Any = SimpleNamespace(config=config, datasets=datasets, params={}, model=SimpleNamespace(apply=apply))
    return retro_family.neighbor_losses(finished)


def test_each_held_out_token_is_looked_at_once(datasets: Datasets) -> None:
    held_out: Any = datasets.validation
    once = held_out.once()
    tokens = sum(int(held_out.samples.tokens.sequence_lengths[i]) for i in held_out.samples.documents)
    assert len(once) == (tokens - 1) // (4 * M) < len(held_out)
    average = np.mean([once[i]["tokens"].mean() for i in range(len(once))])
    found = measured(datasets, lambda chunks, _: chunks.mean(axis=2)).found
    np.testing.assert_allclose(found, average, rtol=1e-6)


def test_neighbors_change_places_and_nothing_else(datasets: Datasets) -> None:
    found, others, error = measured(datasets, lambda _, context: context.sum(axis=(2, 3)) % 7)
    np.testing.assert_allclose(found, others, rtol=1e-6)
    assert error > 0
    found, others, error = measured(datasets, lambda chunks, _: chunks.sum(axis=2) % 7)
    assert (found, error) == (others, 0)


def test_neighbors_of_other_chunks_are_others(datasets: Datasets) -> None:
    """The loss is 1 where the sum of a chunk and its neighbours is none that held-out text has."""
    held_out: Any = datasets.validation
    once = held_out.once()
    samples = [once[i] for i in range(len(once))]
    own = np.stack(
        [s["tokens"].reshape(-1, M) @ MIX[:M] + s["context_tokens"].reshape(-1, 2 * M) @ MIX for s in samples]
    )
    found, others, error = measured(
        datasets, lambda chunks, context: ~jnp.isin(chunks @ MIX[:M] + context[:, :, 0] @ MIX, own)
    )
    assert found == 0
    assert others > 0.9
    assert 0 < error < 0.1


def test_the_standard_error_is_that_of_leaving_samples_out() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 40, size=50).astype(float)
    sums = np.stack([2.0 * tokens, 2.1 * tokens]) + rng.normal(size=(2, 50))
    result = retro_family.compared(sums, tokens)
    assert result.gain == pytest.approx((sums[1].sum() - sums[0].sum()) / tokens.sum())
    left = [np.delete(sums[1] - sums[0], i).sum() / np.delete(tokens, i).sum() for i in range(50)]  # the jackknife
    assert result.error == pytest.approx(np.sqrt(49 * np.var(left)), rel=0.02)
    assert np.isnan(retro_family.compared(sums[:, :1], tokens[:1]).error)
