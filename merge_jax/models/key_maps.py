"""Converts leaves from and to tensors with the names and layout of another library."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.layouts import MatrixSpec, as_matrix, from_matrix
from merge_jax.paths import flatten, near_misses, replace, some_of

__all__ = ["Layout", "Place", "PretrainedVariables", "check_kept", "take", "write"]


class Layout(NamedTuple):
    """The layout of one of our leaves in another library.

    Attributes:
      ours: the shape of the leaf to which `spec` applies.
      spec: how to read it as a matrix; None if the axes have the same order, so that a reshape suffices.
      theirs: the shape of the tensor.
    """

    ours: tuple[int, ...]
    spec: MatrixSpec | None
    theirs: tuple[int, ...]

    def to_ours(self, tensor: Any) -> Any:
        """Returns the tensor as the leaf, in the shape `ours`."""
        return tensor.reshape(self.ours) if self.spec is None else from_matrix(tensor, self.spec, self.ours)

    def to_theirs(self, array: Any) -> np.ndarray:
        """Returns the leaf as the tensor."""
        matrix = array.reshape(self.ours)
        if self.spec is not None:
            matrix = as_matrix(matrix, self.spec)
        # The safetensors writer stores a transposed view in its memory order, which gives wrong values.
        return np.ascontiguousarray(matrix).reshape(self.theirs)


class Place(NamedTuple):
    """The position of one of our leaves in the tensors of a library.

    Attributes:
      name: name of the tensor.
      layout: layout of the leaf in the tensor, or in its part.
      part: index of the leaf among equal parts along the first axis.
      parts: number of parts, such as 3 in a fused `qkv`.
    """

    name: str
    layout: Layout
    part: int = 0
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        first, *rest = self.layout.theirs
        return (self.parts * first, *rest)


class PretrainedVariables(NamedTuple):
    """The variables of a model with the weights of a file.

    Attributes:
      variables: `{"params": ...}`, and `batch_stats` if the model has them.
      kept: paths of the leaves that kept their values: those of a last layer with a different number of classes.
      left: names of unused tensors: counters of BatchNorm, and those of that last layer.
    """

    variables: Any
    kept: tuple[str, ...]
    left: tuple[str, ...]


def take(
    path: Any,
    tensors: Mapping[str, Any],
    variables: Any,
    places: Mapping[str, Place],
    *,
    last: str,
    class_axis: int = 0,
    spare: Callable[[str], Any] = lambda name: False,
) -> PretrainedVariables:
    """Returns the variables with the values of the tensors, for all leaves but a last layer with other classes.

    Args:
      path: of the file, for errors.
      tensors: of the file, by name.
      variables: of the model, or their shapes if no leaf is kept; leaves keep their dtype.
      places: the places of all leaves.
      last: path prefix of the last layer. It keeps its values if the file has none.
      class_axis: the class axis of the last layer's tensors.
      spare: whether a tensor of this name may remain unused, besides the last layer's.

    Raises:
      ValueError: a tensor that is missing, belongs to no leaf, has another shape or is not float.
    """
    leaves = flatten(variables)
    kept = _kept([place for leaf, place in places.items() if leaf.startswith(last)], tensors, class_axis)
    wanted = {leaf: place for leaf, place in places.items() if not (kept and leaf.startswith(last))}
    missing = [name for name in dict.fromkeys(place.name for place in wanted.values()) if name not in tensors]
    if missing:
        known = near_misses(missing[0], tensors)
        raise ValueError(f"{path} lacks the tensors {some_of(map(repr, missing), 3)}; {known}")
    taken = {}
    for leaf, place in wanted.items():
        tensor: Any = np.asarray(tensors[place.name])
        if tensor.shape != place.shape:
            raise ValueError(
                f"the tensor {place.name!r} of {path} is {list(tensor.shape)}, the model needs {list(place.shape)} for"
                f" {leaf!r}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"the tensor {place.name!r} of {path} is {tensor.dtype}, expected floats")
        part = np.split(tensor, place.parts)[place.part]
        taken[leaf] = jnp.asarray(place.layout.to_ours(part).reshape(leaves[leaf].shape), leaves[leaf].dtype)
    used = {place.name for place in wanted.values()}
    left = tuple(name for name in tensors if name not in used)
    known = {place.name for place in places.values()}
    surplus = [name for name in left if name not in known and not spare(name)]
    if surplus:
        raise ValueError(f"{path} has the tensors {some_of(map(repr, surplus), 3)}, which are no leaf's of the model")
    kept_leaves = tuple(leaf for leaf in places if leaf not in wanted)
    check_kept(path, kept_leaves, leaves)
    return PretrainedVariables(replace(variables, taken), kept_leaves, left)


def check_kept(path: Any, kept: Iterable[str], leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if a leaf that must keep its values has only a shape."""
    shapes = [leaf for leaf in kept if isinstance(leaves[leaf], jax.ShapeDtypeStruct)]
    if shapes:
        raise ValueError(
            f"{path} does not have {some_of(shapes, 3)} in the model's shape, so they keep their values, but have"
            " shapes alone: give what model.init returns"
        )


def write(variables: Any, places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Returns all leaves as the tensors of their places, C-contiguous."""
    leaves = flatten(variables)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for leaf, place in places.items():
        parts.setdefault(place.name, {})[place.part] = place.layout.to_theirs(np.asarray(leaves[leaf]))
    return {
        name: np.concatenate([found[part] for part in sorted(found)]) if len(found) > 1 else found[0]
        for name, found in parts.items()
    }


def _kept(last: list[Place], tensors: Mapping[str, Any], class_axis: int) -> bool:
    """Returns whether a last layer keeps its values: the file has none, or only its number of classes differs."""
    if not any(place.name in tensors for place in last):
        return True
    if not all(place.name in tensors for place in last):
        return False
    shapes = [(np.shape(tensors[place.name]), place.shape) for place in last]
    alike = all(_but(theirs, class_axis) == _but(ours, class_axis) for theirs, ours in shapes)
    return alike and any(theirs != ours for theirs, ours in shapes)


def _but(shape: tuple[int, ...], axis: int) -> tuple[int | None, ...]:
    """Returns a shape without the size of one axis."""
    return tuple(None if i == axis % len(shape) else size for i, size in enumerate(shape))
