"""Checkpoints of training states: the one module that knows Orbax."""

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from merge_jax.paths import flatten

__all__ = ["Checkpoints"]

_State = TypeVar("_State")


class Checkpoints:
    """The saved steps of one run, in a folder; a context manager, since a save in flight is lost without a close.

    Saving is asynchronous: `save` returns once the state is copied, and the next save, or the close, waits for
    the writing to end and raises what went wrong.

    >>> with Checkpoints(folder) as checkpoints:  # doctest: +SKIP
    ...     step, state = checkpoints.restore_latest(state) or (0, state)
    ...     checkpoints.save(step + 1, state)
    """

    def __init__(self, folder: Path | str, *, keep: int | None = 2):
        """Opens the folder, and makes it where there is none.

        Args:
          folder: where the steps are, one folder each.
          keep: how many of the newest steps stay, 1 or more; None for all, which makes a trajectory of them.

        Raises:
          ValueError: keep is below 1.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            str(Path(folder).absolute()),
            # Orbax gives its policies for the type of its older interface.
            save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
            preservation_policy=cast(Any, policies.PreserveAll() if keep is None else policies.LatestN(keep)),
            # A process that was killed while saving leaves such a folder; it never holds a whole step.
            cleanup_tmp_directories=True,
        )

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
        """The steps that are saved whole, in order."""
        return tuple(sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints))

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays (typed random keys too) under a step that is not there yet.

        Raises:
          FileExistsError: the step is there, or a newer one; nothing is overwritten.
        """
        latest = self.latest_step
        if latest is not None and latest >= step:
            raise FileExistsError(f"cannot save step {step}: step {latest} is already there")
        self._checkpointer.save_async(step, state)

    def restore_latest(self, state: _State) -> tuple[int, _State] | None:
        """Returns the newest step and its state, or None where nothing is saved.

        Args:
          state: a state of the same structure, shapes and dtypes (arrays or `jax.ShapeDtypeStruct`); only
            these are read of it, and where its leaves are placed: the saved ones may have been on other devices.

        Raises:
          ValueError: the saved tree has other leaves, shapes or dtypes than `state`; each is named.
        """
        step = self.latest_step
        if step is None:
            return None
        wanted = flatten(jax.eval_shape(lambda: state))
        self._check_fits(step, wanted)
        return step, self._checkpointer.load(step, _abstract(state))

    def restore_parts(self, step: int, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parts of what was saved at a step, e.g. the parameters of one model.

        Args:
          step: the step, one of `steps`.
          parts: trees by the paths of the parts, e.g. `{"target/params": params}` of a `JointState`; read as in
            `restore_latest`.

        Raises:
          ValueError: the step is not saved, or a part has other leaves, shapes or dtypes; each is named.
        """
        if step not in self.steps:
            raise ValueError(f"step {step} is not saved in {self.folder}; saved: {list(self.steps)}")
        tree: dict[str, Any] = {}
        for path, part in parts.items():
            *parents, name = path.split("/")
            functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[name] = _abstract(part)
        self._check_fits(step, flatten(tree), tuple(parts))
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = self._checkpointer.load(step, tree)
        return {path: functools.reduce(operator.getitem, path.split("/"), loaded) for path in parts}

    def _check_fits(
        self, step: int, wanted: dict[str, jax.ShapeDtypeStruct], parts: Sequence[str] | None = None
    ) -> None:
        """Raises ValueError for every difference: Orbax's own error is long, and it casts dtypes silently."""
        saved = flatten(self._checkpointer.metadata(step).metadata)
        problems = [f"{path} is not saved" for path in wanted.keys() - saved.keys()]
        problems += [
            f"{path} is saved, but not wanted"
            for path in saved.keys() - wanted.keys()
            if parts is None or any(path.startswith(f"{part}/") for part in parts)
        ]
        for path in wanted.keys() & saved.keys():
            leaf = wanted[path]
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                continue  # A random key is saved as the integers it stands for.
            if (leaf.shape, leaf.dtype) != (saved[path].shape, saved[path].dtype):
                found, expected = (f"{x.dtype}{list(x.shape)}" for x in (saved[path], leaf))
                problems.append(f"{path} is saved as {found}, wanted as {expected}")
        if problems:
            raise ValueError(
                f"step {step} in {self.folder} does not fit: "
                + "; ".join(sorted(problems)[:10])
                + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
            )

    def close(self) -> None:
        """Waits until all saves have ended and closes the folder."""
        self._checkpointer.close()


def _abstract(tree: _State) -> _State:
    """Returns the tree with shapes, dtypes and placements for leaves."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda: tree)
    return jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(like, "sharding", None) or default
        ),
        shapes,
        tree,
    )
