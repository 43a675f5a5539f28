"""A parameter leaf of any rank as a matrix `[rows = outputs, columns = inputs x window]`, and exactly back."""

import math
from dataclasses import dataclass

import jax

__all__ = ["MatrixSpec", "as_matrix", "copy_overlap", "from_matrix", "overlap_blocks", "overlap_shape"]


@dataclass(frozen=True)
class MatrixSpec:
    """Which axes of a leaf are rows (outputs) and which are columns (inputs, then the kernel window).

    The matrix is `[prod(rows), prod(inputs) * prod(window)]`, each group in the order given, the last axis
    fastest; that is the order of a torch weight `[out, in, kh, kw]` reshaped to `[out, -1]`.

    Attributes:
      rows: axes of the outputs; may be empty (a vector is one row).
      inputs: axes of the inputs.
      window: axes of a convolution's window; they stay apart from the inputs so that `copy_overlap` can
        align the centres of windows of different sizes.
    """

    rows: tuple[int, ...]
    inputs: tuple[int, ...]
    window: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of the leaf, in the order of the matrix."""
        return self.rows + self.inputs + self.window

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the groups name every axis of a leaf of this shape exactly once."""
        if sorted(self.axes) != list(range(len(shape))):
            raise ValueError(
                f"{self} must name each axis of the shape {shape} once, "
                f"that is {tuple(range(len(shape)))}; found {self.axes}"
            )

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape `(rows, inputs, *window)` of a leaf of this shape."""
        rows, inputs = (math.prod(shape[a] for a in group) for group in (self.rows, self.inputs))
        return (rows, inputs, *(shape[a] for a in self.window))

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape `(rows, columns)` of the matrix of a leaf of this shape."""
        rows, *columns = self.blocks(shape)
        return rows, math.prod(columns)


def as_matrix(leaf: jax.Array, spec: MatrixSpec) -> jax.Array:
    """Returns the leaf as its matrix `[rows, columns]`; `from_matrix` is the exact inverse."""
    spec.check(leaf.shape)
    return leaf.transpose(spec.axes).reshape(spec.matrix_shape(leaf.shape))


def from_matrix(matrix: jax.Array, spec: MatrixSpec, shape: tuple[int, ...]) -> jax.Array:
    """Returns the leaf of the given shape whose matrix is `matrix`."""
    spec.check(shape)
    inverse = tuple(spec.axes.index(axis) for axis in range(len(shape)))
    return matrix.reshape([shape[axis] for axis in spec.axes]).transpose(inverse)


def copy_overlap(target: jax.Array, source: jax.Array, target_spec: MatrixSpec, source_spec: MatrixSpec) -> jax.Array:
    """Returns the target leaf with its leading rows and inputs overwritten by the source's.

    Both leaves are seen as `[rows, inputs, *window]`. Rows and inputs overlap from the first index on, windows
    at their centres (our choice: a 1x1 kernel is the centre tap of a 3x3 one, not its first corner). What lies
    outside the overlap keeps the target's values. Leaves of one shape: the result is the source.

    Shapes: target `[...]`, source `[...]` of any ranks; the result has the target's shape and dtype.
    """
    target_spec.check(target.shape)
    source_spec.check(source.shape)
    target_blocks = as_matrix(target, target_spec).reshape(target_spec.blocks(target.shape))
    source_blocks = as_matrix(source, source_spec).reshape(source_spec.blocks(source.shape))
    blocks = overlap_blocks(target_blocks, source_blocks)
    return from_matrix(blocks.reshape(target_spec.matrix_shape(target.shape)), target_spec, target.shape)


def overlap_blocks(target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns `target [rows, inputs, *window]` with the overlapping block of `source` copied in, as `copy_overlap`."""
    shape = target.shape
    # A leaf without a window, or with fewer window axes, has a window of 1 along the ones it lacks.
    rank = max(target.ndim, source.ndim)
    target, source = _pad_window(target, rank), _pad_window(source, rank)
    target_slices, source_slices = [], []
    for axis, (t, s) in enumerate(zip(target.shape, source.shape, strict=True)):
        size = min(t, s)
        t_start, s_start = ((t - size) // 2, (s - size) // 2) if axis >= 2 else (0, 0)
        target_slices.append(slice(t_start, t_start + size))
        source_slices.append(slice(s_start, s_start + size))
    block = source[tuple(source_slices)].astype(target.dtype)
    return target.at[tuple(target_slices)].set(block).reshape(shape)


def overlap_shape(target: tuple[int, ...], source: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of the matrix `[rows, inputs x window]` that blocks of these two shapes both have."""
    common = [min(sizes) for sizes in zip(target[:2], source[:2], strict=True)]
    rank = max(len(target), len(source))
    # As in `overlap_blocks`, the window of what has fewer axes of it is 1 along the others.
    windows = ((*(1,) * (rank - len(blocks)), *blocks[2:]) for blocks in (target, source))
    return common[0], common[1] * math.prod(map(min, zip(*windows, strict=True)))


def _pad_window(blocks: jax.Array, rank: int) -> jax.Array:
    rows, inputs, *window = blocks.shape
    return blocks.reshape(rows, inputs, *(1,) * (rank - blocks.ndim), *window)
