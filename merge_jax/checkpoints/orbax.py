"""Checkpoints of training states: the one module that knows Orbax."""

import contextlib
import functools
import math
import operator
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from merge_jax.checkpoints.formats import is_orbax
from merge_jax.checkpoints.lock import FolderLock, is_locked
from merge_jax.checkpoints.manifest import (
    NO_MANIFEST,
    Facts,
    Leaf,
    Manifest,
    changes,
    differing_leaves,
    environment_of,
    specs_of,
)
from merge_jax.paths import flatten, some_of

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpointWarning", "NotBitExactWarning"]

_State = TypeVar("_State")
_Listed = TypeVar("_Listed")

_MANIFEST = "manifest"
_DAMAGED = "damaged"
# Orbax saves into one folder at a time in a process; there may be several.
_ORBAX = threading.Lock()
_LISTINGS = 10  # How often steps are listed again.
_PRUNING = 2.0  # Seconds that a writer may take to remove the files of one step.


class CheckpointError(ValueError):
    """What is saved is not what is asked for: damaged, of another run, or of another model."""


class DamagedCheckpointWarning(UserWarning):
    """A saved step is damaged, and an older one was taken."""


class NotBitExactWarning(UserWarning):
    """A run goes on under other circumstances: right, but not to the last bit what it would have been."""


class _DamagedError(Exception):
    """A saved step cannot be read, or is not what was saved."""


class _PrunedError(_DamagedError):
    """A saved step has been removed by its writer since it was listed."""


class Checkpoints:
    """The saved steps of one run, in a folder; a context manager, since a save in flight is lost without a close.

    Saving is asynchronous: `save` returns once the state is copied to the host, and the next save, or the close, waits
    for the writing to end and raises what went wrong. (Several processes take their digests together, before it
    returns: what they exchange must not meet what their training exchanges.) With each step goes a manifest that holds
    a digest of every leaf; what is restored is compared with it, so numbers that have changed on disk are never taken
    for those that were saved. A folder has one writer at a time.

    >>> with Checkpoints(folder) as checkpoints:  # doctest: +SKIP
    ...     step, state = checkpoints.restore_latest(state) or (0, state)
    ...     checkpoints.save(step + 1, state)
    """

    def __init__(
        self, folder: Path | str, *, keep: int | None = 2, facts: Facts | None = None, read_only: bool = False
    ):
        """Opens the folder, and makes it where there is none.

        Args:
          folder: where the steps are, one folder each.
          keep: how many of the newest steps stay, 1 or more, beside the one of the best score; None for all, which
            makes a trajectory of them.
          facts: what the saved steps depend on beside the state, by name, such as a fingerprint of the data: steps
            that were saved under others are not restored. None restores under any.
          read_only: save nothing, and leave everything as it is; the folder of a run that goes on can be read so.

        Raises:
          ValueError: keep is below 1, a fact is no plain value, another process is writing into the folder, there is
            none to read, or it is a single checkpoint of Orbax.
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
        self._told: list[str] = []
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        try:
            self._checkpointer = _listed(
                lambda: ocp.training.Checkpointer(
                    str(path),
                    # Orbax gives its policies for the type of its older interface.
                    save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
                    preservation_policy=cast(Any, _NewestAndBest(keep, lambda: self._scores)),
                    # A process that was killed while saving leaves such a folder; it never holds a whole step.
                    cleanup_tmp_directories=not read_only,
                )
            )
            if read_only and not self._written_steps() and is_locked(path):
                self._list_anew()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes, whatever happened."""
        self.close()

    @property
    def folder(self) -> Path:
        """Where the steps are."""
        return Path(self._checkpointer.directory)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are there, in order; whether they are whole is seen when they are restored."""
        self._join()
        return self._written_steps()

    def _written_steps(self) -> tuple[int, ...]:
        return tuple(sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints))

    @property
    def latest_step(self) -> int | None:
        """The newest step that is there, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the highest score, the newest of several; None where no step has a score."""
        self._join()
        while True:
            with contextlib.suppress(_PrunedError):
                return max(self._scores, key=lambda step: (self._scores[step], step), default=None)
            self._list_anew()

    def save(self, step: int, state: Any, *, score: float | None = None) -> None:
        """Saves a pytree of arrays (JAX's, typed random keys too, or NumPy's) under a step that is not there yet.

        Args:
          step: its number.
          state: the pytree.
          score: what the best step is chosen by, higher being better, such as a validation accuracy; a number that
            is not finite is no score, so it is never the best and never drives out the best.

        Raises:
          FileExistsError: the step is there, or a newer one; nothing is overwritten.
          ValueError: the folder is open to be read, or a leaf would not come back as it is: a Python number, an array
            of NumPy of a dtype that JAX turns into another, an object, or what is in an `nnx.List`.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} is open to be read: leave out read_only to save")
        _check_comes_back(state)
        self._set_aside()
        latest = self.latest_step
        if latest is not None and latest >= step:
            raise FileExistsError(f"cannot save step {step}: step {latest} is already there")
        score = None if score is None or not math.isfinite(score) else float(score)
        environment = environment_of(state)
        if jax.process_count() > 1:
            self._write(step, state, environment, score)
        else:
            # Steps that follow may be given the state's buffers to write into.
            copied = _copied_to_host(state)
            self._writing = self._writer.submit(self._write, step, copied, environment, score)

    def _write(self, step: int, state: Any, environment: Mapping[str, Any], score: float | None) -> None:
        manifest = Manifest.of(step, state, self._facts or {}, environment, score)
        if score is not None:
            self._scores[step] = score
        try:
            with _ORBAX:
                saved = self._checkpointer.save_async(step, state, custom_metadata={_MANIFEST: manifest.to_json()})
            if saved is None:
                raise RuntimeError(f"Orbax did not save step {step} in {self.folder}, and does not say why")
        except BaseException:
            self._scores.pop(step, None)  # No step that is not there may be the best.
            raise

    def restore_latest(self, state: _State) -> tuple[int, _State] | None:
        """Returns the newest step that is whole and its state, or None where nothing is saved.

        Steps are tried from the newest on. One that is damaged is named in a `DamagedCheckpointWarning` and left where
        it is; the next save moves it into the folder `damaged`, so that its number is free.

        Args:
          state: a state of the same structure, shapes and dtypes (arrays or `jax.ShapeDtypeStruct`); only
            these are read of it, and where its leaves are placed: the saved ones may have been on other devices, of
            which a `NotBitExactWarning` tells, as of other versions or threads.

        Raises:
          CheckpointError: the saved tree has other leaves, shapes or dtypes than `state`, or was saved under other
            facts, each of which is named; or all steps are damaged, each in its own way.
        """
        damaged = dict.fromkeys(self._in_the_way(), "what is in its place is no folder")
        steps = list(self.steps)
        while steps:
            step = steps.pop()
            try:
                restored = self._restored(step, state)
            except _PrunedError:  # So there are newer ones.
                self._list_anew()
                steps = list(self.steps)
                continue
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            self._damaged = damaged
            if damaged:
                warnings.warn(
                    f"{_list_damage(self.folder, damaged)}; going back to step {step}",
                    DamagedCheckpointWarning,
                    stacklevel=2,
                )
            return step, restored
        if damaged:
            raise CheckpointError(_refusal(self.folder, damaged, "; there is no other to go back to"))
        return None

    def restore_best(self, state: _State) -> tuple[int, _State]:
        """Returns the step of the best score and its state; `state` as in `restore_latest`.

        Raises:
          CheckpointError: no step has a score, or the best one is damaged, does not fit or was saved under other facts.
        """
        while (step := self.best_step) is not None:
            try:
                with self._refusing_damage(step):
                    return step, self._restored(step, state)
            except _PrunedError:  # So there is a better one.
                self._list_anew()
        raise CheckpointError(f"no step in {self.folder} has a score; saved: {list(self.steps)}")

    def restore_parts(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parts of what was saved at a step, e.g. the parameters of one model.

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
            *parents, name = path.split("/")
            functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = part
        with self._saved(step):
            loaded = self._restored(step, tree, tuple(parts))
        return {path: functools.reduce(operator.getitem, path.split("/"), loaded) for path in parts}

    def restore_arrays(self, step: int) -> dict[str, Any]:
        """Returns all that was saved at a step without a state to go by: nested dictionaries and lists of NumPy arrays.

        Raises:
          CheckpointError: the step is not saved, it is damaged, or it was saved under other facts.
        """
        with self._saved(step):
            manifest = self._manifest(step)
            self._check_facts(manifest)
            with self._reading(step):
                try:
                    with _ORBAX, warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="Sharding info not provided")  # On purpose.
                        loaded = _unwrapped(self._checkpointer.load(step), manifest.leaves)
                    missing = sorted(manifest.leaves.keys() ^ flatten(loaded).keys())
                    wrong = missing or differing_leaves(manifest, loaded)[0]
                except Exception as error:
                    raise _DamagedError(_reason(error)) from None
                _refuse_changed(wrong)
        return loaded

    def manifest(self, step: int) -> Manifest:
        """Returns what stands beside the state of a step: leaves with shapes and digests, facts, circumstances, score.

        Raises:
          CheckpointError: the step is not saved, or its manifest is damaged.
        """
        with self._saved(step):
            return self._manifest(step)

    @contextlib.contextmanager
    def _saved(self, step: int) -> Iterator[None]:
        """Refuses a step that is not saved, or has been removed while it was read, and one that is damaged."""
        try:
            if step not in self.steps:
                raise _PrunedError
            with self._refusing_damage(step):
                yield
        except _PrunedError:
            self._list_anew()
            raise CheckpointError(f"step {step} is not saved in {self.folder}; saved: {list(self.steps)}") from None

    @contextlib.contextmanager
    def _refusing_damage(self, step: int) -> Iterator[None]:
        """Turns the damage of one step into a refusal, where no other step can be taken."""
        try:
            yield
        except _PrunedError:
            raise
        except _DamagedError as error:
            raise CheckpointError(_refusal(self.folder, {step: str(error)})) from None

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Tells a step that its writer has removed since it was listed from one that is damaged."""
        try:
            yield
        except _DamagedError as error:
            # Its files go one after the other.
            path, until = self.folder / str(step), time.monotonic() + _PRUNING
            while os.path.lexists(path):
                if not (self._read_only and is_locked(self.folder) and time.monotonic() < until):
                    raise
                time.sleep(0.02)
            raise _PrunedError(str(error)) from None

    def _list_anew(self) -> None:
        """Looks which steps are there now: a writer may have gone on."""
        self.wait()
        for _ in range(_LISTINGS):
            _listed(self._checkpointer.reload)
            # Between a step that went and one that came, a listing may find neither.
            if self._written_steps() or not self._read_only:
                break
            time.sleep(0.02)
        self.__dict__.pop("_scores", None)

    def _in_the_way(self) -> list[int]:
        """Returns the steps in whose place is something else than a folder: Orbax passes it over, or fails to save."""
        paths = [path for path in self.folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
        return sorted((int(path.name) for path in paths if not path.is_dir()), reverse=True)

    def _manifest(self, step: int) -> Manifest:
        with self._reading(step):
            try:
                metadata: Any = self._checkpointer.metadata(step).custom_metadata or {}
                manifest = Manifest.from_json(metadata.get(_MANIFEST))
            except Exception as error:  # Orbax raises many kinds, bare Exception among them.
                raise _DamagedError(_reason(error)) from None
        if manifest.step != step:
            raise _DamagedError(f"it is step {manifest.step}")
        return manifest

    @functools.cached_property
    def _scores(self) -> dict[int, float]:
        """The scores of the steps that have one."""
        scores = {}
        for step in self._written_steps():  # The thread that writes asks for them too, and must not wait for itself.
            try:
                score = self._manifest(step).score
            except _PrunedError:
                if self._read_only:  # Its writer has gone on, and what is there now may have other scores.
                    raise
            except _DamagedError:
                pass
            else:
                if score is not None:
                    scores[step] = score
        return scores

    def _restored(self, step: int, tree: _State, parts: Sequence[str] | None = None) -> _State:
        """Returns the saved tree, or parts of it, of this run; tells of other circumstances."""
        manifest = self._manifest(step)
        self._check_facts(manifest)
        self._check_fits(manifest, specs_of(tree), parts)
        with self._reading(step):
            loaded, unchecked = self._load(manifest, tree, parts)
        if unchecked:
            warnings.warn(
                f"step {step} in {self.folder} lies on other hosts than it did: "
                f"{unchecked} parts could not be compared with their digests",
                NotBitExactWarning,
                stacklevel=3,
            )
        self._tell_environment(manifest, tree)
        return loaded

    def _load(self, manifest: Manifest, tree: _State, parts: Sequence[str] | None) -> tuple[_State, int]:
        """Returns the saved tree, every leaf compared with its digest, and how many parts could not be."""
        context = ocp.Context()
        context.pytree.loading.partial_load = parts is not None
        try:
            with _ORBAX, context:
                loaded: _State = self._checkpointer.load(manifest.step, _abstract(tree))
        except Exception as error:
            raise _DamagedError(_reason(error)) from None
        strange = [path for path, leaf in flatten(loaded).items() if not isinstance(leaf, jax.Array)]
        if strange:
            raise _DamagedError(f"{some_of(strange, 3)} came back as no array")
        wrong, unchecked = differing_leaves(manifest, loaded)
        _refuse_changed(wrong)
        return loaded, unchecked

    def _check_facts(self, manifest: Manifest) -> None:
        changed = [] if self._facts is None else changes(manifest.facts, self._facts)
        if changed:
            raise CheckpointError(
                f"step {manifest.step} in {self.folder} was saved by another run: {'; '.join(changed)}. "
                "Go on with what it was, or take another folder"
            )

    def _check_fits(self, manifest: Manifest, wanted: Mapping[str, Leaf], parts: Sequence[str] | None) -> None:
        """Raises CheckpointError for every difference: Orbax's own error is long, and it casts dtypes silently."""
        saved = manifest.leaves
        problems = [f"{path} is not saved" for path in wanted.keys() - saved.keys()]
        problems += [
            f"{path} is saved, but not wanted"
            for path in saved.keys() - wanted.keys()
            if parts is None or any(path.startswith(f"{part}/") for part in parts)
        ]
        problems += [
            f"{path} is saved as {saved[path]}, wanted as {wanted[path]}"
            for path in wanted.keys() & saved.keys()
            if str(wanted[path]) != str(saved[path])
        ]
        if problems:
            raise CheckpointError(
                f"step {manifest.step} in {self.folder} does not fit: {some_of(sorted(problems), 10, '; ')}"
            )

    def _tell_environment(self, manifest: Manifest, state: Any) -> None:
        changed = changes(manifest.environment, environment_of(_abstract(state)))
        if changed and changed != self._told:  # Many steps may be read of one run.
            self._told = changed
            warnings.warn(
                f"step {manifest.step} in {self.folder} was saved under other circumstances, so what follows is not "
                f"bit-exact: {'; '.join(changed)}",
                NotBitExactWarning,
                stacklevel=4,
            )

    def _set_aside(self) -> None:
        """Moves what was found damaged out of the way, where it can be looked at."""
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
        for step in self._damaged:
            self._scores.pop(step, None)
        self._damaged = {}
        self._checkpointer.reload()

    def wait(self) -> None:
        """Waits until the save in flight, if any, has ended, and raises what went wrong."""
        self._join()
        self._checkpointer.wait()

    def _join(self) -> None:
        """Waits until Orbax has been given what there is to save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits until all saves have ended and closes the folder."""
        try:
            try:
                self._join()
            finally:
                self._writer.shutdown()
                self._checkpointer.close()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _listed(listing: Callable[[], _Listed]) -> _Listed:
    """Returns what a listing of steps gives; Orbax fails where a writer removes one of them meanwhile."""
    for _ in range(_LISTINGS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return listing()
    return listing()


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
        staying, scores = set(sorted(steps)[-self._keep :]), self._scores()
        scored = [step for step in steps if step in scores]
        if scored:
            staying.add(max(scored, key=lambda step: (scores[step], step)))
        return [step in staying for step in steps]


def _check_comes_back(state: Any) -> None:
    """Raises ValueError for what Orbax would save and not restore as it was; the first three leaves are named."""
    nnx = sys.modules.get("flax.nnx")  # Where nobody has imported it, no tree has a list of it.
    if nnx is not None:
        nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, nnx.List))
        for path, node in nodes:
            if isinstance(node, nnx.List):
                raise ValueError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} is an nnx.List, which Orbax saves and"
                    " cannot read again: save nnx.state(module) in the place of the module; nnx.update(module, state)"
                    " puts what comes back into it"
                )
    problems = []
    for path, leaf in flatten(state).items():
        if isinstance(leaf, jax.Array):
            continue
        if not isinstance(leaf, np.ndarray | np.generic):
            problems.append(f"{path} is {leaf!r:.40}, of the type {type(leaf).__name__}")
        elif (taken := _dtype_in_jax(leaf)) != leaf.dtype:
            problems.append(f"{path} is {leaf.dtype}{list(leaf.shape)} of NumPy, in JAX {taken or 'nothing'}")
    if problems:
        raise ValueError(
            f"a checkpoint holds arrays that JAX can hold: {some_of(problems, 3, '; ')}. Give jnp.asarray(...) of a"
            " number, and keep what is no number out of the state"
        )


def _dtype_in_jax(array: np.ndarray | np.generic) -> np.dtype | None:
    """Returns the dtype that an array of NumPy has in JAX; None for one that it does not take."""
    try:
        return jax.eval_shape(lambda array: array, array).dtype
    except TypeError:
        return None


def _copied_to_host(tree: Any) -> Any:
    """Returns the tree with copies of its arrays, in NumPy but for random keys, all fetched at once."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.clone(leaf)
        return np.array(leaf)

    return jax.tree.map(copied, tree)


def _unwrapped(node: Any, leaves: Collection[str], path: str = "") -> Any:
    """Returns what Orbax has loaded with each variable of NNX, `{"value": array}`, as the one leaf that it was."""
    if isinstance(node, dict):
        if path in leaves and node.keys() == {"value"}:
            return node["value"]
        return {name: _unwrapped(child, leaves, f"{path}/{name}" if path else name) for name, child in node.items()}
    if isinstance(node, list):
        return [_unwrapped(child, leaves, f"{path}/{i}" if path else str(i)) for i, child in enumerate(node)]
    return node


def _abstract(tree: _State) -> _State:
    """Returns the tree with shapes, dtypes and placements for leaves."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(like, "sharding", None) or default
        ),
        shapes,
        tree,
    )


def _refuse_changed(paths: Sequence[str]) -> None:
    if paths:
        raise _DamagedError(f"{some_of(paths, 3)} changed since it was saved")


def _reason(error: Exception) -> str:
    """Returns the first line of what went wrong, which Orbax writes many of."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}" if type(error) is not ValueError else first[:200]


def _refusal(folder: Path, damaged: Mapping[int, str], ending: str = "") -> str:
    """Returns why no step can be taken."""
    if all(reason == NO_MANIFEST for reason in damaged.values()):
        listed = ", ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        return (
            f"{folder} has no step that Checkpoints saved: {listed}. Orbax by itself writes none: read such a step with"
            " orbax.checkpoint, and save it by Checkpoints into another folder"
        )
    return _list_damage(folder, damaged) + ending


def _list_damage(folder: Path, damaged: Mapping[int, str]) -> str:
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"damaged checkpoint{'s' * (len(damaged) > 1)} in {folder}: {listed}"
