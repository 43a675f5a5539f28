"""Guards against numbers that are not finite: a non-finite update is skipped and the old state kept."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["NumericFaultError", "RejectedTransfers", "SkippedUpdates", "select_update"]

_Tree = TypeVar("_Tree")

_SKIPPED = "/skipped"


class NumericFaultError(ArithmeticError):
    """Too many consecutive updates of a model were skipped to continue training."""


def select_update(ok: jax.Array, new: _Tree, old: _Tree) -> _Tree:
    """Returns the new tree where `ok`, the old one bit for bit otherwise."""
    return jax.tree.map(lambda new_leaf, old_leaf: jnp.where(ok, new_leaf, old_leaf), new, old)


class RejectedTransfers:
    """Counts a run's rejected transfers from its summed metrics; warns if the run wrote none."""

    def __init__(self) -> None:  # noqa: D107
        self._written: Any = 0.0
        self._rejected: Any = 0.0
        self._first: tuple[int, int, float, float] | None = None

    def add(self, sums: Mapping[str, Any], count: int, step: int) -> None:
        """Adds the sums of the metrics of `count` steps; `step` is the number of completed steps after them."""
        if "adapter/rejected" not in sums:
            return
        rejected = np.asarray(sums["adapter/rejected"])
        self._rejected = self._rejected + rejected
        self._written = self._written + np.asarray(sums["adapter/transferred"])
        if self._first is None and rejected.sum():
            # Only of seeds whose transfers were all rejected; otherwise the sums include norms of others.
            alone = (rejected > 0) & (np.asarray(sums["adapter/transferred"]) == 0)
            norm, before = (
                float(np.sum(np.where(alone, sums[f"adapter/{name}"], 0)) / max(1, np.sum(rejected, where=alone)))
                for name in ("norm", "norm_before")
            )
            self._first = (step - count, step - 1, norm, before)

    def warn(self) -> None:
        """Warns if transfers were rejected and none was written, for any of several seeds."""
        if self._first is None or not np.any((self._rejected > 0) & (self._written == 0)):
            return
        first, last, norm, before = self._first
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        reason = "is too large" if math.isfinite(norm) else "has numbers that are not finite"
        warnings.warn(
            f"no transfer was written: all {round(float(np.max(self._rejected)))} were rejected, the first at {when}, "
            f"where the merged target {reason}: norm {norm:.3g}, the target's own {before:.3g} (see largest_growth of "
            "make_joint_step). The target learned alone",
            stacklevel=3,
        )


class SkippedUpdates:
    """Counts each model's consecutive skipped updates from a run's summed metrics."""

    def __init__(self, limit: int):
        """Takes the number of consecutive skipped updates that ends the run."""
        self._limit = limit
        self._in_a_row: dict[str, np.ndarray] = {}

    def add(self, sums: Mapping[str, Any], count: int, step: int) -> None:
        """Adds some steps by their sum: they extend the count only if all of them were skipped.

        Args:
          sums: the summed metrics; reads those named `<role>/skipped`.
          count: the number of steps summed.
          step: the number of completed steps after them.

        Raises:
          NumericFaultError: the limit is reached.
        """
        for name, skipped in sums.items():
            if not name.endswith(_SKIPPED):
                continue
            if name == "adapter/skipped":  # A rejected transfer leaves nothing to learn; it is no fault.
                skipped = np.asarray(skipped) - np.asarray(sums.get("adapter/rejected", 0))
            before = self._in_a_row.get(name, np.zeros(np.shape(skipped)))
            self._in_a_row[name] = np.where(np.asarray(skipped) >= count, before + count, 0)
            worst = int(np.max(self._in_a_row[name]))
            if worst >= self._limit:
                raise NumericFaultError(
                    f"loss, gradient or update of the {name.removesuffix(_SKIPPED)} was not finite in the last {worst} "
                    f"steps, up to step {step}; its parameters are those before them. A smaller learning rate may help"
                )
