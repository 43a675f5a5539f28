"""Lists, reads, writes and prunes the steps of a folder with Orbax; only this module uses Orbax for steps."""

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from merge_jax.checkpoints.errors import DamagedStepError, PrunedStepError, first_line
from merge_jax.checkpoints.files import naming_file
from merge_jax.checkpoints.lock import is_locked
from merge_jax.checkpoints.manifest import Manifest, differing_leaves
from merge_jax.paths import flatten, some_of

__all__ = ["OrbaxSteps"]

_Tree = TypeVar("_Tree")
_Found = TypeVar("_Found")

_MANIFEST = "manifest"
# Within a process, Orbax saves into one folder at a time; there may be several folders.
_ORBAX = threading.Lock()
_LISTINGS = 10  # Attempts to list steps.
_PATIENCE = 60.0  # Seconds of an acceptable wait.
_PRUNING = 2.0  # Seconds that a writer may take to remove one step's files.


class OrbaxSteps:
    """The steps of a folder; a step removed by another process raises PrunedStepError, not damage."""

    def __init__(self, folder: Path, keep: int | None, read_only: bool):
        """Lists the steps of an existing folder; see `Checkpoints`."""
        self._read_only = read_only
        self._saving: _Saving | None = None
        self._told: BaseException | None = None
        self._checkpointer = _retry_listing(
            lambda: ocp.training.Checkpointer(
                str(folder),
                # Orbax types its policies for its older interface.
                save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
                preservation_policy=cast(Any, _NewestAndBest(keep, lambda: self.scores)),
                # A process killed while saving leaves such a folder; it never holds a complete step.
                cleanup_tmp_directories=not read_only,
            )
        )
        self.folder = Path(self._checkpointer.directory)
        if read_only and not self.listed() and is_locked(folder):
            self.reload()

    def listed(self) -> tuple[int, ...]:
        """Returns the steps of the last listing, in order."""
        return tuple(sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints))

    def reload(self) -> None:
        """Lists the current steps: a writer may have added some."""
        self.wait()
        for _ in range(_LISTINGS):
            _retry_listing(self._checkpointer.reload)
            # Between the removal of one step and the arrival of another, a listing may find neither.
            if self.listed() or not self._read_only:
                break
            time.sleep(0.02)
        self.__dict__.pop("scores", None)

    @functools.cached_property
    def scores(self) -> dict[int, float]:
        """The scores of all steps with a score."""
        scores = {}
        for step in self.listed():
            try:
                score = self.manifest(step).score
            except PrunedStepError:
                if self._read_only:  # The writer has continued, so the current steps may have other scores.
                    raise
            except DamagedStepError:
                pass
            else:
                if score is not None:
                    scores[step] = score
        return scores

    def best(self) -> int | None:
        """Returns the step with the highest score, the newest if tied; None if no step has a score."""
        return _best_of(self.scores, self.scores)

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step; raises DamagedStepError if it has changed."""
        with self._noticing_pruning(step):
            try:
                metadata: Any = self._checkpointer.metadata(step).custom_metadata or {}
                manifest = Manifest.from_json(metadata.get(_MANIFEST))
            except Exception as error:  # Orbax raises many types, including bare Exception.
                raise DamagedStepError(first_line(error)) from None
        if manifest.step != step:
            raise DamagedStepError(f"it is step {manifest.step}")
        return manifest

    def load(self, manifest: Manifest, wanted: _Tree, *, partial: bool = False) -> tuple[_Tree, int]:
        """Returns a step as a tree of the given shapes, after comparing every leaf with its digest.

        Args:
          manifest: the step's manifest.
          wanted: the tree as shapes, with the placements of the result.
          partial: whether it is only part of the saved tree.

        Returns:
          The tree, and the number of leaf parts that could not be compared.

        Raises:
          DamagedStepError: a leaf cannot be read, or has changed.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = partial

        def load() -> _Tree:
            try:
                with context:
                    return self._checkpointer.load(manifest.step, wanted)
            except Exception as error:
                # Orbax does not distinguish damage from another container or empty node, such as an extra None.
                try:
                    return self._load_as_saved(manifest.step, wanted)
                except Exception:
                    raise error from None

        return self._compared(manifest, load, partial=partial)

    def _load_as_saved(self, step: int, wanted: _Tree) -> _Tree:
        """Returns the leaves of a tree by path, regardless of their saved containers and empty nodes."""
        leaves = flatten(wanted)

        def placed(key_path: Any, _: Any) -> Any:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return leaves.get(path, leaves.get(path.removesuffix("/value"), ocp.PLACEHOLDER))

        saved: Any = self._checkpointer.metadata(step).metadata
        if saved is None:
            raise ValueError("nobody knows what was saved")
        loaded = _unwrap_variables(self._checkpointer.load(step, jax.tree.map_with_path(placed, saved)), leaves)
        found = flatten(loaded)
        return jax.tree.unflatten(jax.tree.structure(wanted), [found[path] for path in leaves])

    def load_arrays(self, manifest: Manifest) -> dict[str, Any]:
        """Returns a whole step as nested dictionaries and lists of NumPy arrays; raises as `load`."""

        def load() -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sharding info not provided")  # On purpose.
                return _unwrap_variables(self._checkpointer.load(manifest.step), manifest.leaves)

        return self._compared(manifest, load, partial=False)[0]

    def _compared(self, manifest: Manifest, load: Callable[[], _Tree], *, partial: bool) -> tuple[_Tree, int]:
        with self._noticing_pruning(manifest.step):
            try:
                with _ORBAX:
                    loaded = load()
                leaves = flatten(loaded)
            except Exception as error:
                raise DamagedStepError(first_line(error)) from None
            changed = [path for path, leaf in leaves.items() if not isinstance(leaf, jax.Array | np.ndarray)]
            changed += [] if partial else manifest.leaves.keys() ^ leaves.keys()
            unchecked = 0
            if not changed:
                for path, leaf in leaves.items():
                    key = manifest.leaves[path].key
                    if key and key != str(leaf.dtype):  # Orbax returns this if a step's description is gone.
                        raise DamagedStepError(f"{path} came back as {leaf.dtype}, not as {key}")
                changed, unchecked = differing_leaves(manifest, loaded)
            if changed:
                raise DamagedStepError(f"{some_of(sorted(changed), 3)} changed since it was saved")
        return loaded, unchecked

    @contextlib.contextmanager
    def _noticing_pruning(self, step: int) -> Iterator[None]:
        """Raises PrunedStepError for a damaged step that its writer removed after the listing."""
        try:
            yield
        except DamagedStepError as error:
            # Its files are removed one by one.
            path, until = self.folder / str(step), time.monotonic() + _PRUNING
            while os.path.lexists(path):
                if not (self._read_only and is_locked(self.folder) and time.monotonic() < until):
                    raise
                time.sleep(0.02)
            raise PrunedStepError(str(error)) from None

    def write(self, state: Any, manifest: Manifest) -> None:
        """Starts writing a step, and removes steps that are not kept."""
        self._end_save()
        step, begun = manifest.step, time.monotonic()
        if manifest.score is not None:
            self.scores[step] = manifest.score
        try:
            with _ORBAX, naming_file(self.folder):
                saved = self._checkpointer.save_async(step, state, custom_metadata={_MANIFEST: manifest.to_json()})
            if saved is None:
                raise RuntimeError(f"Orbax did not save step {step} in {self.folder}, and gave no reason")
            self._saving = _Saving(step, saved, begun)
        except BaseException:
            self.scores.pop(step, None)  # A missing step must not be the best.
            raise

    def wait(self) -> None:
        """Waits until pending writes are on disk, and raises their errors."""
        self._end_save()
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        try:
            self._end_save()
        finally:
            try:
                self._checkpointer.close()
            except BaseException as error:
                if repr(error) != repr(self._told):  # Orbax raises a save's error again.
                    raise

    def _end_save(self) -> None:
        """Waits for the save in flight, and raises its error.

        Orbax 0.12.8 starts a thread and an event loop (three open files) for each save, and ends them only when the
        result is fetched: neither its `wait` nor its `close` does.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            with naming_file(self.folder):
                saving.response.result()
        except BaseException as error:
            self.scores.pop(saving.step, None)
            self._told = error
            # Orbax measures its timeout, minutes, by a clock that may be reset.
            if isinstance(error, TimeoutError) and time.monotonic() - saving.begun < _PATIENCE:
                raise TimeoutError(
                    f"step {saving.step} was not saved in {self.folder}: the system clock changed while it was written,"
                    " and Orbax took that for a timeout; earlier saves are intact"
                ) from error
            raise


class _Saving(NamedTuple):
    """A save in flight: its step, Orbax's response, and its start by a monotonic clock."""

    step: int
    response: Any
    begun: float


class _NewestAndBest:
    """Orbax's policy of which steps to keep: the newest, and the one with the best score."""

    def __init__(self, keep: int | None, scores: Callable[[], Mapping[int, float]]):
        """Takes how many of the newest to keep, None for all, and a function that returns the scores."""
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether to keep each checkpoint, oldest first."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        if self._keep is None:
            return [True] * len(steps)
        scores = self._scores()
        best = _best_of(scores, (step for step in steps if step in scores))
        staying = {*sorted(steps)[-self._keep :], best}
        return [step in staying for step in steps]


def _best_of(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
    return max(steps, key=lambda step: (scores[step], step), default=None)


def _retry_listing(list_steps: Callable[[], _Found]) -> _Found:
    """Retries a listing of steps: Orbax fails if a writer removes one meanwhile."""
    for _ in range(_LISTINGS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return list_steps()
    return list_steps()


def _unwrap_variables(node: Any, leaves: Collection[str], path: str = "") -> Any:
    """Returns Orbax's tree with each NNX variable, `{"value": array}`, as a single leaf."""
    if isinstance(node, list):
        return [_unwrap_variables(child, leaves, f"{path}/{i}" if path else str(i)) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if path in leaves and node.keys() == {"value"}:
        return node["value"]
    return {name: _unwrap_variables(child, leaves, f"{path}/{name}" if path else name) for name, child in node.items()}
