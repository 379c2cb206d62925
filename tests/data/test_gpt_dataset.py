"""GPT samples against Megatron's own, bit for bit, and what must hold for any settings."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import pathlib
import pickle
import threading

import numpy as np
import pytest

from megajax.config import ConfigError, parse_split
from megajax.data.gpt_dataset import GPTDataset, GPTDatasetConfig
from megajax.data.indexed_dataset import IndexedDataset, InMemoryDataset
from megajax.data.sources import split_documents

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/mcore_dataset_gpt"
OUTPUTS = np.load(GOLDEN / "outputs.npz")
SETTINGS = json.loads((GOLDEN / "meta.json").read_text())["settings"]
EOD, PAD = 6, 0


def _memory(*documents: list[int]) -> InMemoryDataset:
    flat = np.array([token for document in documents for token in document], np.int32)
    return InMemoryDataset("memory", flat, np.array([len(d) for d in documents]), fingerprint=str(documents))


def _golden_dataset(tag: str) -> GPTDataset:
    settings = SETTINGS[tag]
    tokens = IndexedDataset(GOLDEN / "data")
    which = ("train", "valid", "test").index(settings["split_used"])
    names = ("sequence_length", "reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    config = GPTDatasetConfig(
        seed=settings["random_seed"],
        eod=EOD,
        pad=PAD,
        add_extra_token_to_sequence=settings.get("add_extra_token_to_sequence", True),
        **{name: settings[name] for name in names},
    )
    return GPTDataset(
        tokens,
        split_documents(len(tokens), parse_split(settings["split"]))[which],
        settings["num_samples"],
        config,
        drop_last=settings.get("drop_last_partial_validation_sequence", True),
    )


@pytest.mark.parametrize("tag", list(SETTINGS))
def test_index_maps_are_megatrons(tag):
    dataset = _golden_dataset(tag)
    np.testing.assert_array_equal(dataset.documents, OUTPUTS[f"{tag}/indices"])
    for name in ("document_index", "sample_index", "shuffle_index"):
        expected = OUTPUTS[f"{tag}/{name}"]
        assert dataset.index[name].dtype == expected.dtype
        np.testing.assert_array_equal(dataset.index[name], expected)
    assert len(dataset) == OUTPUTS[f"{tag}/len"] == SETTINGS[tag]["len"]


@pytest.mark.parametrize("tag", list(SETTINGS))
def test_samples_are_megatrons(tag):
    dataset = _golden_dataset(tag)
    compared = 0
    for i in range(min(6, len(dataset))):
        if f"{tag}/sample{i}/tokens" not in OUTPUTS:
            continue
        sample, compared = dataset[i], compared + 1
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            np.testing.assert_array_equal(sample[name], OUTPUTS[f"{tag}/sample{i}/{name}"], err_msg=f"{i} {name}")
            assert sample[name].dtype == (np.float32 if name == "loss_mask" else np.int32)
        hidden = OUTPUTS[f"{tag}/sample{i}/attention_mask"][0]
        query, key = np.indices(hidden.shape)
        segments = sample.get("segment_ids", np.ones(len(hidden), np.int32))
        np.testing.assert_array_equal(hidden, (query < key) | (segments[:, None] != segments[None, :]))
        assert ("segment_ids" in sample) == SETTINGS[tag]["reset_attention_mask"]
    assert compared >= 5


def test_padding_has_no_loss_and_a_valid_id():
    config = GPTDatasetConfig(sequence_length=4, vocab_size=50)
    dataset = GPTDataset(_memory([10, 11, 12, 13, 14, 15]), np.arange(1), None, config, drop_last=False)
    samples = sorted((dataset[i] for i in range(len(dataset))), key=lambda sample: int(sample["tokens"][0]))
    assert samples[0]["tokens"].tolist() == [10, 11, 12, 13]
    assert samples[1]["tokens"].tolist() == [14, 15, 0, 0]
    assert samples[1]["labels"].tolist() == [15, 0, 0, 0]
    assert samples[1]["loss_mask"].tolist() == [1, 0, 0, 0]


def test_segments_and_positions_restart_after_eod():
    config = GPTDatasetConfig(sequence_length=8, eod=9, reset_position_ids=True, reset_attention_mask=True)
    sample = GPTDataset(_memory([9, 1, 2, 9, 9, 3, 4, 5, 9]), np.arange(1), 1, config)[0]
    assert sample["segment_ids"].tolist() == [1, 2, 2, 2, 3, 4, 4, 4]
    assert sample["position_ids"].tolist() == [0, 0, 1, 2, 0, 0, 1, 2]


def test_one_epoch_reads_every_token_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 40)
    tokens = InMemoryDataset("m", np.arange(lengths.sum(), dtype=np.int32), lengths, fingerprint="m")
    dataset = GPTDataset(tokens, np.arange(40), None, GPTDatasetConfig(sequence_length=16))
    seen = np.concatenate([dataset[i]["tokens"] for i in range(len(dataset))])
    assert len(np.unique(seen)) == len(seen) == len(dataset) * 16


def test_foreign_token_id_is_named():
    config = GPTDatasetConfig(sequence_length=2, vocab_size=12)
    dataset = GPTDataset(_memory([10, 11, 12]), np.arange(1), 1, config)
    with pytest.raises(ConfigError, match=r"data=memory holds token id 12, but the tokenizer has vocab_size=12"):
        dataset[0]
    with pytest.raises(ConfigError, match="token id -1"):
        GPTDataset(_memory([1, -1, 2]), np.arange(1), 1, config).token_frequencies(12)


def test_out_of_range_and_empty():
    dataset = GPTDataset(_memory([1, 2, 3]), np.arange(1), 1, GPTDatasetConfig(sequence_length=2))
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(ConfigError, match="hold no tokens"):
        GPTDataset(_memory([], []), np.arange(2), 1, GPTDatasetConfig(sequence_length=2))
    with pytest.raises(ConfigError, match="set eod"):
        GPTDatasetConfig(sequence_length=2, reset_attention_mask=True)


def test_cache_gives_the_same_samples_and_follows_its_inputs(tmp_path):
    tokens, config = _memory([1, 2, 3, 4], [5, 6, 7]), GPTDatasetConfig(sequence_length=2)
    plain = GPTDataset(tokens, np.arange(2), 9, config)
    for _ in range(2):
        cached = GPTDataset(tokens, np.arange(2), 9, config, cache_path=tmp_path)
        for copy in (cached, pickle.loads(pickle.dumps(cached))):
            np.testing.assert_array_equal([copy[i]["tokens"] for i in range(9)], [plain[i]["tokens"] for i in range(9)])
        assert len(list(tmp_path.iterdir())) == 1
    GPTDataset(tokens, np.arange(2), 10, config, cache_path=tmp_path)
    GPTDataset(tokens, np.arange(1), 9, config, cache_path=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    damaged = next(tmp_path.iterdir()) / "sample_index.npy"
    for entry in tmp_path.iterdir():
        (entry / damaged.name).write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match="is damaged"):
        GPTDataset(tokens, np.arange(2), 9, config, cache_path=tmp_path)


def test_pickling_a_cached_dataset_sends_no_index(tmp_path):
    tokens = InMemoryDataset("m", np.zeros(50_000, np.uint8), np.array([50_000]), fingerprint="m")
    config = GPTDatasetConfig(sequence_length=1)
    assert len(pickle.dumps(GPTDataset(tokens, np.arange(1), None, config, cache_path=tmp_path))) < 60_000


def test_many_builders_of_one_cache_entry(tmp_path):
    tokens, config = _memory(list(range(500))), GPTDatasetConfig(sequence_length=3)
    results: list[list[int]] = []

    def build():
        dataset = GPTDataset(tokens, np.arange(1), None, config, cache_path=tmp_path)
        results.append([int(dataset[i]["tokens"][0]) for i in range(len(dataset))])

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(result == results[0] for result in results)
    assert len(list(tmp_path.iterdir())) == 1
