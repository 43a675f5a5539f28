"""A frozen source's outputs for the target's examples, computed once before the first step."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from merge_jax.data import num_examples
from merge_jax.objectives.evaluation import apply_in_batches
from merge_jax.study.models.model import POOL
from merge_jax.training.joint import TrainState
from merge_jax.types import Batch, ModelState, Params, TeacherFn

__all__ = ["Shown"]

_MOST_BYTES = 2**30  # Maximum bytes of stored outputs; larger ones are recomputed at every step.
_AT_ONCE = 200


class Shown:
    """The outputs of a fixed source for fixed examples, each processed independently.

    Attributes:
      role: the owner of the examples, `target` or `pool`.
    """

    def __init__(self, role: str, teacher: TeacherFn):
        """Takes the owner of the examples, and the teacher that adds the outputs to a batch."""
        self.role = role
        self._show = jax.jit(partial(_added, teacher))
        self._latest: tuple[int, dict[str, Any]] | None = None

    def shapes(self, source: TrainState, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the shapes of the outputs by entry; source and examples may be shapes too."""
        batch = {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in self._named(arrays).items()}
        return jax.eval_shape(self._show, source.params, source.model_state, batch)

    def fits(self, source: TrainState, arrays: Mapping[str, Any]) -> bool:
        """Returns whether they may be stored: up to a gigabyte. Our choice."""
        shapes = jax.tree.leaves(self.shapes(source, arrays))
        return sum(shape.size * shape.dtype.itemsize for shape in shapes) <= _MOST_BYTES

    def outputs(self, seed: int, source: TrainState, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the outputs for all examples by entry, `[N, ...]`; keeps those of the latest seed.

        For a given seed, source and examples are the same for all methods.
        """
        if self._latest is None or self._latest[0] != seed:
            self._latest = None  # Not both at once in memory.
            show = partial(self._show, *jax.device_get((source.params, source.model_state)))  # Wherever it was placed.
            named = self._named(arrays)
            self._latest = seed, apply_in_batches(show, named, np.arange(num_examples(named)), _AT_ONCE)
        return self._latest[1]

    def _named(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {POOL + name if self.role == "pool" else name: entry for name, entry in arrays.items()}


def _added(teacher: TeacherFn, params: Params, model_state: ModelState, batch: Batch) -> Batch:
    """Returns the entries that a teacher adds to a batch."""
    shown = teacher(params, model_state, batch)
    return {name: entry for name, entry in shown.items() if name not in batch}
