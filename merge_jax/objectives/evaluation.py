"""Batches of one size, for evaluation over exactly all examples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["apply_in_batches", "example_numbers", "padded_batches"]


def padded_batches(
    arrays: Mapping[str, Any], rows: np.ndarray, batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields batches of these rows and their numbers of valid examples; the last batch is padded with its last example.

    All batches have one size, so one compilation suffices. Entries may be `Streamed`: each row is read once.

    Raises:
      ValueError: there are no rows.
    """
    if len(rows) == 0:
        raise ValueError("cannot evaluate on no examples")
    width = min(batch_size, len(rows))
    for first in range(0, len(rows), width):
        chosen = rows[first : first + width]
        # Padding after reading avoids reading images for padding.
        padded = np.minimum(np.arange(width), len(chosen) - 1)
        yield len(chosen), {name: array[chosen][padded] for name, array in arrays.items()}


def example_numbers(arrays: Mapping[str, Any], count: int) -> np.ndarray:
    """Returns `arrays["example"]`, the question number of each example; raises ValueError for a number out of range."""
    example = np.asarray(arrays["example"])
    if example.size and not 0 <= example.min() <= example.max() < count:
        raise ValueError(
            f"arrays['example'] must lie in [0, {count}), the number of answers, found"
            f" {example.min()} to {example.max()}"
        )
    return example


def apply_in_batches(
    fn: Callable[[dict[str, np.ndarray]], Any], arrays: Mapping[str, Any], rows: np.ndarray, batch_size: int
) -> Any:
    """Returns the outputs of a function of a batch, leaves `[B, ...]`, for all these rows, `[len(rows), ...]`.

    The function receives `padded_batches`; the results are NumPy arrays.

    Raises:
      ValueError: there are no rows.
    """
    parts = []
    for kept, batch in padded_batches(arrays, rows, batch_size):
        parts.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], fn(batch)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
