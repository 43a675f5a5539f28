"""Reads the examples of the next steps while the previous steps run."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from merge_jax.checks import check_at_least_one
from merge_jax.data.arrays import Arrays
from merge_jax.data.streams import Streamed

__all__ = ["ReadAhead", "is_streamed"]

Chunk = tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]


def is_streamed(arrays: Arrays) -> bool:
    """Returns whether an entry is read on access, and so should not be read whole."""
    return any(isinstance(entry, Streamed) for entry in arrays.values())


class ReadAhead:
    """Reads the examples of `steps` steps at a time; a context manager, which ends its thread.

    `read(first, count)` returns what `make_epoch` takes for the steps from `first` on: the examples of `steps` batches,
    `{role: {entry: [steps * B, ...]}}`, and their indices among these, `{role: [steps, B]}`. Meanwhile a thread reads
    the chunk from `first + count` on, which a loop requests next; any other may be requested too. An error in that
    thread is raised when its chunk is requested.
    """

    def __init__(
        self, arrays: Mapping[str, Arrays], indices_at: Mapping[str, Callable[[int, int], np.ndarray]], steps: int
    ) -> None:
        """Takes all examples of each role, their index functions (see `indices_of`), and the steps per chunk.

        Raises:
          ValueError: steps below 1.
        """
        check_at_least_one(steps=steps)
        self._arrays, self._indices_at, self._steps = arrays, indices_at, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
        self._ahead: tuple[int, Future[Chunk]] | None = None

    def __enter__(self) -> "ReadAhead":
        """Returns itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the thread; its current chunk is lost."""
        self._thread.shutdown(cancel_futures=True)

    def read(self, first: int, count: int) -> Chunk:
        """Returns the chunk from step `first` on; the caller uses `count` steps of it."""
        ahead = self._ahead
        chunk = ahead[1].result() if ahead is not None and ahead[0] == first else self._read(first)
        self._ahead = (first + count, self._thread.submit(self._read, first + count))
        return chunk

    def _read(self, first: int) -> Chunk:
        arrays, indices = {}, {}
        for role, indices_at in self._indices_at.items():
            rows = indices_at(first, self._steps)
            arrays[role] = {name: np.asarray(entry[rows.ravel()]) for name, entry in self._arrays[role].items()}
            indices[role] = np.arange(rows.size, dtype=np.int32).reshape(rows.shape)
        return arrays, indices
