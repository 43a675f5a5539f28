"""Batches of one size, for what is measured over exactly all examples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from merge_jax.checks import check_entries

__all__ = ["count_examples", "of_all_rows", "padded_batches"]


def count_examples(arrays: Mapping[str, Any], *names: str, hint: str = "") -> int:
    """Returns how many examples those entries have.

    Raises:
      ValueError: an entry is missing, or they have unequal lengths; the hint ends the message about a missing one.
    """
    check_entries(arrays, *names, hint=hint)
    lengths = {name: len(arrays[name]) for name in names}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"all entries must have the same number of examples, got {lengths}")
    return lengths[names[0]]


def padded_batches(
    arrays: Mapping[str, Any], rows: np.ndarray, batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields batches of those rows and how many of their examples count; the last one repeats its last example.

    All have one size, so that one compilation serves them. Entries may be `Streamed`: each row is read once.

    Raises:
      ValueError: there are no rows.
    """
    if len(rows) == 0:
        raise ValueError("cannot evaluate on no examples")
    width = min(batch_size, len(rows))
    for first in range(0, len(rows), width):
        chosen = rows[first : first + width]
        # Padded once read, so that no image is read for padding.
        padded = np.minimum(np.arange(width), len(chosen) - 1)
        yield len(chosen), {name: array[chosen][padded] for name, array in arrays.items()}


def of_all_rows(
    fn: Callable[[dict[str, np.ndarray]], Any], arrays: Mapping[str, Any], rows: np.ndarray, batch_size: int
) -> Any:
    """Returns what a function of a batch, `[B, ...]` leaf by leaf, gives for all those rows, `[len(rows), ...]`.

    It sees `padded_batches`; its leaves come back as arrays of NumPy.

    Raises:
      ValueError: there are no rows.
    """
    parts = []
    for kept, batch in padded_batches(arrays, rows, batch_size):
        parts.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[:kept], fn(batch)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
