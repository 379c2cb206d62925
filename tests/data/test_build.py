"""From options to data sets: splits, blends, sizes, and the errors a user meets."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from megajax.config import ConfigError, DataConfig
from megajax.data.blended import BlendedDataset
from megajax.data.build import build_datasets
from megajax.data.gpt_dataset import GPTDataset
from megajax.data.sources import unigram_entropy
from megajax.data.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()


def _build(config: DataConfig, train: int | None = 20, validation: int | None = 5, test: int | None = 5):
    return build_datasets(
        config, BYTE, train_samples=train, validation_samples=validation, test_samples=test, seed=1234
    )


def _text(path, letter: str, size: int) -> str:
    path.write_text((letter * 9 + "\n") * (size // 10))
    return str(path)


def test_default_corpus_serves_all_splits():
    datasets = _build(DataConfig(seq_length=64), train=9000, validation=300)
    assert len(datasets.train) >= 9000
    assert datasets.validation is not None
    assert len(datasets.validation) >= 300
    assert datasets.test is not None
    sample = datasets.train[0]
    assert sample["tokens"].shape == (64,)
    np.testing.assert_array_equal(sample["tokens"][1:], sample["labels"][:-1])
    assert "\ufffd" not in BYTE.detokenize(sample["tokens"].tolist())
    entropy = unigram_entropy(datasets.train.token_frequencies(257))
    assert 3.0 < entropy < 3.5  # nats a byte of English with indented code


def test_the_same_seed_gives_the_same_samples(tmp_path):
    config = DataConfig(seq_length=32)
    first, again = _build(config), _build(DataConfig(seq_length=32, data_cache_path=str(tmp_path)))
    other = build_datasets(config, BYTE, train_samples=20, validation_samples=5, test_samples=5, seed=1)
    np.testing.assert_array_equal(first.train[3]["tokens"], again.train[3]["tokens"])
    assert not np.array_equal(first.train[3]["tokens"], other.train[3]["tokens"])


def test_options_reach_the_samples():
    config = DataConfig(seq_length=512, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    train = _build(config, train=None).train
    samples = [train[i] for i in range(len(train))]
    with_eod = [sample for sample in samples if (sample["tokens"] == 256).any()]
    assert with_eod
    for sample in with_eod:
        assert sample["segment_ids"][-1] == 1 + (sample["tokens"][:-1] == 256).sum()
        np.testing.assert_array_equal(sample["loss_mask"] == 0, sample["tokens"] == 256)


def test_weighted_blend(tmp_path):
    config = DataConfig(
        data=("0.25", _text(tmp_path / "a.txt", "a", 2000), "0.75", _text(tmp_path / "b.txt", "b", 2000)),
        seq_length=16,
        split="8,1,1",
    )
    train = _build(config, train=400).train
    assert isinstance(train, BlendedDataset)
    assert len(train) == 400
    has_a = sum(ord("a") in train[i]["tokens"] for i in range(400))
    assert has_a == 100


def test_without_weights_data_sets_count_by_size(tmp_path):
    data = (_text(tmp_path / "a.txt", "a", 2000), _text(tmp_path / "b.txt", "b", 6000))
    train = _build(DataConfig(data=data, seq_length=16, split="8,1,1"), train=400).train
    assert sum(ord("a") in train[i]["tokens"] for i in range(400)) == 100
    exhaustive = _build(DataConfig(data=data, seq_length=16, split="8,1,1"), train=None).train
    assert len(exhaustive) == 1600 // 16 + 4800 // 16


def test_splits_without_a_whole_sample_are_none(tmp_path):
    data = (_text(tmp_path / "a.txt", "a", 1000),)
    datasets = _build(DataConfig(data=data, seq_length=16, split="969,30,1"))
    assert datasets.validation is not None
    assert datasets.test is None
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 100}) * 1)
    datasets = _build(DataConfig(data=(str(tmp_path / "a.jsonl"),), seq_length=16))
    assert isinstance(datasets.train, GPTDataset)
    assert datasets.validation is None


def test_a_component_without_validation_text_leaves_the_others(tmp_path):
    data = (_text(tmp_path / "a.txt", "a", 5000), _text(tmp_path / "b.txt", "b", 100))
    validation = _build(DataConfig(data=data, seq_length=16, split="9,1")).validation
    assert validation is not None
    assert all(ord("b") not in validation[i]["tokens"] for i in range(len(validation)))


def test_too_little_training_text(tmp_path):
    data = (_text(tmp_path / "a.txt", "a", 100),)
    with pytest.raises(ConfigError, match=r"the training split \(split='969,30,1'\) has 101 tokens"):
        _build(DataConfig(data=data, seq_length=256))
