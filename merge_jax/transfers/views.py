"""Views: exact conversion between the leaves at one end of a route and a matrix of tokens.

A view converts leaves to a **kernel**, in which the overlap of two models is a plain block, and the kernel to the
**matrix** whose rows are the adapter's tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.layouts import MatrixSpec, as_matrix, from_matrix, overlap_blocks, overlap_shape
from merge_jax.transfers.rows import Arrangement

__all__ = ["ATTENTION_KERNELS", "AttentionView", "KernelView", "TokenTypes", "View", "ViewName", "proportional"]

ATTENTION_KERNELS = ("query", "key", "value", "out")
"""The kernels of an attention block, each at `<name>/kernel`."""

ViewName = Literal["matrix", "convolution", "attention"]
"""The tokens of an adapter.

- `matrix`: the rows and columns of the leaf's matrix `[outputs, inputs x window]`.
- `convolution`: the matrix is `[outputs x window, inputs]`: each tap of the window is a separate token, with its
  position as token type. The adapter does not grow with the window, and different windows are paired tap by tap.
- `attention`: query, key, value and output kernels of an attention block are transferred together, head by head. A head
  is a matrix `[4 d, width]`, and the token type of a row is its kernel. Heads share one adapter, and are paired in
  proportion if their numbers differ.
"""


def proportional(count: int, other: int) -> list[int]:
    """Returns for each of `count` ordered items its partner among `other` ones: `floor((i + 1/2) m / n)`.

    >>> proportional(6, 12), proportional(3, 2)
    ([1, 3, 5, 7, 9, 11], [0, 1, 1])
    """
    return [(2 * i + 1) * other // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class TokenTypes:
    """The token types of a matrix's rows: `0 .. count - 1`, each repeated `each` times, the whole `times` times."""

    count: int
    each: int
    times: int

    def by_row(self) -> np.ndarray:
        """Returns the type of each row, `[each * count * times]`."""
        return np.tile(np.repeat(np.arange(self.count), self.each), self.times)


@dataclass(frozen=True)
class KernelView:
    """Leaves as one matrix, with the rows of several leaves stacked.

    The kernel is `[rows, inputs, *window]`.

    Attributes:
      shapes: of the leaves.
      specs: matrix spec of each leaf; all have the same inputs and window.
      taps: whether the taps of the window are rows (the view `convolution`) or columns (`matrix`).
      arrangement: the initial rearrangement of a table's rows, for a view of one leaf; None for none.
    """

    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[MatrixSpec, ...]
    taps: bool = False
    arrangement: Arrangement | None = None

    def check(self) -> None:
        """Raises ValueError if the leaves do not stack to one matrix."""
        rests = [spec.blocks(shape)[1:] for spec, shape in zip(self.specs, self.arranged_shapes, strict=True)]
        if len(set(rests)) > 1:
            shapes = " and ".join(f"{shape}" for shape in dict.fromkeys(self.shapes))
            raise ValueError(f"leaves that make one matrix together need the same inputs and window, got {shapes}")

    @property
    def arranged_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the leaves with their rows rearranged."""
        return tuple(map(self.arrangement.shape, self.shapes)) if self.arrangement else self.shapes

    def arrange(self, leaf: jax.Array) -> jax.Array:
        """Returns a leaf with its rows rearranged."""
        return self.arrangement.arrange(leaf) if self.arrangement else leaf

    def restore(self, leaf: jax.Array) -> jax.Array:
        """Returns a leaf of the target with its rows in their original order."""
        return self.arrangement.restore(leaf) if self.arrangement else leaf

    @property
    def _rows(self) -> list[int]:
        return [spec.blocks(shape)[0] for spec, shape in zip(self.specs, self.arranged_shapes, strict=True)]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return (sum(self._rows), *self.specs[0].blocks(self.arranged_shapes[0])[1:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        rows, inputs, *window = self.kernel_shape
        taps = math.prod(window)
        return (rows * taps, inputs) if self.taps else (rows, inputs * taps)

    @property
    def token_types(self) -> TokenTypes | None:
        """The types of the rows; None if they have none."""
        rows = self.kernel_shape[0]
        return TokenTypes(self.matrix_shape[0] // rows, 1, rows) if self.taps else None

    def to_kernel(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Returns the kernel of the leaves."""
        matrices = [as_matrix(self.arrange(leaf), spec) for leaf, spec in zip(leaves, self.specs, strict=True)]
        return jnp.concatenate(matrices).reshape(self.kernel_shape)

    def to_leaves(self, kernel: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the leaves of the kernel."""
        matrix = kernel.reshape(self.kernel_shape[0], -1)
        leaves, start = [], 0
        for spec, shape, rows in zip(self.specs, self.arranged_shapes, self._rows, strict=True):
            leaves.append(self.restore(from_matrix(matrix[start : start + rows], spec, shape)))
            start += rows
        return tuple(leaves)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Returns the matrix of the kernel."""
        return (jnp.moveaxis(kernel, 1, -1) if self.taps else kernel).reshape(self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Returns the kernel of the matrix."""
        rows, inputs, *window = self.kernel_shape
        if self.taps:
            return jnp.moveaxis(matrix.reshape(rows, *window, inputs), -1, 1)
        return matrix.reshape(self.kernel_shape)

    def overlap(self, kernel: jax.Array, source: "KernelView", source_kernel: jax.Array) -> jax.Array:
        """Returns the kernel with the overlapping block of the source copied in; see `copy_overlap`."""
        del source
        return overlap_blocks(kernel, source_kernel)

    def overlap_shape(self, source: "KernelView") -> tuple[int, int]:
        """Returns the shape of the overlapping block, as a matrix."""
        return overlap_shape(self.kernel_shape, source.kernel_shape)


@dataclass(frozen=True)
class AttentionView:
    """Query, key, value and output kernels as one matrix per head.

    The kernel is `[heads, 4, d, width]`, with `width` the input features of queries and the output features.

    Attributes:
      shapes: of the four leaves, in that order.
      specs: matrix spec of each leaf: `[heads d, width]` for the first three, `[width, heads d]` for the last.
      heads: number of heads.
    """

    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[MatrixSpec, ...]
    heads: int

    def check(self) -> None:
        """Raises ValueError if the leaves are not an attention block with this number of heads."""
        shapes = [spec.matrix_shape(shape) for spec, shape in zip(self.specs, self.shapes, strict=True)]
        inner, width = shapes[0]
        if shapes != [(inner, width)] * 3 + [(width, inner)]:
            raise ValueError(
                "the kernels of query, key, value and output must be matrices [h d, w], [h d, w], [h d, w] and "
                f"[w, h d] of one width w, got {', '.join(f'{list(shape)}' for shape in shapes)}"
            )
        if self.heads < 1 or inner % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the {inner} features of the attention")

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """The shape of the kernel."""
        inner, width = self.specs[0].matrix_shape(self.shapes[0])
        return self.heads, 4, inner // self.heads, width

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of the matrix of one head."""
        _, kernels, d, width = self.kernel_shape
        return kernels * d, width

    @property
    def token_types(self) -> TokenTypes:
        """The types of the rows: their kernels."""
        _, kernels, d, _ = self.kernel_shape
        return TokenTypes(kernels, d, 1)

    def to_kernel(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """Returns the kernel of the leaves."""
        *inputs, output = (as_matrix(leaf, spec) for leaf, spec in zip(leaves, self.specs, strict=True))
        heads, _, d, width = self.kernel_shape
        return jnp.stack([matrix.reshape(heads, d, width) for matrix in (*inputs, output.T)], axis=1)

    def to_leaves(self, kernel: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the leaves of the kernel."""
        *inputs, output = (kernel[:, i].reshape(-1, kernel.shape[-1]) for i in range(4))
        matrices = zip((*inputs, output.T), self.specs, self.shapes, strict=True)
        return tuple(from_matrix(matrix, spec, shape) for matrix, spec, shape in matrices)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Returns the matrices of the kernel, `[heads, 4 d, width]`."""
        return kernel.reshape(self.heads, *self.matrix_shape)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Returns the kernel of the matrices."""
        return matrix.reshape(self.kernel_shape)

    def overlap(self, kernel: jax.Array, source: "AttentionView", source_kernel: jax.Array) -> jax.Array:
        """Returns the kernel with the leading block of each head's partner in the source copied in."""
        partners = source_kernel[jnp.array(proportional(self.heads, source.heads))]
        d, width = (min(a, b) for a, b in zip(kernel.shape[2:], partners.shape[2:], strict=True))
        return kernel.at[:, :, :d, :width].set(partners[:, :, :d, :width].astype(kernel.dtype))

    def overlap_shape(self, source: "AttentionView") -> tuple[int, int]:
        """Returns the shape of a head's overlap, as a matrix."""
        d, width = map(min, zip(self.kernel_shape[2:], source.kernel_shape[2:], strict=True))
        return 4 * d, width


View = KernelView | AttentionView
"""A view of the leaves at one end of a route as a matrix."""
