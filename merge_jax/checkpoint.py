"""Checkpoints of training states: the one module that knows Orbax."""

import contextlib
import functools
import math
import operator
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from merge_jax.lock import FolderLock
from merge_jax.manifest import Facts, Leaf, Manifest, changes, differing_leaves, environment_of, specs_of
from merge_jax.paths import flatten, some_of

__all__ = ["CheckpointError", "Checkpoints", "DamagedCheckpointWarning", "NotBitExactWarning"]

_State = TypeVar("_State")

_MANIFEST = "manifest"
_DAMAGED = "damaged"
# Orbax saves into one folder at a time in a process; there may be several.
_ORBAX = threading.Lock()


class CheckpointError(ValueError):
    """What is saved is not what is asked for: damaged, of another run, or of another model."""


class DamagedCheckpointWarning(UserWarning):
    """A saved step is damaged, and an older one was taken."""


class NotBitExactWarning(UserWarning):
    """A run goes on under other circumstances: right, but not to the last bit what it would have been."""


class _DamagedError(Exception):
    """A saved step cannot be read, or is not what was saved."""


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
          ValueError: keep is below 1, a fact is no plain value, another process is writing into the folder, or there is
            none to read.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        for name, value in (facts or {}).items():
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(f"the fact {name!r} must be text, a number or True or False, got {value!r}")
        path = Path(folder).absolute()
        if read_only and not path.is_dir():
            raise ValueError(f"there is no folder of checkpoints {path}")
        self._read_only = read_only
        self._lock: FolderLock | None = None
        if not read_only and jax.process_index() == 0:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        self._facts = facts
        self._damaged: dict[int, str] = {}
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(path),
                # Orbax gives its policies for the type of its older interface.
                save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
                preservation_policy=cast(Any, _NewestAndBest(keep, lambda: self._scores)),
                # A process that was killed while saving leaves such a folder; it never holds a whole step.
                cleanup_tmp_directories=not read_only,
            )
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
        return max(self._scores, key=lambda step: (self._scores[step], step), default=None)

    def save(self, step: int, state: Any, *, score: float | None = None) -> None:
        """Saves a pytree of arrays (typed random keys too) under a step that is not there yet.

        Args:
          step: its number.
          state: the pytree.
          score: what the best step is chosen by, higher being better, such as a validation accuracy; a number that
            is not finite is no score, so it is never the best and never drives out the best.

        Raises:
          FileExistsError: the step is there, or a newer one; nothing is overwritten.
          ValueError: the folder is open to be read.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} is open to be read: leave out read_only to save")
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
        for step in reversed(self.steps):
            try:
                manifest = self._manifest(step)
                self._check_facts(manifest)
                restored = self._restore(manifest, state)
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
            self._tell_environment(manifest, state)
            return step, restored
        if damaged:
            raise CheckpointError(f"{_list_damage(self.folder, damaged)}; there is no other to go back to")
        return None

    def restore_best(self, state: _State) -> tuple[int, _State]:
        """Returns the step of the best score and its state; `state` as in `restore_latest`.

        Raises:
          CheckpointError: no step has a score, the best one is damaged, or it does not fit.
        """
        step = self.best_step
        if step is None:
            raise CheckpointError(f"no step in {self.folder} has a score; saved: {list(self.steps)}")
        with self._refusing_damage(step):
            return step, self._restore(self._manifest(step), state)

    def restore_parts(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parts of what was saved at a step, e.g. the parameters of one model.

        Args:
          step: the step, one of `steps`.
          parts: trees by the paths of the parts, e.g. `{"target/params": params}` of a `JointState`; read as in
            `restore_latest`.

        Raises:
          CheckpointError: the step is not saved, it is damaged, or a part has other leaves, shapes or dtypes; each is
            named.
        """
        manifest = self.manifest(step)
        tree: dict[str, Any] = {}
        for path, part in parts.items():
            *parents, name = path.split("/")
            functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = part
        with self._refusing_damage(step):
            loaded = self._restore(manifest, tree, tuple(parts))
        return {path: functools.reduce(operator.getitem, path.split("/"), loaded) for path in parts}

    def restore_arrays(self, step: int) -> dict[str, Any]:
        """Returns all that was saved at a step without a state to go by: nested dictionaries and lists of NumPy arrays.

        Raises:
          CheckpointError: the step is not saved, or it is damaged.
        """
        manifest = self.manifest(step)
        with self._refusing_damage(step):
            try:
                with _ORBAX, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Sharding info not provided")  # On purpose.
                    loaded = self._checkpointer.load(step)
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
        if step not in self.steps:
            raise CheckpointError(f"step {step} is not saved in {self.folder}; saved: {list(self.steps)}")
        with self._refusing_damage(step):
            return self._manifest(step)

    @contextlib.contextmanager
    def _refusing_damage(self, step: int) -> Iterator[None]:
        """Turns the damage of one step into a refusal, where no other step can be taken."""
        try:
            yield
        except _DamagedError as error:
            raise CheckpointError(_list_damage(self.folder, {step: str(error)})) from None

    def _in_the_way(self) -> list[int]:
        """Returns the steps in whose place is something else than a folder: Orbax passes it over, or fails to save."""
        paths = [path for path in self.folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
        return sorted((int(path.name) for path in paths if not path.is_dir()), reverse=True)

    def _manifest(self, step: int) -> Manifest:
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
            with contextlib.suppress(_DamagedError):
                score = self._manifest(step).score
                if score is not None:
                    scores[step] = score
        return scores

    def _restore(self, manifest: Manifest, tree: _State, parts: Sequence[str] | None = None) -> _State:
        """Returns the saved tree, or parts of it, every leaf compared with its digest."""
        self._check_fits(manifest, specs_of(tree), parts)
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
        if unchecked:
            warnings.warn(
                f"step {manifest.step} in {self.folder} lies on other hosts than it did: "
                f"{unchecked} parts could not be compared with their digests",
                NotBitExactWarning,
                stacklevel=3,
            )
        return loaded

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
        if changed:
            warnings.warn(
                f"step {manifest.step} in {self.folder} was saved under other circumstances, so what follows is not "
                f"bit-exact: {'; '.join(changed)}",
                NotBitExactWarning,
                stacklevel=3,
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


def _copied_to_host(tree: Any) -> Any:
    """Returns the tree with copies of its arrays, in NumPy but for random keys, all fetched at once."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.clone(leaf)
        return np.array(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    return jax.tree.map(copied, tree)


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


def _list_damage(folder: Path, damaged: Mapping[int, str]) -> str:
    listed = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"damaged checkpoint{'s' * (len(damaged) > 1)} in {folder}: {listed}"
