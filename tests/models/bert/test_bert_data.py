"""BERT's samples against those that Megatron-Core 0.16.1 drew from the same sentences."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest

from megajax.data.indexed_dataset import IndexedDataset
from megajax.data.masked_dataset import MaskingConfig
from megajax.models.bert.bert_data import BertDataset, BertDatasetConfig

FOLDER = Path(__file__).parents[2] / "golden" / "mcore_dataset_bert"
SETTINGS = json.loads((FOLDER / "settings.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_equal_megatrons(name: str) -> None:
    settings, expected = SETTINGS[name], np.load(FOLDER / "outputs.npz")
    pieces = {int(i): text for i, text in json.loads((FOLDER / "inv_vocab.json").read_text()).items()}
    masking = {key: value for key, value in settings.items() if key.startswith("masking_")}
    config = BertDatasetConfig(
        sequence_length=settings["sequence_length"],
        special={"pad": 0, "cls": 1, "sep": 2, "mask": 3},
        vocab_size=max(pieces) + 1,
        seed=settings["random_seed"],
        continues=tuple(i for i, text in pieces.items() if text.startswith("##")),
        choices=tuple(pieces),
        classification_head=settings["classification_head"],
        short_sequence_probability=settings["short_sequence_probability"],
        masking=MaskingConfig(**masking, permutation_seed=5678),
    )
    tokens = IndexedDataset(FOLDER / "data")
    count = len(tokens.document_indices) - 1
    documents = np.arange(round(0.9 * count))
    dataset = BertDataset(tokens, documents, settings["num_samples"], config)
    np.testing.assert_array_equal(dataset.samples.index, expected[f"{name}/sample_index"])
    assert dataset.samples.index.dtype == expected[f"{name}/sample_index"].dtype
    samples = sorted({int(key.split("/")[1][6:]) for key in expected.files if key.startswith(f"{name}/sample")
                      and key.split("/")[1] != "sample_index"})  # fmt: skip
    assert samples
    for index in samples:
        for field, value in dataset.megatron_sample(index).items():
            reference = expected[f"{name}/sample{index}/{field}"]
            np.testing.assert_array_equal(value, reference, err_msg=f"sample {index}: {field}")
