"""Pickles in Megatron checkpoints, read without letting them run code: only listed classes can be built."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megajax.config import ConfigError

_DCP = "torch.distributed.checkpoint"
METADATA_CLASSES: Mapping[str, frozenset[str]] = {
    f"{_DCP}.metadata": frozenset(
        (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_DCP}.filesystem": frozenset(("_StorageInfo", "_StoragePrefix")),
    f"{_DCP}.planner": frozenset(("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    "torch": frozenset(
        ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    ),
    "torch.serialization": frozenset(("_get_layout",)),
    "collections": frozenset(("OrderedDict",)),
    "pathlib": frozenset(("PosixPath",)),
}
"""What the `.metadata` of a torch distributed checkpoint is made of. Building any of these has no side effect."""

SETTINGS_CLASSES: Mapping[str, frozenset[str]] = {
    "argparse": frozenset(("Namespace",)),
    "collections": frozenset(("OrderedDict",)),
}
"""What the settings in `common.pt` are made of."""


class Opaque:
    """Stands for a value whose class is not imported: a dtype, or an enum of Megatron's."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.args}"


OPAQUE_MODULES = ("torch", "megatron.core.enums", "megatron.core.transformer.enums")
"""Modules whose members become `Opaque` in `common.pt`, so that reading it imports neither torch nor Megatron."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, where: str, allowed: Mapping[str, frozenset[str]], opaque: tuple[str, ...]) -> None:
        super().__init__(file)
        self._where, self._allowed, self._opaque = where, allowed, opaque

    def find_class(self, module: str, name: str) -> Any:
        if name in self._allowed.get(module, ()):
            return importlib.import_module(module).__dict__[name]
        if module in self._opaque and name.isidentifier():
            # An enum or a size is called with its value; a dtype is used as it is.
            return type(name, (Opaque,), {"__module__": module})
        raise ConfigError(
            f"{self._where}: contains {module}.{name}, which is not part of a checkpoint; refused, as it could run code"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise ConfigError(f"{self._where}: holds tensors where settings are expected; refused")


def restricted_load(
    data: bytes, where: str, allowed: Mapping[str, frozenset[str]], opaque: tuple[str, ...] = ()
) -> Any:
    """Unpickles `data`, building nothing but the `allowed` classes (module -> names), and stand-ins for `opaque`.

    Raises:
      ConfigError: it contains anything else, or is no pickle. `where` names it in the message.
    """
    try:
        return _Unpickler(io.BytesIO(data), where, allowed, opaque).load()
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ConfigError(f"{where}: cannot be read ({type(error).__name__}: {error}); is it damaged?") from error


def read_common(path: Path) -> dict[str, Any]:
    """The plain settings in `common.pt` (a zip that torch.save wrote), without torch. No tensors are read.

    Raises:
      ConfigError: it is missing or damaged, or holds anything but settings.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            data = archive.read(name) if name else None
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass config and model_kwargs instead") from None
    if data is None:
        raise ConfigError(f"{path}: holds no settings; pass config and model_kwargs instead")
    common = restricted_load(data, str(path), SETTINGS_CLASSES, OPAQUE_MODULES)
    return common if isinstance(common, dict) else {}
