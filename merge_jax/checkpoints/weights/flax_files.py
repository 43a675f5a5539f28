"""Flax: a tree or a whole training state in msgpack, as written by `flax.serialization.to_bytes`."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from merge_jax.checkpoints.names import check_paths, leaves_of
from merge_jax.checkpoints.weights.stored import Format, Stored, reading
from merge_jax.checkpoints.weights.training_state import model_part

__all__ = ["FLAX"]

# The extension types and the keys of chunked arrays, from flax/serialization.py.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_IN_PARTS, _SHAPE, _PARTS = "__msgpack_chunked_array__", "shape", "chunks"


def _detect(path: Path, head: bytes) -> bool:
    del path
    return len(head) > 1 and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))  # A non-empty map.


def _open(path: Path) -> Stored:
    shapes = _leaves(path, _shape)
    check_paths({leaf: leaf for leaf in shapes}, path)

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        leaves = _leaves(path, _array)
        return {leaf: leaves[leaf] for leaf in paths}

    return Stored(tuple(shapes), lambda paths: {leaf: shapes[leaf] for leaf in paths}, read, model=model_part(shapes))


def _leaves(path: Path, extension: Callable[[bytes], Any]) -> dict[str, Any]:
    """Returns the leaves of a file, each converted from its bytes by the function."""

    def unpacked(code: int, content: bytes) -> Any:
        if code == _COMPLEX:
            return np.asarray(complex(*msgpack.unpackb(content)))
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"an extension of the kind {code}, which Flax does not have")
        return extension(content)

    def collected(pairs: list[tuple[Any, Any]]) -> Any:
        entries = {str(name): value for name, value in pairs}
        if len(entries) < len(pairs):
            names = [str(name) for name, _ in pairs]
            raise ValueError(f"{path} has the name {next(name for name in names if names.count(name) > 1)!r} twice")
        return _whole(entries) if _IN_PARTS in entries else entries

    with reading(path, "msgpack of Flax"):
        tree = msgpack.unpackb(
            path.read_bytes(), ext_hook=unpacked, object_pairs_hook=collected, raw=False, strict_map_key=False
        )
    leaves = leaves_of(tree, path)
    for name, leaf in leaves.items():
        if not isinstance(leaf, bool | int | float | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"{path} has {leaf!r:.40} at {name!r}, where an array should be")
    return {name: np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf for name, leaf in leaves.items()}


def _array(content: bytes) -> np.ndarray:
    shape, dtype, numbers = msgpack.unpackb(content, raw=True)
    return np.frombuffer(numbers, _dtype(dtype)).reshape(shape)


def _shape(content: bytes) -> jax.ShapeDtypeStruct:
    shape, dtype, numbers = msgpack.unpackb(content, raw=True)
    spec = jax.ShapeDtypeStruct(tuple(shape), _dtype(dtype))
    if len(numbers) != spec.dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ValueError(f"{len(numbers)} bytes for {spec.dtype}{list(spec.shape)}")
    return spec


def _dtype(name: bytes) -> np.dtype:
    dtype = jnp.dtype("bfloat16" if name == b"V2" else name.decode())  # An older writer's name for it.
    if dtype.hasobject:
        raise ValueError("Python objects instead of numbers")
    return dtype


def _whole(entries: dict[str, Any]) -> Any:
    """Returns an array, or its shape, that Flax has split into chunks of a gigabyte."""
    shape, parts = (tuple(entries[name][str(i)] for i in range(len(entries[name]))) for name in (_SHAPE, _PARTS))
    if isinstance(parts[0], jax.ShapeDtypeStruct):
        if sum(part.size for part in parts) != math.prod(shape):
            raise ValueError(f"parts of {sum(part.size for part in parts)} numbers for the shape {list(shape)}")
        return jax.ShapeDtypeStruct(shape, parts[0].dtype)
    return np.concatenate(parts).reshape(shape)


FLAX = Format("Flax msgpack", _detect, _open)
