"""A parameter leaf of any rank as a matrix `[rows = outputs, columns = inputs x window]`, and exactly back."""

import math
from dataclasses import dataclass

import jax

__all__ = ["MatrixSpec", "as_matrix", "copy_overlap", "from_matrix", "matrix_spec", "overlap_blocks"]


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


def matrix_spec(path: str, shape: tuple[int, ...]) -> MatrixSpec:
    """Returns the spec of a leaf in the layout of Flax, Haiku, torch or Equinox, by its path and its rank.

    ================================  =======================  =========  ===================
    leaf                              shape                    rows       columns
    ================================  =======================  =========  ===================
    bias, scale                       `[out]`, `[h, d]`        1          out, h d
    embedding                         `[tokens, features]`     tokens     features
    attention query, key, value       `[in, h, d]`             h d        in
    attention out                     `[h, d, out]`            out        h d
    dense kernel                      `[in, out]`              out        in
    convolution (depthwise: in = 1)   `[*window, in, out]`     out        in x window
    weight (torch, Equinox)           `[out, in, *window]`     out        in x window
    ================================  =======================  =========  ===================

    A leaf is a torch weight where its name has the word `weight` (`weight`, `in_proj_weight`, `weight_ih_l0`), which
    no leaf of Flax or Haiku has. A torch embedding has its tokens as rows by that rule.

    Two rows are our choice. A vector is one row and not one column, since the adapter normalises rows, and a
    row of one number normalises to a constant. An embedding has its tokens as rows, since the adapter's
    feed-forward block grows with the square of the columns.

    Raises:
      ValueError: the leaf is a scalar or has no elements.
    """
    if not shape or 0 in shape:
        raise ValueError(f"{path!r} of shape {shape} is no matrix: it needs a rank of 1 or more and elements")
    parent, name = ("", *path.split("/"))[-2:]
    rank = len(shape)
    if rank == 1 or name in ("bias", "scale"):
        return MatrixSpec(rows=(), inputs=tuple(range(rank)))
    if "weight" in name.split("_"):
        return MatrixSpec(rows=(0,), inputs=(1,), window=tuple(range(2, rank)))
    if name == "embedding":
        return MatrixSpec(rows=(0,), inputs=tuple(range(1, rank)))
    if rank == 3 and parent in ("query", "key", "value"):
        return MatrixSpec(rows=(1, 2), inputs=(0,))
    if rank == 3 and parent == "out":
        return MatrixSpec(rows=(2,), inputs=(0, 1))
    return MatrixSpec(rows=(rank - 1,), inputs=(rank - 2,), window=tuple(range(rank - 2)))


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


def _pad_window(blocks: jax.Array, rank: int) -> jax.Array:
    rows, inputs, *window = blocks.shape
    return blocks.reshape(rows, inputs, *(1,) * (rank - blocks.ndim), *window)
