"""Entries read on access: for sets larger than memory, or rows that share images."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["Streamed", "Table"]


class Table(Protocol):
    """A source of rows: an array `[M, ...]`, or a reader of files. Threads may read concurrently."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(M, ...)`."""
        ...

    @property
    def dtype(self) -> Any:
        """Of every row."""
        ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Returns the rows with integer indices `[n]` as `[n, ...]`."""
        ...


@dataclass(frozen=True)
class Streamed:
    """An entry `[N, ...]` of `Arrays` whose rows are read only on access.

    Several rows may refer to one table row, as with several questions on one image.

    Attributes:
      table: the source of rows.
      rows: `[N]`, the row of the table of each example.
    """

    table: Table
    rows: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError unless rows are integers `[N]` within the table."""
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
        """Returns the entry of the examples `[n]`, without reading them."""
        return Streamed(self.table, self.rows[indices])
