"""The checkpoint store of a run: asynchronous atomic saves, keep-N, and restores onto whatever mesh the run has now."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from megajax.checkpoint import files, tree
from megajax.checkpoint.arrays import ArrayWriter, read
from megajax.checkpoint.files import CheckpointError
from megajax.config import CheckpointConfig, ConfigError
from megajax.parallel.gradient_sums import is_fp8_meta

_log = logging.getLogger("megajax.checkpoint")
_FORMAT = 1


class CheckpointStore:
    """One folder of checkpoints.

    A step on disk is `step_00000123/`: Orbax's arrays, and beside them `config.json` (model family and settings),
    `extras.json` (the run's own state), `tree.json` (path, logical shape, dtype and axes of every leaf) and
    `integrity.json` (size and SHA-256 of each file, written last). The folder gets its name by one atomic rename.

    Parameters are stored as the model defines them, whatever the mesh was: whole `[L, ...]` stacks, and the vocabulary
    without its padding, for parameters and optimizer moments alike. Several processes may share a store: each writes
    and reads its own shards (Orbax), process 0 writes the JSON files, so `extras` must be the same everywhere.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        identity: dict[str, Any],
        axes: dict[str, tree.Axes],
        lock: IO[str] | None,
        read_only: bool,
    ) -> None:
        """Use `open`."""
        self.directory = directory
        self._config = config
        self._identity = identity
        self._axes = axes
        self._lock = lock
        self._read_only = read_only
        self._writer: ArrayWriter | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._texts: dict[str, str] = {}
        self._saving: Path | None = None
        self._current_step: int | None = None
        """The step of this folder that the run stands on: the last one it saved or restored here."""

    @classmethod
    def open(
        cls,
        directory: str | Path,
        config: CheckpointConfig,
        *,
        family: str,
        model_config: Mapping[str, Any],
        logical_axes: Any = None,
        read_only: bool = False,
    ) -> Self:
        """Opens a folder to save into (created, checked for write permission, locked, rid of leftovers), or to read.

        Args:
          directory: where the `step_*` folders are or will be; a local or network path.
          config: `save_retain` and `async_save` are used.
          family: the model's name in the registry, for `config.json` and error messages.
          model_config: the model's settings as JSON values; `vocab_size` is the number of rows that are stored.
          logical_axes: a pytree like the state whose leaves are tuples of axis names (or None); a dim named "vocab" is
            stored without its padding.
          read_only: leave the folder untouched; `save` is then an error.

        Raises:
          CheckpointError: the folder cannot be written, or another run is saving there.
        """
        directory = Path(directory).expanduser().absolute()
        lock = None
        if not read_only and jax.process_index() == 0:
            lock = files.claim(directory)
            files.clean_leftovers(directory)
        identity = json.loads(_dumps("model_config", {"family": family, "model_config": dict(model_config)}))
        return cls(directory, config, identity, tree.flatten_axes(logical_axes), lock, read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, extras: Mapping[str, Any], *, force: bool = False) -> bool:
        """Saves `state` as `step`. With `async_save` it returns once everything has been copied to the host.

        The state's buffers may be donated as soon as this returns. At most one save runs at a time: a second call
        waits for the first. Every process must call it.

        Args:
          step: not negative. Saving the step the run already stands on does nothing, unless `force`.
          state: a pytree of arrays, numpy or Python scalars, and None.
          extras: JSON values: data-iterator state, consumed samples, seeds. Bytes must be encoded by the caller.

        Returns:
          Whether anything was written (or begun).

        Raises:
          CheckpointError: this save cannot start, or the last one failed (disk full, ...). Earlier steps are intact.
        """
        self.wait()
        if self._read_only:
            raise CheckpointError(f"{self.directory}: was opened to read only; save into another folder")
        if step == self._current_step and not force:
            return False
        if self._current_step is None and (newer := [s for s in files.list_steps(self.directory) if s > step]):
            raise CheckpointError(
                f"save={self.directory}: holds step {newer[-1]} of another run, newer than step {step}; resume from it"
                " or give another folder"
            )
        named = tree.flatten(state)
        leaves = tree.describe(named, self._axes, self._vocab_size)
        self._texts = {
            files.CONFIG_FILE: _dumps("model_config", {"format": _FORMAT, "step": step, **self._identity}),
            files.EXTRAS_FILE: _dumps("extras", dict(extras)),
            files.TREE_FILE: json.dumps({name: leaf.to_json() for name, leaf in leaves.items()}, indent=1),
        }
        arrays = {name: tree.unpad(value, leaves[name]) for name, value in named.items() if value is not None}
        self._saving = files.step_folder(self.directory, step)
        try:
            writer = self._writer = self._writer or ArrayWriter(self._complete_folder)
            if jax.process_index() == 0:
                files.put_aside(self._saving)
            writer.start(self._saving, arrays)
        except Exception as error:
            self._give_up(step, error)
        self._running = self._pool.submit(self._finish, writer, step)
        if not self._config.async_save:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when no save is running; raises `CheckpointError` if the last one failed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Waits for the running save, then releases threads and the lock. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                self._lock.close()

    def latest_step(self) -> int | None:
        """The newest complete step, whether or not its files are still good; None when there is none."""
        self.wait()
        steps = files.list_steps(self.directory)
        return _from_process_0(steps[-1] if steps else None)

    def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step into the shapes, dtypes and shardings of `abstract_state`; resharding is the only path.

        Every file of the step is first checked against the manifest. A damaged newest step is skipped with a warning.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with the new shardings (or arrays, scalars, None). A "vocab"
            dim may have any padded size; the padding is zero. Floats may change precision.
          step: which one; None takes the newest that is undamaged.

        Returns:
          (state, extras).

        Raises:
          CheckpointError: no checkpoint, damaged, or of another model: the first parameter that differs is named.
        """
        self.wait()
        step, folder = self._choose(step)
        state = self._read(folder, abstract_state, prefix="")
        self._current_step = step
        return state, files.read_json(folder / files.EXTRAS_FILE)

    def restore_params(self, abstract_params: Any, *, step: int | None = None) -> Any:
        """Like `restore`, but only what is stored under `params/`: the weights, to start a new run from them."""
        self.wait()
        _, folder = self._choose(step)
        return self._read(folder, abstract_params, prefix="params/")

    @property
    def _vocab_size(self) -> int | None:
        return self._identity["model_config"].get("vocab_size")

    def _read(self, folder: Path, target: Any, prefix: str) -> Any:
        stored = {name: tree.Leaf.from_json(e) for name, e in files.read_json(folder / files.TREE_FILE).items()}
        there = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
        named = {prefix + name: leaf for name, leaf in tree.flatten(target).items()}
        # A run may begin, or end, to compute in fp8 where another stood; it then begins without scales.
        there = {name: leaf for name, leaf in there.items() if name in named or not is_fp8_meta(name.split("/"))}
        new = {name: leaf for name, leaf in named.items() if name not in there and is_fp8_meta(name.split("/"))}
        named = {name: leaf for name, leaf in named.items() if name not in new}
        axes = self._axes or {name: leaf.axes for name, leaf in there.items() if leaf.axes is not None}
        here = tree.describe(named, axes, self._vocab_size)
        saved = files.read_json(folder / files.CONFIG_FILE)
        changed = _changed_settings(self._identity, saved)
        if difference := tree.first_difference(here, there):
            name, how = difference
            if name.startswith("params/"):
                fix = "use its settings (config.json there) or another folder"
            else:
                fix = "use the same optimizer settings, or take only the weights: --finetune --load"
            note = f" ({', '.join(changed[:3])})" if changed else ""
            raise CheckpointError(f"{folder}: {name} {how}{note}; {fix}")
        if changed:
            _log.warning("%s was saved with other settings: %s", folder, ", ".join(changed))
        try:
            zeros = {name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in new.items()}
            return tree.unflatten(target, _strip(read(folder, named, stored) | zeros, prefix))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({files.reason(error)}); restore another step") from error

    def _choose(self, step: int | None) -> tuple[int, Path]:
        """The step to restore, checked by process 0. All processes return, or raise, alike."""
        chosen, message = None, f"{self.directory}: process 0 found no checkpoint to restore"
        if jax.process_index() == 0:
            try:
                chosen = self._choose_here(step)
            except CheckpointError as error:
                message = str(error)
        chosen = _from_process_0(chosen)
        if chosen is None:
            raise CheckpointError(message)
        return chosen, files.step_folder(self.directory, chosen)

    def _choose_here(self, step: int | None) -> int:
        steps = files.require_steps(self.directory)
        if step is not None and step not in steps:
            have = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.directory}: has no step {step}; it has {have}")
        problem = ""
        for candidate in [step] if step is not None else reversed(steps):
            folder = files.step_folder(self.directory, candidate)
            found = files.damage(folder)
            if found is None:
                return candidate
            problem = problem or f"{folder}: is damaged, {found}"
            if step is None and candidate != steps[0]:
                _log.warning("%s: is damaged, %s; falling back to the step before", folder, found)
        others = [s for s in steps if s != step]
        fix = f"restore another step ({', '.join(map(str, others))})" if step is not None and others else "start anew"
        raise CheckpointError(f"{problem}; {fix}")

    def _complete_folder(self) -> None:
        """Runs on process 0 when the arrays are on disk, before Orbax renames the folder to its final name."""
        assert self._saving is not None
        [folder] = list(self.directory.glob(self._saving.name + ".orbax-checkpoint-tmp*"))
        for name, text in self._texts.items():
            files.write_text(folder / name, text)
        files.write_integrity(folder)

    def _finish(self, writer: ArrayWriter, step: int) -> None:
        try:
            writer.wait()
        except Exception as error:
            self._give_up(step, error)
        self._current_step = step
        if jax.process_index() == 0:
            try:
                self._retire(step)
            except OSError as error:
                _log.warning("%s: old checkpoints could not be removed (%s)", self.directory, files.reason(error))

    def _retire(self, step: int) -> None:
        """Once `step` is safe: removes its former self, and all but the newest `save_retain` steps."""
        files.fsync_folder(self.directory)
        files.clean_leftovers(self.directory)
        steps = files.list_steps(self.directory)
        # Steps beyond this one belong to a past that the run left when it restored an older step.
        kept = [s for s in steps if s <= step][-self._config.save_retain :]
        for old in set(steps) - set(kept):
            files.remove_step(files.step_folder(self.directory, old))

    def _give_up(self, step: int, error: Exception) -> NoReturn:
        """Removes what a failed save left, and raises the one line the user gets."""
        with contextlib.suppress(Exception):
            if self._writer is not None:
                self._writer.close()
        self._writer = None
        with contextlib.suppress(OSError):
            if jax.process_index() == 0:
                files.clean_leftovers(self.directory)
        steps = files.list_steps(self.directory)
        intact = f"step {steps[-1]} is intact" if steps else "there is no earlier one"
        if isinstance(error, ConfigError | TypeError | AttributeError | AssertionError):
            raise error  # a bug, not the disk
        why = f"step {step} was not saved ({files.reason(error)}); {intact}"
        raise CheckpointError(f"{self.directory}: {why}; make room there or give another folder") from error


def _from_process_0(value: int | None) -> int | None:
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    agreed = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if agreed < 0 else agreed


def _strip(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): leaf for name, leaf in named.items()}


def _changed_settings(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    changed = []
    if saved["family"] != here["family"]:
        changed.append(f"model {saved['family']} there, {here['family']} here")
    mine, theirs = here["model_config"], saved["model_config"]
    # What only one of them has is an option that the other's version of megajax does not know.
    names = sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
    changed += [f"{name}={theirs[name]} there, {mine[name]} here" for name in names]
    return changed


def _dumps(what: str, value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray | jax.Array):
            return np.asarray(item).tolist()
        raise TypeError(f"{what} holds a {type(item).__name__}, which JSON cannot keep")

    return json.dumps(value, indent=1, default=plain)
