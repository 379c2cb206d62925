"""Megatron's torch_dist checkpoint folders, read through torch's distributed checkpoint reader (an optional extra)."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from megajax.config import ConfigError
from megajax.interop.megatron_args import settings_from_arguments
from megajax.interop.megatron_pickle import METADATA_CLASSES, read_common, restricted_load

_NOT_WEIGHTS = r"^(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)\b|_extra_state"


def iteration_folder(path: str | Path) -> Path:
    """The `iter_*` (or `release`) folder of the newest checkpoint in `path`, or `path` if it is one itself.

    Raises:
      ConfigError: there is none, or it is not in the torch_dist format.
    """
    path = Path(path)
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8").strip()
        if text != "release" and not text.isdecimal():
            raise ConfigError(f"{tracker}: says {text[:40]!r}; it must be a number or 'release'")
        path = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not (path / ".metadata").is_file():
        raise ConfigError(
            f"{path}: holds no .metadata of a torch_dist checkpoint; give the folder of such a checkpoint"
        )
    about = path / "metadata.json"
    backend = json.loads(about.read_text(encoding="utf-8")).get("sharded_backend") if about.is_file() else "torch_dist"
    if backend != "torch_dist":
        raise ConfigError(f"{path}: sharded_backend is {backend!r}; only 'torch_dist' can be read")
    return path


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The model's tensors by their names in a state dict: stacked layers taken apart. Optimizer state is not read.

    Raises:
      ConfigError: torch is not installed, or the metadata contains classes that do not belong there.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.distributed import checkpoint as dcp  # pyright: ignore[reportMissingImports]
        from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{folder}: reading a torch_dist checkpoint needs torch; install it: pip install 'megajax[megatron]'"
        ) from None

    class Reader(dcp.FileSystemReader):
        """torch's reader, whose metadata is unpickled with restrictions."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            del args, kwargs
            file = folder / ".metadata"
            metadata = restricted_load(file.read_bytes(), str(file), METADATA_CLASSES)
            if not isinstance(metadata, Metadata):
                raise ConfigError(f"{file}: is no metadata of a torch distributed checkpoint; is it damaged?")
            if metadata.storage_meta is None:
                metadata.storage_meta = dcp.metadata.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    reader = Reader(folder)
    # Tensors only: torch reads those with weights_only=True, and byte entries by an unrestricted pickle.
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not re.search(_NOT_WEIGHTS, key)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process is meant
        dcp.load(wanted, storage_reader=reader)
    return unstacked({key: _to_numpy(tensor) for key, tensor in wanted.items()})


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def unstacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layers and experts taken apart.

    `decoder.layers.<name>` of shape [layers, ...] becomes `decoder.layers.<i>.<name>`, and
    `<layer>.experts.experts.<name>` of shape [experts, ...] `<layer>.experts.local_experts.<e>.<name>`.
    """
    tensors = _apart(tensors, r"((?:en|de)coder\.layers)\.(?!\d+\.)(.+)", r"\1.{}.\2")
    return _apart(tensors, r"(.+\.experts)\.experts\.(linear_fc[12]\.(?:weight|bias))", r"\1.local_experts.{}.\2")


def _apart(tensors: Mapping[str, np.ndarray], pattern: str, name: str) -> dict[str, np.ndarray]:
    """Each tensor whose key `pattern` matches to those of its first dim, called `name` with their index."""
    result: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if re.fullmatch(pattern, key) is None:
            result[key] = value
            continue
        result |= {re.sub(pattern, name, key).format(i): part for i, part in enumerate(value)}
    return result


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(TransformerConfig fields, GPTModel arguments) from the training arguments in `common.pt`.

    Raises:
      ConfigError: the checkpoint has no arguments, or they ask for something unsupported.
    """
    arguments = read_common(folder / "common.pt").get("args")
    if arguments is None:
        raise ConfigError(f"{folder}: common.pt holds no training arguments; pass config and model_kwargs")
    return settings_from_arguments(vars(arguments))
