"""Checkpoints of training states: saving, restoring and refusing steps written by Orbax."""

import contextlib
import functools
import math
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
from jax.experimental import multihost_utils

from merge_jax.checkpoints.errors import (
    CheckpointError,
    DamagedCheckpointWarning,
    DamagedStepError,
    NotBitExactWarning,
    PrunedStepError,
    list_damage,
    refusal,
)
from merge_jax.checkpoints.foreign import is_orbax
from merge_jax.checkpoints.lock import FolderLock
from merge_jax.checkpoints.manifest import Manifest, RunFingerprint, changes, environment_of, misfits, specs_of
from merge_jax.checkpoints.names import put
from merge_jax.checkpoints.steps import OrbaxSteps
from merge_jax.checkpoints.trees import check_saveable, copy_to_host, placed_shapes
from merge_jax.paths import some_of

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpointWarning", "NotBitExactWarning"]

_State = TypeVar("_State")

_DAMAGED = "damaged"


class Checkpoints:
    """The saved steps of one run in a folder; a context manager, since a save in flight is lost without a close.

    Saving is asynchronous: `save` returns once the state is copied to the host. The next save, or the close, waits
    until the write ends and raises its errors. (Several processes compute their digests together before `save` returns,
    so that this communication cannot mix with that of training.) Each step has a manifest with a digest of every leaf.
    Restored values are checked against it, so changes on disk are always detected. A folder has one writer at a time.

    >>> with Checkpoints(folder) as checkpoints:  # doctest: +SKIP
    ...     step, state = checkpoints.restore_latest(state) or (0, state)
    ...     checkpoints.save(step + 1, state)
    """

    def __init__(
        self, folder: Path | str, *, keep: int | None = 2, facts: RunFingerprint | None = None, read_only: bool = False
    ):
        """Opens the folder, creating it if needed.

        Args:
          folder: the folder of the steps, one subfolder each.
          keep: how many of the newest steps to keep, 1 or more, besides the best one; None for all, which makes them a
            trajectory.
          facts: what the saved steps depend on besides the state, by name, such as a fingerprint of the data; steps
            saved under other facts are not restored. None restores any.
          read_only: whether to only read; then the folder of a run in progress can be read.

        Raises:
          ValueError: keep is below 1, a fact is not a plain value, another process is writing into the folder, there is
            none to read, or it is a single Orbax checkpoint.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        for name, value in (facts or {}).items():
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"the fact {name!r} must be text, a number or True or False, got {value!r}")
        path = Path(folder).absolute()
        if is_orbax(path):
            raise ValueError(
                f"{path} is one checkpoint that Orbax has written, not a folder of steps: name the folder that it is"
                " in; one that Checkpoints did not save, orbax.checkpoint.StandardCheckpointer().restore(path) reads"
            )
        if read_only and not path.is_dir():
            raise ValueError(f"there is no folder of checkpoints {path}")
        self._read_only = read_only
        self._lock: FolderLock | None = None
        if not read_only and jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        self._facts = facts
        self._damaged: dict[int, str] = {}
        self._last_warning: list[str] = []
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        try:
            self._steps = OrbaxSteps(path, keep, read_only)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *unused: object) -> None:
        """Closes the folder."""
        self.close()

    @property
    def folder(self) -> Path:
        """The folder of the steps."""
        return self._steps.folder

    @property
    def steps(self) -> tuple[int, ...]:
        """The saved steps, in order; damage is only detected on restoring."""
        self._wait_for_writer()
        return self._steps.listed()

    @property
    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the highest score, the newest if tied; None if no step has a score."""
        self._wait_for_writer()
        while True:
            with contextlib.suppress(PrunedStepError):
                return self._steps.best()
            self._reload()

    def save(self, step: int, state: Any, *, score: float | None = None) -> None:
        """Saves a pytree of JAX or NumPy arrays (typed random keys too) under a new step.

        Args:
          step: the step number.
          state: the pytree.
          score: the score that selects the best step, higher is better, such as a validation accuracy. A non-finite
            number is no score, so it is never the best and never replaces the best.

        Raises:
          FileExistsError: the step, or a newer one, exists; nothing is overwritten.
          ValueError: the folder is read-only, or a leaf would not be restored unchanged: a Python number, a NumPy array
            of a dtype that JAX converts, an object, or an element of an `nnx.List`.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} is open read-only: leave out read_only to save")
        check_saveable(state)
        environment = environment_of(state)
        self._move_damaged()
        latest = self.latest_step
        if latest is not None and latest >= step:
            raise FileExistsError(f"cannot save step {step}: step {latest} is already there")
        score = None if score is None or not math.isfinite(score) else float(score)
        if jax.process_count() > 1:
            self._write(step, state, environment, score)
        else:
            # Later steps may donate the state's buffers.
            copied = copy_to_host(state)
            self._writing = self._writer.submit(self._write, step, copied, environment, score)

    def _write(self, step: int, state: Any, environment: Mapping[str, Any], score: float | None) -> None:
        self._steps.write(state, Manifest.of(step, state, self._facts or {}, environment, score))

    def restore_latest(self, state: _State) -> tuple[int, _State] | None:
        """Returns the newest intact step and its state, or None if nothing is saved.

        Tries steps from the newest on. A damaged step is named in a `DamagedCheckpointWarning` and left in place; the
        next save moves it into the folder `damaged`, which frees its number.

        Args:
          state: a state of the same structure, shapes and dtypes (arrays or `jax.ShapeDtypeStruct`); only these and its
            leaves' placements are used. A `NotBitExactWarning` reports other devices, versions or threads than the
            saved state's.

        Raises:
          CheckpointError: the saved tree has other leaves, shapes or dtypes than `state`, or was saved under other
            facts (each is named); or all steps are damaged.
        """
        damaged = dict.fromkeys(self._files_in_place_of_steps(), "what is in its place is no folder")
        steps = list(self.steps)
        while steps:
            step = steps.pop()
            try:
                restored = self._restore(step, state)
            except PrunedStepError:  # So newer ones exist.
                self._reload()
                steps = list(self.steps)
            except DamagedStepError as error:
                damaged[step] = str(error)
            else:
                self._damaged = damaged
                if damaged:
                    message = f"{list_damage(self.folder, damaged)}; going back to step {step}"
                    warnings.warn(message, DamagedCheckpointWarning, stacklevel=2)
                return step, restored
        if damaged:
            raise CheckpointError(refusal(self.folder, damaged, "; there is no other step to restore"))
        return None

    def restore_best(self, state: _State) -> tuple[int, _State]:
        """Returns the step with the best score and its state; `state` as in `restore_latest`.

        Raises:
          CheckpointError: no step has a score, or the best one is damaged, does not fit or was saved under other facts.
        """
        while (step := self.best_step) is not None:
            try:
                with self._refusing_damage(step):
                    return step, self._restore(step, state)
            except PrunedStepError:  # So a better one exists.
                self._reload()
        raise CheckpointError(f"no step in {self.folder} has a score; saved: {list(self.steps)}")

    def restore_parts(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parts of a saved step, e.g. the parameters of one model.

        Args:
          step: the step, one of `steps`.
          parts: trees by the paths of the parts, e.g. `{"target/params": params}` of a `JointState`; read as in
            `restore_latest`.

        Raises:
          CheckpointError: the step is not saved, it is damaged, it was saved under other facts, or a part has other
            leaves, shapes or dtypes; each is named.
        """
        tree: dict[str, Any] = {}
        for path, part in parts.items():
            put(tree, path, part)
        with self._refusing_absence(step):
            loaded = self._restore(step, tree, tuple(parts))
        return {path: functools.reduce(operator.getitem, path.split("/"), loaded) for path in parts}

    def restore_arrays(self, step: int) -> dict[str, Any]:
        """Returns a saved step without a template state: nested dictionaries and lists of NumPy arrays.

        Raises:
          CheckpointError: the step is not saved, it is damaged, or it was saved under other facts.
        """
        with self._refusing_absence(step):
            manifest = self._steps.manifest(step)
            self._check_facts(manifest)
            return self._steps.load_arrays(manifest)

    def manifest(self, step: int) -> Manifest:
        """Returns the metadata of a step: leaves with shapes and digests, facts, environment, score.

        Raises:
          CheckpointError: the step is not saved, or its manifest is damaged.
        """
        with self._refusing_absence(step):
            return self._steps.manifest(step)

    @contextlib.contextmanager
    def _refusing_absence(self, step: int) -> Iterator[None]:
        """Refuses a step that is not saved, was removed during reading, or is damaged."""
        try:
            if step not in self.steps:
                raise PrunedStepError
            with self._refusing_damage(step):
                yield
        except PrunedStepError:
            self._reload()
            raise CheckpointError(f"step {step} is not saved in {self.folder}; saved: {list(self.steps)}") from None

    @contextlib.contextmanager
    def _refusing_damage(self, step: int) -> Iterator[None]:
        """Refuses a damaged step if no other can be used."""
        try:
            yield
        except PrunedStepError:
            raise
        except DamagedStepError as error:
            raise CheckpointError(refusal(self.folder, {step: str(error)})) from None

    def _reload(self) -> None:
        self._wait_for_writer()
        self._steps.reload()

    def _files_in_place_of_steps(self) -> list[int]:
        """Returns steps whose path is not a folder: Orbax skips them, or fails to save."""
        paths = [path for path in self.folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
        return sorted((int(path.name) for path in paths if not path.is_dir()), reverse=True)

    def _restore(self, step: int, tree: _State, parts: Sequence[str] | None = None) -> _State:
        """Returns this run's saved tree, or parts of it; warns of another environment."""
        manifest = self._steps.manifest(step)
        self._check_facts(manifest)
        wanted = placed_shapes(tree)
        changed = changes(manifest.environment, environment_of(wanted))
        if problems := misfits(manifest.leaves, specs_of(tree), parts):
            raise CheckpointError(f"step {step} in {self.folder} does not fit: {some_of(problems, 10, '; ')}")
        loaded, unchecked = self._steps.load(manifest, wanted, partial=parts is not None)
        if unchecked:
            message = f"lies on other hosts than it did: {unchecked} parts could not be compared with their digests"
            warnings.warn(f"step {step} in {self.folder} {message}", NotBitExactWarning, stacklevel=3)
        if changed and changed != self._last_warning:  # Many steps of one run may be read.
            self._last_warning = changed
            warnings.warn(
                f"step {manifest.step} in {self.folder} was saved in another environment, so the run will not "
                f"continue bit for bit: {'; '.join(changed)}",
                NotBitExactWarning,
                stacklevel=3,
            )
        return loaded

    def _check_facts(self, manifest: Manifest) -> None:
        changed = [] if self._facts is None else changes(manifest.facts, self._facts)
        if changed:
            raise CheckpointError(
                f"step {manifest.step} in {self.folder} was saved by another run: {'; '.join(changed)}. "
                "Restore the original values, or use another folder"
            )

    def _move_damaged(self) -> None:
        """Moves damaged steps into a separate folder for inspection."""
        if not self._damaged:
            return
        self.wait()
        if jax.process_index() == 0:
            for step in self._damaged:
                to, number = self.folder / _DAMAGED / str(step), 1
                to.parent.mkdir(exist_ok=True)
                while to.exists():
                    to, number = to.with_name(f"{step}-{number}"), number + 1
                (self.folder / str(step)).rename(to)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self._damaged = {}
        self._steps.reload()

    def wait(self) -> None:
        """Waits for the save in flight, if any, and raises its error."""
        self._wait_for_writer()
        self._steps.wait()

    def _wait_for_writer(self) -> None:
        """Waits until Orbax has received the data to save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for all saves and closes the folder."""
        try:
            try:
                self._wait_for_writer()
            finally:
                self._writer.shutdown()
                self._steps.close()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
