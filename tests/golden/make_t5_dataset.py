"""Writes tests/golden/mcore_dataset_t5/: what Megatron-Core draws for T5 from the sentences of mcore_dataset_bert.

    python tests/golden/make_t5_dataset.py

Run by hand where megatron-core and torch are installed; last made with megatron-core 0.16.1 on a CPU.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import tempfile

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from megatron.core.datasets.indexed_dataset import IndexedDataset  # pyright: ignore[reportMissingImports]
from megatron.core.datasets.t5_dataset import (  # pyright: ignore[reportMissingImports]
    T5MaskedWordPieceDataset,
    T5MaskedWordPieceDatasetConfig,
)
from megatron.core.datasets.utils import Split  # pyright: ignore[reportMissingImports]

GOLDEN = pathlib.Path(__file__).parent
SETTINGS = {
    "spans": {"sequence_length": 48, "masking_max_ngram": 10, "masking_do_full_word": True},
    "pieces": {"sequence_length": 40, "masking_max_ngram": 5, "masking_do_full_word": False},
    "more": {"sequence_length": 32, "masking_max_ngram": 10, "masking_do_full_word": True, "masking_probability": 0.3},
}


class Tokenizer:
    """Ids as in mcore_dataset_bert."""

    pad, cls, sep, mask, bos, eos = 0, 1, 2, 3, 4, 5

    def __init__(self) -> None:
        self.additional_special_tokens_ids = list(range(7, 17))
        self.unique_identifiers = {"class": "golden"}
        pieces = json.loads((GOLDEN / "mcore_dataset_bert" / "inv_vocab.json").read_text())
        self.inv_vocab = {int(i): text for i, text in pieces.items()}
        self.vocab = {text: i for i, text in self.inv_vocab.items()}


def main() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    data = IndexedDataset(str(GOLDEN / "mcore_dataset_bert" / "data"))
    documents = np.arange(round(0.9 * (len(data.document_indices) - 1)), dtype=np.int32)
    arrays = {}
    for name, settings in SETTINGS.items():
        config = T5MaskedWordPieceDatasetConfig(
            random_seed=1234,
            sequence_length=settings["sequence_length"],
            sequence_length_decoder=32,
            blend=([str(GOLDEN)], None),
            split="1,0,0",
            tokenizer=Tokenizer(),
            path_to_cache=tempfile.mkdtemp(),
            masking_probability=settings.get("masking_probability", 0.15),
            short_sequence_probability=0.1,
            masking_max_ngram=settings["masking_max_ngram"],
            masking_do_full_word=settings["masking_do_full_word"],
            masking_do_permutation=False,
            masking_use_longer_ngrams=False,
            masking_use_geometric_distribution=True,
        )
        dataset = T5MaskedWordPieceDataset(data, "golden", documents, 30, Split.train, config)
        arrays[f"{name}/sample_index"] = np.asarray(dataset.sample_index)
        for i in range(6):
            arrays |= {f"{name}/sample{i}/{key}": np.asarray(value) for key, value in dataset[i].items()}
    folder = GOLDEN / "mcore_dataset_t5"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "outputs.npz", **arrays)
    (folder / "settings.json").write_text(json.dumps(SETTINGS, indent=1))


if __name__ == "__main__":
    main()
