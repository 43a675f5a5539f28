"""The steps of one folder as Orbax lists, reads, writes and prunes them: the one module that knows Orbax."""

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
# Orbax saves into one folder at a time in a process; there may be several.
_ORBAX = threading.Lock()
_LISTINGS = 10  # How often steps are listed again.
_PATIENCE = 60.0  # Seconds after which nobody has waited too long.
_PRUNING = 2.0  # Seconds that a writer may take to remove the files of one step.


class OrbaxSteps:
    """The steps of a folder; a step that another process removes meanwhile raises PrunedStepError, not damage."""

    def __init__(self, folder: Path, keep: int | None, read_only: bool):
        """Lists the steps of a folder that is there; see `Checkpoints`."""
        self._read_only = read_only
        self._saving: _Saving | None = None
        self._told: BaseException | None = None
        self._checkpointer = _retry_listing(
            lambda: ocp.training.Checkpointer(
                str(folder),
                # Orbax gives its policies for the type of its older interface.
                save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
                preservation_policy=cast(Any, _NewestAndBest(keep, lambda: self.scores)),
                # A process that was killed while saving leaves such a folder; it never holds a whole step.
                cleanup_tmp_directories=not read_only,
            )
        )
        self.folder = Path(self._checkpointer.directory)
        if read_only and not self.listed() and is_locked(folder):
            self.reload()

    def listed(self) -> tuple[int, ...]:
        """Returns the steps that were there when they were last listed, in order."""
        return tuple(sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints))

    def reload(self) -> None:
        """Lists the steps that are there now: a writer may have gone on."""
        self.wait()
        for _ in range(_LISTINGS):
            _retry_listing(self._checkpointer.reload)
            # Between a step that went and one that came, a listing may find neither.
            if self.listed() or not self._read_only:
                break
            time.sleep(0.02)
        self.__dict__.pop("scores", None)

    @functools.cached_property
    def scores(self) -> dict[int, float]:
        """The scores of the steps that have one."""
        scores = {}
        for step in self.listed():
            try:
                score = self.manifest(step).score
            except PrunedStepError:
                if self._read_only:  # Its writer has gone on, and what is there now may have other scores.
                    raise
            except DamagedStepError:
                pass
            else:
                if score is not None:
                    scores[step] = score
        return scores

    def best(self) -> int | None:
        """Returns the step of the highest score, the newest of several; None where no step has a score."""
        return _best_of(self.scores, self.scores)

    def manifest(self, step: int) -> Manifest:
        """Returns what stands beside a step; raises DamagedStepError where it is not what was written."""
        with self._noticing_pruning(step):
            try:
                metadata: Any = self._checkpointer.metadata(step).custom_metadata or {}
                manifest = Manifest.from_json(metadata.get(_MANIFEST))
            except Exception as error:  # Orbax raises many kinds, bare Exception among them.
                raise DamagedStepError(first_line(error)) from None
        if manifest.step != step:
            raise DamagedStepError(f"it is step {manifest.step}")
        return manifest

    def load(self, manifest: Manifest, wanted: _Tree, *, partial: bool = False) -> tuple[_Tree, int]:
        """Returns a step as a tree of the given shapes, every leaf compared with its digest.

        Args:
          manifest: of the step.
          wanted: the tree as shapes, placed as what is returned shall be.
          partial: whether it is a part of what was saved.

        Returns:
          The tree, and how many parts of its leaves could not be compared.

        Raises:
          DamagedStepError: a leaf cannot be read, or is not what was saved.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = partial

        def load() -> _Tree:
            try:
                with context:
                    return self._checkpointer.load(manifest.step, wanted)
            except Exception as error:
                # Orbax does not tell damage from another container or empty node, such as a None more.
                try:
                    return self._load_as_saved(manifest.step, wanted)
                except Exception:
                    raise error from None

        return self._compared(manifest, load, partial=partial)

    def _load_as_saved(self, step: int, wanted: _Tree) -> _Tree:
        """Returns the leaves of a tree by their paths, whatever containers and empty nodes they were saved in."""
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
        """Returns all of a step as nested dictionaries and lists of NumPy arrays; raises as `load`."""

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
                    if key and key != str(leaf.dtype):  # So Orbax gives one whose description is gone.
                        raise DamagedStepError(f"{path} came back as {leaf.dtype}, not as {key}")
                changed, unchecked = differing_leaves(manifest, loaded)
            if changed:
                raise DamagedStepError(f"{some_of(sorted(changed), 3)} changed since it was saved")
        return loaded, unchecked

    @contextlib.contextmanager
    def _noticing_pruning(self, step: int) -> Iterator[None]:
        """Raises PrunedStepError for a damaged step that its writer has removed since it was listed."""
        try:
            yield
        except DamagedStepError as error:
            # Its files go one after the other.
            path, until = self.folder / str(step), time.monotonic() + _PRUNING
            while os.path.lexists(path):
                if not (self._read_only and is_locked(self.folder) and time.monotonic() < until):
                    raise
                time.sleep(0.02)
            raise PrunedStepError(str(error)) from None

    def write(self, state: Any, manifest: Manifest) -> None:
        """Begins to write a step, and removes those that do not stay."""
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
            self.scores.pop(step, None)  # No step that is not there may be the best.
            raise

    def wait(self) -> None:
        """Waits until what is being written is on disk, and raises what went wrong."""
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
                if repr(error) != repr(self._told):  # Orbax raises again what went wrong with a save.
                    raise

    def _end_save(self) -> None:
        """Waits for the save in flight, and raises what went wrong.

        Orbax 0.12.8 starts a thread and an event loop (three open files) for each save, and ends them only where its
        result is asked for: not with its `wait`, nor with its `close`.
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
            # Orbax counts its patience, minutes, by a clock that may be set.
            if isinstance(error, TimeoutError) and time.monotonic() - saving.begun < _PATIENCE:
                raise TimeoutError(
                    f"step {saving.step} was not saved in {self.folder}: the system clock changed while it was written,"
                    " and Orbax took that for a timeout; earlier saves are intact"
                ) from error
            raise


class _Saving(NamedTuple):
    """A save in flight: its step, Orbax's response, and when it began by a clock that is never set."""

    step: int
    response: Any
    begun: float


class _NewestAndBest:
    """Orbax's policy of what stays: the newest steps and the one of the best score."""

    def __init__(self, keep: int | None, scores: Callable[[], Mapping[int, float]]):
        """Takes how many of the newest stay, None for all, and what returns the scores of steps."""
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, oldest first, whether it stays."""
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
    """Returns what a listing of steps gives; Orbax fails where a writer removes one of them meanwhile."""
    for _ in range(_LISTINGS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return list_steps()
    return list_steps()


def _unwrap_variables(node: Any, leaves: Collection[str], path: str = "") -> Any:
    """Returns what Orbax has loaded with each variable of NNX, `{"value": array}`, as the one leaf that it was."""
    if isinstance(node, list):
        return [_unwrap_variables(child, leaves, f"{path}/{i}" if path else str(i)) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if path in leaves and node.keys() == {"value"}:
        return node["value"]
    return {name: _unwrap_variables(child, leaves, f"{path}/{name}" if path else name) for name, child in node.items()}
