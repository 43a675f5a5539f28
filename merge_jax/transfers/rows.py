"""Pairs rows of a source's table with rows of a target's: words by name, positions by grid, pixels by patch."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.checks import check_at_least_one
from merge_jax.layouts import MatrixSpec, is_patch_kernel, is_table, matrix_spec

__all__ = ["Arrangement", "Rows", "RowsByNumber", "arranged_ends"]

RowsByNumber = Literal["first"]
"""Pairs row `i` with row `i`, if both sides have one."""

Names = Sequence[str] | Mapping[str, int]

End = Sequence[tuple[str, tuple[int, ...], MatrixSpec]]
"""The leaves at one end of a route: path, shape, and matrix spec of each."""

_Along = tuple[str, tuple[int, ...], tuple[int, ...]]  # Path, shape, and the axes of the rows.


@dataclass(frozen=True)
class Rows:
    """A linear map from the rows of a source leaf to rows of a target leaf: `row t = sum_s w[t, s] row s`.

    Rows have a fixed meaning: words and positions of an embedding, pixels of a patch, labels of a last layer. They are
    along the first axis of a table, along the inputs for `from_patches`, along the outputs of any other kernel, and
    along a bias. Target rows without a source row do not change. Create a map with `by_name`, `by_index`, `from_grids`
    or `from_patches`, and pass it to a `Route`.

    Attributes:
      made: the target rows that are replaced, in increasing order.
      parts: for each, its source rows and weights, `((s, w), ...)`.
      counts: numbers of rows of the target's and the source's leaf.
      along_inputs: whether rows are along the inputs of a kernel.
    """

    made: tuple[int, ...]
    parts: tuple[tuple[tuple[int, float], ...], ...]
    counts: tuple[int, int]
    along_inputs: bool = False

    @classmethod
    def by_name(cls, source: Names, target: Names) -> Self:
        """Returns rows paired by name: each target row is the source's row of the same name, if there is one.

        >>> Rows.by_name(["the", "cat", "sat"], ["a", "cat", "the"]).made
        (1, 2)

        Args:
          source: names of the source's rows, in order, or their numbers by name, as in a tokenizer's vocabulary.
          target: the same for the target.

        Raises:
          ValueError: a name that appears twice on one side, numbers that are not 0, 1, ..., or no shared name.
        """
        places: list[dict[str, int]] = []
        source, target = _in_order("source", source), _in_order("target", target)
        for role, names in (("source", source), ("target", target)):
            places.append({name: i for i, name in enumerate(names)})
            if len(places[-1]) < len(names):
                twice = next(name for i, name in enumerate(names) if places[-1][name] != i)
                raise ValueError(f"names of rows must differ: {twice!r} appears twice among those of the {role}")
        if places[0].keys().isdisjoint(places[1]):
            found = " and ".join(f"{list(names)[:3]}" for names in (source, target))
            raise ValueError(f"source and target must have a name in common; their first are {found}")
        return cls.by_index([places[0].get(name, -1) for name in target], len(source))

    @classmethod
    def by_index(cls, indices: Sequence[int] | np.ndarray, source_rows: int) -> Self:
        """Returns rows by index: row `i` of the target is row `indices[i]` of the source; -1 leaves it unchanged.

        Raises:
          ValueError: an index that is neither -1 nor below `source_rows`, or only -1.
        """
        check_at_least_one(source_rows=source_rows)
        numbers = np.asarray(indices)
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"indices must be a row of whole numbers, got {indices!r}")
        outside = numbers[(numbers < -1) | (numbers >= source_rows)]
        if outside.size or not (numbers >= 0).any():
            found = f"{outside[0]}" if outside.size else "none but -1"
            raise ValueError(f"indices must be those of {source_rows} rows of the source, or -1; got {found}")
        made = np.flatnonzero(numbers >= 0)
        parts = tuple(((int(numbers[i]), 1.0),) for i in made)
        return cls(tuple(map(int, made)), parts, (len(numbers), source_rows))

    @classmethod
    def from_grids(cls, source: tuple[int, int], target: tuple[int, int], *, leading: int = 0) -> Self:
        """Returns the rows of a grid of positions, resampled if the grids differ in size.

        Bilinear between the centres of cells, and averaged over the covered cells if the target's grid is coarser:
        `jax.image.resize(..., "linear")` of the table as an image `[h, w, features]`.

        Args:
          source: height and width of the source's grid.
          target: the same for the target.
          leading: number of rows before the grid on both sides, such as a class token's, which are copied.

        Raises:
          ValueError: sizes below 1, or a number of leading rows below 0.
        """
        _check_sizes("hw", source=source, target=target)
        if not isinstance(leading, int) or leading < 0:
            raise ValueError(f"leading must be a whole number of 0 or more rows, got {leading!r}")
        grid = np.kron(*(_resampling(s, t) for s, t in zip(source, target, strict=True)))
        matrix = np.zeros((leading + grid.shape[0], leading + grid.shape[1]))
        matrix[:leading, :leading] = np.eye(leading)
        matrix[leading:, leading:] = grid
        return cls._of_matrix(matrix)

    @classmethod
    def from_patches(cls, source: tuple[int, int, int], target: tuple[int, int, int]) -> Self:
        """Returns the rows of a kernel that reads patches: pixels, in the order height, width, channels.

        On a patch, the new kernel computes the source kernel's output for that patch, converted to the source's size
        (bilinear) and channels: a grey patch is repeated over all colours, a coloured patch is averaged over its
        channels. So a kernel for RGB becomes one for grey by the sum over its channels. With `R` the map from target
        patches to source patches, `W' = R^T W`. Our choice; FlexiViT (arXiv:2212.08013) uses the pseudo-inverse of the
        opposite map.

        Args:
          source: height, width and channels of the source's patches.
          target: the same for the target.

        Raises:
          ValueError: sizes below 1, or different numbers of channels of which neither is 1.
        """
        _check_sizes("hwc", source=source, target=target)
        (*_, c), (*_, d) = source, target
        if c != d and 1 not in (c, d):
            raise ValueError(f"nothing says how {d} channels become {c}: give as many, or 1 on one side")
        colours = np.eye(c) if c == d else np.full((c, d), 1 / d)
        spatial = [_resampling(t, s) for s, t in zip(source[:2], target[:2], strict=True)]
        return cls._of_matrix(functools.reduce(np.kron, (*spatial, colours)).T, along_inputs=True)

    @classmethod
    def _of_matrix(cls, matrix: np.ndarray, *, along_inputs: bool = False) -> Self:
        parts = tuple(tuple((int(s), float(row[s])) for s in np.flatnonzero(row)) for row in matrix)
        return cls(tuple(range(len(matrix))), parts, matrix.shape, along_inputs)  # type: ignore[arg-type]


def _in_order(role: str, names: Names) -> Sequence[str]:
    """Returns the names in row order."""
    if not isinstance(names, Mapping):
        return names
    if sorted(names.values()) != list(range(len(names))):
        raise ValueError(
            f"the rows of the {role} must be numbered 0 to {len(names) - 1}, each once; give a list of names"
        )
    return sorted(names, key=names.__getitem__)


def _check_sizes(axes: str, **by_role: Sequence[int]) -> None:
    for role, sizes in by_role.items():
        if len(sizes) != len(axes):
            raise ValueError(f"the sizes of the {role} must be {len(axes)} ({', '.join(axes)}), got {sizes!r}")
        check_at_least_one(**{f"{axis} of the {role}": size for axis, size in zip(axes, sizes, strict=True)})


def _resampling(source: int, target: int) -> np.ndarray:
    """Returns the matrix `[target, source]` that resamples a line: the triangle filter, wider for downsampling."""
    scale = source / target
    centres = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(centres - np.arange(source)) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Arrangement:
    """Rearranges the rows of a leaf before it is read as a matrix: `row i = sum_s w[i, s] row s`, along some axes.

    Attributes:
      axes: axes of the rows, in row order.
      sizes: new sizes of these axes.
      parts: for each new row, its old rows and weights.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    parts: tuple[tuple[tuple[int, float], ...], ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the new shape of a leaf of this shape."""
        new = dict(zip(self.axes, self.sizes, strict=True))
        return tuple(new.get(axis, size) for axis, size in enumerate(shape))

    def arrange(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf with its new rows; copies of a single row are exact."""
        width = max(map(len, self.parts))
        padded = [(*part, *((0, 0.0),) * (width - len(part))) for part in self.parts]
        indices = np.array([[row for row, _ in part] for part in padded])
        weights = np.array([[weight for _, weight in part] for part in padded], np.float32)
        if width == 1 and (weights == 1).all():
            return self._on_rows(leaf, self.sizes, lambda rows: rows[indices[:, 0]])
        # The highest precision, so that accelerators and CPUs resample alike.
        weighted = functools.partial(jnp.einsum, "kj,kj...->k...", weights, precision=lax.Precision.HIGHEST)
        return self._on_rows(leaf, self.sizes, lambda rows: weighted(rows[indices]))

    def restore(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf before the rearrangement, which must be a permutation."""
        order = np.argsort([row for ((row, _),) in self.parts])
        return self._on_rows(leaf, self.sizes, lambda rows: rows[order])

    def _on_rows(self, leaf: jax.Array, sizes: tuple[int, ...], change: Callable[[jax.Array], jax.Array]) -> jax.Array:
        first = tuple(range(len(self.axes)))
        moved = jnp.moveaxis(jnp.asarray(leaf), self.axes, first)
        rest = moved.shape[len(first) :]
        return jnp.moveaxis(change(moved.reshape(-1, *rest)).reshape(*sizes, *rest), first, self.axes)


def arranged_ends(
    rows: Rows | RowsByNumber | None, target: End, source: End
) -> tuple[Arrangement | None, Arrangement | None]:
    """Returns the arrangements of the leaves at both ends of a route, so that rows with one index belong together.

    The source's rows become those that the target receives. The target's replaced rows come first, then the others.
    None leaves a leaf unchanged.

    Rows of embeddings are words, positions and so on; inputs of patch kernels are pixels. If their numbers differ, rows
    with equal indices do not correspond, so the route must say which belong together. Equal numbers are assumed to mean
    the same rows.

    Raises:
      ValueError: different numbers of words, positions or pixels without `rows`; `rows` with other numbers than those
        of the leaves, for several leaves as one matrix, or along several axes if some rows do not change.
    """
    if isinstance(rows, Rows):
        return _arranged(rows, _along(target, rows.along_inputs), _along(source, rows.along_inputs))
    target_rows, source_rows = _named_rows(target), _named_rows(source)
    if target_rows is None or source_rows is None or target_rows.kind != source_rows.kind or target_rows == source_rows:
        return None, None
    if rows is None:
        raise _unlike(target, source, target_rows, source_rows)
    if any(len(end) > 1 for end in (target, source)):
        return None, None  # Stacked rows are already paired by index.
    pixels = target_rows.kind == "pixels"
    ends = _along(target, pixels), _along(source, pixels)
    _check_layouts(*ends)
    if any(len(axes) > 1 for *_, axes in ends):
        return None, None  # Windows are aligned at their centres, channels by index.
    m, p = (shape[axes[0]] for _, shape, axes in ends)
    return _arranged(Rows.by_index([row if row < p else -1 for row in range(m)], p), *ends)


class _NamedRows(NamedTuple):
    """The meaning of the rows of an end, and their number; for pixels, the sizes of window and channels."""

    kind: str
    sizes: tuple[int, ...]


def _named_rows(end: End) -> _NamedRows | None:
    """Returns the rows of an end if they have names or positions."""
    if all(is_table(path, shape) for path, shape, _ in end):
        along = (_along((leaf,), False) for leaf in end)
        return _NamedRows("rows", (sum(math.prod(shape[axis] for axis in axes) for _, shape, axes in along),))
    if all(is_patch_kernel(path, shape) for path, shape, _ in end):
        _, shape, spec = end[0]
        inputs, *window = spec.blocks(shape)[1:]
        return _NamedRows("pixels", (*window, inputs))
    return None


def _along(end: End, inputs: bool) -> _Along:
    """Returns path, shape and row axes of the single leaf at an end."""
    if len(end) > 1:
        paths = " + ".join(path for path, *_ in end)
        raise ValueError(f"give rows to routes of one leaf from one leaf; {paths!r} makes one matrix of several")
    ((path, shape, spec),) = end
    if inputs:
        return path, shape, spec.window + spec.inputs  # Pixels are in the order height, width, channels.
    if is_table(path, shape):
        return path, shape, matrix_spec(path, shape).rows  # Independent of the route's spec.
    return path, shape, spec.rows or spec.inputs


def _unlike(target: End, source: End, target_rows: _NamedRows, source_rows: _NamedRows) -> ValueError:
    (path, *_), (source_path, *_) = target[0], source[0]
    if target_rows.kind == "rows":
        how = (
            "rows=mj.match_vocabulary(source_tokens, target_tokens) for words, "
            "rows=mj.Rows.by_name(source_names, target_names) for labels, "
            "rows=mj.Rows.from_grids(source_grid, target_grid) "
            "for places in images, or rows='first' for row i from row i, as for positions in a text"
        )
    else:
        how = (
            "rows=mj.Rows.from_patches(source_patch, target_patch), each (height, width, channels), or rows='first' "
            "for pixel i from pixel i"
        )
    counts = ["x".join(map(str, sizes)) for _, sizes in (target_rows, source_rows)]
    return ValueError(
        f"give Route({path!r}, {source_path!r}, ...) {how}, or leave it out: the target has {counts[0]} "
        f"{target_rows.kind}, the source {counts[1]}, and no number says which belong together"
    )


def _check_layouts(target: _Along, source: _Along) -> None:
    """Raises ValueError unless both leaves have equally many row axes."""
    (path, _, axes), (source_path, _, source_axes) = target, source
    if len(axes) != len(source_axes):
        raise ValueError(
            f"reshape one of the leaves to the other's layout: {path!r} has its rows along {len(axes)} axes, "
            f"{source_path!r} along {len(source_axes)}"
        )


def _arranged(rows: Rows, target: _Along, source: _Along) -> tuple[Arrangement | None, Arrangement]:
    (path, shape, axes), (source_path, source_shape, source_axes) = target, source
    found = tuple(
        math.prod(full[axis] for axis in along) for full, along in ((shape, axes), (source_shape, source_axes))
    )
    if found != rows.counts:
        swapped = "; names of the source come first" if found == rows.counts[::-1] else ""
        raise ValueError(
            f"give rows of {found[0]} from {found[1]}, as many as {path!r} and {source_path!r} have, not of "
            f"{rows.counts[0]} from {rows.counts[1]}{swapped}"
        )
    _check_layouts(target, source)
    made, complete = set(rows.made), len(rows.made) == found[0]
    if len(axes) > 1 and not complete:
        raise ValueError(f"make all rows of {path!r}, which are along {len(axes)} axes; {len(made)} are made")
    sizes = tuple(shape[axis] for axis in axes) if complete else (len(rows.made),)
    source_arrangement = Arrangement(source_axes, sizes, rows.parts)
    order = (*rows.made, *(row for row in range(found[0]) if row not in made))
    if order == tuple(range(found[0])):
        return None, source_arrangement
    return Arrangement(axes, found[:1], tuple(((row, 1.0),) for row in order)), source_arrangement
