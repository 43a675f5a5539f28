"""Checkpoints of training states: the one module that knows Orbax."""

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

    def __init__(self, folder: Path | str, *, keep: int = 2):
        """Opens the folder, and makes it where there is none.

        Args:
          folder: where the steps are, one folder each.
          keep: how many of the newest steps stay, 1 or more.

        Raises:
          ValueError: keep is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._checkpointer = ocp.training.Checkpointer(
            str(Path(folder).absolute()),
            # Orbax gives its policies for the type of its older interface.
            save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
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
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(like, "sharding", None) or default)
            for leaf, like in zip(wanted.values(), jax.tree.leaves(state), strict=True)
        ]
        structure = jax.tree.structure(state)
        return step, self._checkpointer.load(step, jax.tree.unflatten(structure, abstract))

    def _check_fits(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Raises ValueError for every difference: Orbax's own error is long, and it casts dtypes silently."""
        saved = flatten(self._checkpointer.metadata(step).metadata)
        problems = [f"{path} is not saved" for path in wanted.keys() - saved.keys()]
        problems += [f"{path} is saved, but not wanted" for path in saved.keys() - wanted.keys()]
        for path in wanted.keys() & saved.keys():
            leaf = wanted[path]
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                continue  # A random key is saved as the integers it stands for.
            if (leaf.shape, leaf.dtype) != (saved[path].shape, saved[path].dtype):
                found, expected = (f"{x.dtype}{list(x.shape)}" for x in (saved[path], leaf))
                problems.append(f"{path} is saved as {found}, wanted as {expected}")
        if problems:
            raise ValueError(
                f"step {step} in {self._checkpointer.directory} does not fit: "
                + "; ".join(sorted(problems)[:10])
                + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
            )

    def close(self) -> None:
        """Waits until all saves have ended and closes the folder."""
        self._checkpointer.close()
