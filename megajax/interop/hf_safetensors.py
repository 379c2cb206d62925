"""Safetensors files, one or many with an index: headers first, then one tensor at a time, read and written."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from megajax.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_SIZE = 5 * 10**9
"""Bytes; the size that Hugging Face has split at for years."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes start ... start + the size of its shape in `file`."""

    file: pathlib.Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor, alone in memory."""
        size = _bytes(self.dtype, self.shape)
        try:
            flat = np.fromfile(self.file, dtype=np.uint8, count=size, offset=self.start)
        except OSError as error:
            raise ConfigError(f"cannot read {self.file}: {error.strerror}") from error
        if flat.size != size:
            raise ConfigError(f"{self.file} is cut short: it ended inside a tensor; copy it again")
        return flat.view(self.dtype).reshape(self.shape)


def tensor_table(folder: pathlib.Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder by name, in the order of the files' bytes; reads the headers only.

    Raises:
      ConfigError: there are no safetensors weights, or a file of them is missing or damaged.
    """
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" (only {pickled[0]}, which holds pickled code; re-save it as safetensors)" if pickled else ""
        raise ConfigError(f"{folder} has no {SINGLE} and no {INDEX}{hint}; give the folder of a checkpoint")
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is no safetensors index (a JSON object with a weight_map)") from error
    table: dict[str, TensorEntry] = {}
    for name in files:
        if pathlib.PurePath(name).name != name:
            raise ConfigError(f"{folder / INDEX} names the file {name!r}, which lies outside its folder")
        header = _read_header(folder / name)
        listed = [tensor for tensor, file in weight_map.items() if file == name]
        absent = [tensor for tensor in listed if tensor not in header]
        if absent:
            raise ConfigError(f"{folder / name} lacks {absent[0]}, which {INDEX} says it holds")
        table |= {tensor: entry for tensor, entry in header.items() if weight_map.get(tensor) == name}
    return table


def _read_header(path: pathlib.Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ConfigError(f"{path} is not a complete safetensors file; copy it again")
            header = json.loads(file.read(length))
        entries = {name: _entry(path, 8 + length, value) for name, value in header.items() if name != "__metadata__"}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} has a damaged safetensors header; copy it again") from error
    end = max([8 + length, *(entry.start + _bytes(entry.dtype, entry.shape) for entry in entries.values())])
    if end != size:
        raise ConfigError(f"{path} has {size} bytes but its header describes {end}; copy it again")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _entry(path: pathlib.Path, base: int, value: Mapping[str, Any]) -> TensorEntry:
    if value["dtype"] not in DTYPES:
        raise ConfigError(f"{path} holds tensors of dtype {value['dtype']}; megajax reads {', '.join(DTYPES)}")
    dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
    start, end = value["data_offsets"]
    if start < 0 or any(n < 0 for n in shape) or end - start != _bytes(dtype, shape):
        raise ConfigError(f"{path} has a damaged safetensors header; copy it again")
    return TensorEntry(path, base + start, dtype, shape)


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


class LazyTensor(NamedTuple):
    """A tensor that is made when its bytes are written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_checkpoint(
    folder: pathlib.Path,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    *,
    companions: Sequence[pathlib.Path] = (),
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes `config.json` and the weights into `folder`, replacing a checkpoint that is there; copies `companions`.

    All files are complete on the disk under temporary names before the first one gets its own; the old config.json
    goes first and the new one comes last, so a folder with a config.json always holds weights that belong to it.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=".saving.", dir=folder))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; choose a folder that can be written") from error
    try:
        names = _write_weights(staging, tensors, max_shard_size)
        _write(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for file in companions:
            shutil.copyfile(file, staging / file.name)
            names.append(file.name)
        (folder / "config.json").unlink(missing_ok=True)
        for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
            stale.unlink(missing_ok=True)
        for name in [*names, "config.json"]:
            os.replace(staging / name, folder / name)
        _sync_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(staging: pathlib.Path, tensors: Mapping[str, LazyTensor], max_shard_size: int) -> list[str]:
    shards = list(_shards(tensors, max_shard_size))
    if len(shards) == 1:
        _write_file(staging / SINGLE, tensors)
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(staging / name, {tensor: tensors[tensor] for tensor in shard})
    total = sum(_bytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(staging / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return [*names, INDEX]


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> Iterator[list[str]]:
    """Names of each file's tensors: as many as fit into `limit` bytes, at least one."""
    shard, used = [], 0
    for name, tensor in tensors.items():
        size = _bytes(tensor.dtype, tensor.shape)
        if shard and used + size > limit:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def _write_file(path: pathlib.Path, tensors: Mapping[str, LazyTensor]) -> None:
    # Wide dtypes first keeps every tensor aligned, as the format's own writer does.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + _bytes(tensor.dtype, tensor.shape)
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise RuntimeError(f"{name} became {array.dtype} {array.shape} instead of {tensor}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        _sync(file)


def _write(path: pathlib.Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
