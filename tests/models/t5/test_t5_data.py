"""T5's samples against those that Megatron-Core 0.16.1 drew from the same sentences."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest

from megajax.data.indexed_dataset import IndexedDataset
from megajax.data.masked_dataset import MaskingConfig
from megajax.models.t5.t5_data import T5Dataset, T5DatasetConfig

GOLDEN = Path(__file__).parents[2] / "golden"
SENTENCES = GOLDEN / "mcore_dataset_bert"
SETTINGS = json.loads((GOLDEN / "mcore_dataset_t5" / "settings.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_equal_megatrons(name: str) -> None:
    settings, expected = SETTINGS[name], np.load(GOLDEN / "mcore_dataset_t5" / "outputs.npz")
    pieces = {int(i): text for i, text in json.loads((SENTENCES / "inv_vocab.json").read_text()).items()}
    masking = {key: value for key, value in settings.items() if key.startswith("masking_")}
    config = T5DatasetConfig(
        sequence_length=settings["sequence_length"],
        sequence_length_decoder=32,
        special={"pad": 0, "bos": 4, "eos": 5},
        sentinels=tuple(range(7, 17)),
        vocab_size=max(pieces) + 1,
        continues=tuple(i for i, text in pieces.items() if text.startswith("##")),
        masking=MaskingConfig(**masking, masking_use_geometric_distribution=True),
    )
    tokens = IndexedDataset(SENTENCES / "data")
    documents = np.arange(round(0.9 * (len(tokens.document_indices) - 1)))
    dataset = T5Dataset(tokens, documents, 30, config)
    np.testing.assert_array_equal(dataset.samples.index, expected[f"{name}/sample_index"])
    for index in range(6):
        for field, value in dataset.megatron_sample(index).items():
            reference = expected[f"{name}/sample{index}/{field}"]
            np.testing.assert_array_equal(value, reference, err_msg=f"sample {index}: {field}")
