"""Entries that are read when their rows are asked for: of a set larger than memory, or of rows that share images."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["Streamed", "Table"]


class Table(Protocol):
    """What rows are read from: an array `[M, ...]`, or what reads files. Threads may read at the same time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(M, ...)`."""
        ...

    @property
    def dtype(self) -> Any:
        """Of every row."""
        ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Returns rows `[n]` of whole numbers as `[n, ...]`."""
        ...


@dataclass(frozen=True)
class Streamed:
    """An entry `[N, ...]` of `Arrays` of which no row is in memory but those that are asked for.

    Several rows may be one of the table, as when several questions are on one image.

    Attributes:
      table: what rows are read from.
      rows: `[N]`, the row of the table of each example.
    """

    table: Table
    rows: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError for rows that are no whole numbers `[N]`, or that the table has not."""
        rows, size = self.rows, self.table.shape[0]
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(f"rows must be whole numbers [N], got {rows.dtype} of shape {rows.shape}")
        if rows.size and not 0 <= rows.min() <= rows.max() < size:
            raise ValueError(f"rows must lie in [0, {size}), the rows of the table, got {rows.min()} to {rows.max()}")

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, ...)`."""
        return (len(self.rows), *self.table.shape[1:])

    @property
    def dtype(self) -> Any:
        """Of every row."""
        return self.table.dtype

    def __len__(self) -> int:
        """Returns N."""
        return len(self.rows)

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Reads the examples `[n]` and returns them as an array `[n, ...]`."""
        return np.asarray(self.table[self.rows[indices]])

    def take(self, indices: Any) -> "Streamed":
        """Returns the entry of the examples `[n]`, none of which is read."""
        return Streamed(self.table, self.rows[indices])
