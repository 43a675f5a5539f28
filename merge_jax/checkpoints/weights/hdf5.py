"""HDF5 files as plain trees of groups; refuses links to other files and oversized claims."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.weights.archives import open_archive
from merge_jax.checkpoints.weights.stored import needing, reading

__all__ = ["Array", "Group", "join_groups", "read_arrays", "read_groups"]

_LARGEST_RATIO = 1032  # As for a zip; HDF5 compresses no better.
_DEEPEST = 100
_ATTRIBUTES = ("name", "layer_names", "weight_names")
_BLOCK = 2**20


class Array(NamedTuple):
    """An array: its file, its path in it, shape and dtype."""

    file: Path
    place: str
    shape: jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Group:
    """A group of an HDF5 file: its path, the attributes that Keras reads, groups and arrays by name."""

    place: str
    attributes: Mapping[str, Any]
    groups: Mapping[str, "Group"]
    arrays: Mapping[str, Array]


def read_groups(path: Path, member: str) -> Group:
    """Returns the groups of an HDF5 file, or of an archive member, without reading numbers.

    Raises:
      ImportError: h5py is not installed.
      ValueError: the file is broken (for a member, by its checksum), has a link, external data or non-numeric data, or
        claims more than it can hold.
    """
    if _is_archive(path):
        with reading(path, "archive"), open_archive(path) as archive, archive.open(member) as opened:
            while opened.read(_BLOCK):  # To the end, where the checksum is compared.
                pass
    with _opened(path, member) as file:
        return _group(file, path, set())


def join_groups(groups: Sequence[Group]) -> Group:
    """Returns the merged groups of several files.

    Raises:
      ValueError: two files have an array at the same path.
    """
    arrays: dict[str, Array] = {}
    for array in (found for group in groups for found in group.arrays.values()):
        name = array.place.rpartition("/")[2]
        if name in arrays:
            raise ValueError(f"{arrays[name].file} and {array.file} both have {array.place!r}")
        arrays[name] = array
    names = dict.fromkeys(name for group in groups for name in group.groups)
    inside = {name: join_groups([group.groups[name] for group in groups if name in group.groups]) for name in names}
    attributes = {name: value for group in groups for name, value in group.attributes.items()}
    return Group(groups[0].place, attributes, inside, arrays)


def read_arrays(arrays: Sequence[Array], member: str) -> list[np.ndarray]:
    """Returns arrays found by `read_groups`, one file after another; bfloat16 is stored as bytes."""
    found: dict[Array, np.ndarray] = {}
    for path in dict.fromkeys(array.file for array in arrays):
        with _opened(path, member) as file:
            found |= {array: np.asarray(file[array.place]) for array in arrays if array.file == path}
    return [found[array] for array in arrays]


@contextmanager
def _opened(path: Path, member: str) -> Iterator[Any]:
    try:
        import h5py  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise needing(path, "h5py", "keras") from None
    with reading(path, "HDF5 file of Keras"):
        if not _is_archive(path):
            with h5py.File(path) as file:
                yield file
            return
        with open_archive(path) as archive, archive.open(member) as opened, h5py.File(opened) as file:
            yield file


def _is_archive(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(2) == b"PK"


def _group(node: Any, path: Path, seen: set[Any]) -> Group:
    if node in seen or len(seen) > 1_000_000:
        raise ValueError(f"{path} has the group {node.name!r} at two places")
    seen.add(node)
    if node.name.count("/") > _DEEPEST:
        raise ValueError(f"{path} has groups of more than {_DEEPEST} levels, which is the limit")
    groups, arrays = {}, {}
    for name in node:
        # Before following it: it may lead into another file.
        if type(node.get(name, getlink=True)).__name__ != "HardLink":
            raise ValueError(f"{path} has the link {name!r} in {node.name!r}, which may point to another file")
        child = node[name]
        if hasattr(child, "keys"):
            groups[name] = _group(child, path, seen)
        else:
            arrays[name] = Array(path, child.name, _shape(child, path))
    attributes = {name: node.attrs[name] for name in _ATTRIBUTES if name in node.attrs}
    return Group(node.name, attributes, groups, arrays)


def _shape(dataset: Any, path: Path) -> jax.ShapeDtypeStruct:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{path} stores the values of {dataset.name!r} in another file")
    is_bfloat16 = (dataset.dtype.kind, dataset.dtype.itemsize) == ("V", 2) and dataset.attrs.get("dtype") == "bfloat16"
    if dataset.dtype.kind not in "biufc" and not is_bfloat16:
        raise ValueError(f"{path} has {dataset.dtype} in {dataset.name!r}, which is not numeric")
    size = dataset.dtype.itemsize * int(np.prod(dataset.shape, dtype=object))
    if size > _LARGEST_RATIO * dataset.id.get_storage_size() + 100:
        raise ValueError(f"{path} claims {size} bytes for {dataset.name!r}, which it does not hold")
    return jax.ShapeDtypeStruct(dataset.shape, jnp.bfloat16 if is_bfloat16 else dataset.dtype)
