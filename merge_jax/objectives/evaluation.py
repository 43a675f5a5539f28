"""Batches of one size, for what is measured over exactly all examples."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["padded_batches"]


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
