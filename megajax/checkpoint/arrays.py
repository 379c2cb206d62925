"""The arrays of a step, written and read with Orbax, which is imported only when first needed.

Importing Orbax takes about half a second, which a run would otherwise pay before its first step.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.checkpoint.tree import NONE, Leaf, flatten, nest

_log = logging.getLogger("megajax.checkpoint")
_SAVE_TIMEOUT_SECONDS = 3600
"""How long the processes of a run wait for the slowest one's files before the save has failed."""


class _OnlyErrors(logging.Filter):
    """Turns what Orbax notes on the way into debug messages of `megajax.checkpoint`.

    That is its progress, its warnings, and the tracebacks of a failing save, whose exception is also raised; nobody
    reads the metadata file that it may fail to write. Any other error stays an error.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in Path(record.pathname).parts:
            return True
        message = record.getMessage()
        passing = ("raised an exception", "in background save thread", "Failed to write metadata")
        if record.levelno >= logging.ERROR and not any(text in message for text in passing):
            return True
        _log.debug("%s", message, exc_info=record.exc_info)
        return False


_ONLY_ERRORS = _OnlyErrors()


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_ONLY_ERRORS)
    return ocp


class ArrayWriter:
    """Writes named arrays into a folder that appears under its name, by one rename, when all of it is there.

    `before_commit` is called on process 0, in the background, between the last array file and the rename.
    """

    def __init__(self, before_commit: Callable[[], None]) -> None:
        ocp = _orbax()
        self._args = ocp.args.PyTreeSave
        # Weights are noise to a compressor: zstd saves 7 % and costs the training step's cores.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        options = ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT_SECONDS, post_finalization_callback=before_commit)
        self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)

    def start(self, folder: Path, named: Mapping[str, Any]) -> None:
        """Copies the arrays to the host, then writes them in the background. Every process must call it."""
        self._checkpointer.save(folder, args=self._args(nest(named)))

    def wait(self) -> None:
        """Returns when `folder` is complete on disk; raises whatever kept it from being so."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the writer's threads."""
        self._checkpointer.close()


def read(folder: Path, targets: Mapping[str, Any], stored: Mapping[str, Leaf]) -> dict[str, Any]:
    """Reads leaves of a step, each process only the parts that its devices hold.

    Args:
      folder: the step's folder.
      targets: path -> a ShapeDtypeStruct or array (which give shape, dtype, sharding), a numpy array or a Python scalar
        (which are returned as such), or None. A dim that is larger than the stored one is filled up with zeros.
      stored: what the step holds.

    Returns:
      path -> value, for the paths of `targets`. Without a sharding an array lands on the first local device.
    """
    ocp = _orbax()
    wanted = {name: target for name, target in targets.items() if target is not None}
    restore_args = {}
    for name, target in wanted.items():
        if isinstance(target, jax.Array | jax.ShapeDtypeStruct):
            sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            restore_args[name] = ocp.ArrayRestoreArgs(
                sharding=sharding,
                global_shape=tuple(target.shape),
                dtype=target.dtype,
                strict=tuple(target.shape) == stored[name].shape,
            )
        else:
            restore_args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    values: dict[str, Any] = dict.fromkeys(targets)
    if wanted:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            partial = any(name not in wanted and leaf.dtype != NONE for name, leaf in stored.items())
            arguments = ocp.args.PyTreeRestore(
                item=nest(wanted), restore_args=nest(restore_args), partial_restore=partial
            )
            values |= flatten(checkpointer.restore(folder, args=arguments))
    return {name: _like(targets[name], value, stored[name]) for name, value in values.items()}


def _like(target: Any, value: Any, leaf: Leaf) -> Any:
    if isinstance(target, bool | int | float | complex):
        return type(target)(value.item())
    if isinstance(target, np.ndarray | np.generic):
        padding = [(0, size - found) for size, found in zip(target.shape, leaf.shape, strict=True)]
        return np.pad(value, padding).astype(target.dtype)
    return value
