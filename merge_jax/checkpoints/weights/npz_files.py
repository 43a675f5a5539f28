"""npz: arrays by flat names such as `params/encoder/kernel`, as written by `numpy.savez` and vision repositories."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.weights.archives import member_names, open_archive
from merge_jax.checkpoints.weights.stored import Format, Stored, reading
from merge_jax.checkpoints.weights.training_state import model_part

__all__ = ["NPZ"]

_ENDING = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _detect(path: Path, head: bytes) -> bool:
    names = member_names(path, head)
    return bool(names) and all(name.endswith(_ENDING) for name in names)


def _open(path: Path) -> Stored:
    with reading(path, "npz"), open_archive(path) as archive:
        sizes = {member.filename.removesuffix(_ENDING): member.file_size for member in archive.infolist()}
        leaves = {leaf: name for name, leaf in paths_of(sizes, path).items()}
        found = {leaf: _shape(archive, path, name, sizes[name]) for leaf, name in leaves.items()}

    def shapes(paths: Sequence[str]) -> Mapping[str, jax.ShapeDtypeStruct]:
        for leaf in paths:
            if found[leaf].dtype.kind in "SUMm":
                kind = f"{found[leaf].dtype} in {leaves[leaf]!r}"
                raise ValueError(f"{path} has {kind}, which are no numbers: leave it out with select")
        return {leaf: found[leaf] for leaf in paths}

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        wanted = shapes(paths)
        with reading(path, "npz"), open_archive(path) as archive:
            return {leaf: _array(archive, leaves[leaf], spec) for leaf, spec in wanted.items()}

    return Stored(tuple(leaves), shapes, read, model=model_part(leaves))


def _shape(archive: zipfile.ZipFile, path: Path, name: str, size: int) -> jax.ShapeDtypeStruct:
    with archive.open(name + _ENDING) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{path} has the array {name!r} in version {version} of npy, known are {list(_HEADERS)}")
        shape, _, stored = _HEADERS[version](member)
        dtype: Any = jnp.bfloat16 if stored.kind == "V" and stored.itemsize == 2 else stored
        if stored.hasobject:
            raise ValueError(
                f"{path} has Python objects in {name!r}, which are pickled, and reading a pickle runs code: where you"
                " trust the file, read it there and save its arrays alone"
            )
        if jnp.dtype(dtype).kind == "V" and dtype is not jnp.bfloat16:
            raise ValueError(
                f"{path} has {stored} in {name!r}, which is not a numeric dtype: the array had one that NumPy lacks"
            )
        # Python's integers are unbounded.
        if size - member.tell() != stored.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{path} has {size} bytes for {name!r}, which claims to be {stored}{list(shape)}")
    return jax.ShapeDtypeStruct(shape, dtype)


def _array(archive: zipfile.ZipFile, name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    with archive.open(name + _ENDING) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    return array if array.dtype == spec.dtype else array.view(spec.dtype)  # bfloat16, which is read as V2.


NPZ = Format("npz", _detect, _open)
