"""Matrix layouts of a weight file's leaves: from given specs, the file, or the leaves' names."""

import os
from collections.abc import Mapping

from merge_jax.checkpoints.weights.load import Select, find_weights, open_leaves
from merge_jax.layouts import MatrixSpec, is_kernel_name, is_table, matrix_spec
from merge_jax.paths import Pattern, find_paths

__all__ = ["layouts_of"]


def layouts_of(
    path: str | os.PathLike[str], select: Select = None, specs: Mapping[Pattern, MatrixSpec] | None = None
) -> dict[str, MatrixSpec]:
    """Returns the matrix spec of each leaf of a weight file, by the paths that `load_weights` returns.

    Uses `specs` if they name the leaf; else the file: the operations of an ONNX graph (`Gemm` with `transB`), or the
    classes of Keras layers; else the leaf's name, as in `matrix_spec`, and the size of its bias, which equals the
    number of rows. Scalars and empty leaves have no spec.

    Args:
      path: as `load_weights`; no numbers are read.
      select: as `load_weights`.
      specs: specs of leaves, by paths or patterns.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `load_weights`; or a leaf's spec is unknown, or its name and its
        bias disagree: the message lists likely specs to choose from.
    """
    file = find_weights(path)
    stored, names = open_leaves(file, select)
    shapes = stored.shapes(list(names.values()))
    given: dict[str, MatrixSpec] = {}
    for pattern, spec in (specs or {}).items():
        for name in find_paths(names, pattern, role="file"):
            spec.check(shapes[names[name]].shape)
            given[name] = spec
    found: dict[str, MatrixSpec] = {}
    for name, leaf in names.items():
        shape = shapes[leaf].shape
        if not shape or 0 in shape:
            continue
        known = given.get(name) or stored.specs.get(leaf)
        if known is None:
            bias = shapes.get(f"{leaf.rpartition('/')[0]}/bias")
            known = _by_name(str(file), name, shape, None if bias is None else bias.shape, stored.names_tell)
        found[name] = known
    return found


def _by_name(
    file: str, name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, names_tell: bool
) -> MatrixSpec:
    *_, last = name.split("/")
    is_vector = sum(size > 1 for size in shape) <= 1
    if is_vector or is_table(name, shape) or (names_tell and (is_kernel_name(last) or len(shape) > 2)):
        try:
            spec = matrix_spec(name, shape)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        rows = spec.matrix_shape(shape)[0]
        if bias is None or len(bias) != 1 or len(shape) != 2 or is_vector or is_table(name, shape) or rows == bias[0]:
            return spec
        if bias[0] != shape[spec.inputs[0]]:
            return spec
        why = f"its name says that its outputs are {rows}, its bias that they are {bias[0]}"
    else:
        why = "neither its name nor the file says which axis is what"
    last_axis = len(shape) - 1
    choices = {
        "outputs first": MatrixSpec((0,), tuple(range(1, len(shape)))),
        "inputs first": MatrixSpec((last_axis,), tuple(range(last_axis))),
        "one vector": MatrixSpec((), tuple(range(len(shape)))),
    }
    listed = "; ".join(f"{spec} ({what})" for what, spec in choices.items())
    raise ValueError(f"{file}: give specs={{{name!r}: ...}} of the shape {list(shape)}, since {why}: {listed}")
