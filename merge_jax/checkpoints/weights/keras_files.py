"""Keras: `.keras`, `.weights.h5` and the older `.h5`; layers by their names in the model, not by their positions."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.shards import check_shard, index_ending, only_file, read_index, total_size
from merge_jax.checkpoints.weights.archives import member_names, open_archive
from merge_jax.checkpoints.weights.hdf5 import Array, Group, join_groups, read_arrays, read_groups
from merge_jax.checkpoints.weights.keras_layers import (
    SPECTRAL,
    Config,
    class_of,
    name_of,
    scaled_axis,
    spec_of,
    sublayers,
    variables_of,
    wrapped,
)
from merge_jax.checkpoints.weights.stored import Format, Stored, reading
from merge_jax.paths import some_of

__all__ = ["HDF5", "KERAS"]

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_VARIABLES, _LAYERS = "vars", "layers"
_OPTIMIZERS = ("optimizer", "optimizer_weights")
_OLDER, _OLDER_LAYERS, _OLDER_WEIGHTS = "model_weights", "layer_names", "weight_names"
_INDEX, _MAGIC = "*.weights.json", b"\x89HDF\r\n\x1a\n"
_LARGEST_CONFIG = 100_000_000


@dataclass(frozen=True)
class _Variable:
    """A variable of a layer.

    Attributes:
      array: the array in the file.
      path: the path in the model.
      known: whether the whole path comes from the model, and no part from the file.
      kind: its layer's class.
      scale: the divisor of its integers, along an axis; None if they are not scaled.
    """

    array: Array
    path: str
    known: bool
    kind: str
    scale: tuple[Array, int] | None = None

    @property
    def shape(self) -> jax.ShapeDtypeStruct:
        """And its dtype."""
        shape = self.array.shape
        return shape if self.scale is None else jax.ShapeDtypeStruct(shape.shape, np.float32)

    @property
    def parts(self) -> list[Array]:
        """The arrays to read for it."""
        return [self.array] if self.scale is None else [self.array, self.scale[0]]

    def numbers(self, parts: Mapping[Array, np.ndarray]) -> np.ndarray:
        """Returns its numbers of those parts; bfloat16 comes as bytes."""
        array, *scales = (parts[part].view(part.shape.dtype) for part in self.parts)
        if self.scale is None:
            return array
        axes = tuple(axis for axis in range(array.ndim) if axis != self.scale[1])
        return array.astype(np.float32) / np.expand_dims(scales[0].astype(np.float32), axes)


@dataclass(frozen=True)
class _Layer:
    """A layer's position in the model: its class, configuration, and the names leading to it."""

    kind: str
    config: Config | None
    names: tuple[str, ...]
    known: bool


def _detect_keras(path: Path, head: bytes) -> bool:
    names = member_names(path, head)
    return _CONFIG in names and any(name.startswith("model.weights") for name in names)


def _detect_hdf5(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(path.glob(_INDEX))
    return head.startswith(_MAGIC) or index_ending(path, head) == ".h5"


def _open_keras(path: Path) -> Stored:
    with open_archive(path) as archive:
        if _WEIGHTS not in archive.namelist():
            raise ValueError(f"{path} has no {_WEIGHTS}; it holds {some_of(archive.namelist(), 5)}")
        if archive.getinfo(_CONFIG).file_size > _LARGEST_CONFIG:
            raise ValueError(f"{path} claims a {_CONFIG} over the limit of {_LARGEST_CONFIG} bytes")
        with reading(path, "model of Keras"):
            config = json.loads(archive.read(_CONFIG))
    return _open(path, read_groups(path, _WEIGHTS), config if isinstance(config, dict) else None)


def _open_hdf5(path: Path) -> Stored:
    file = only_file(path, path.glob(_INDEX)) or path
    with file.open("rb") as opened:
        is_one = opened.read(len(_MAGIC)) == _MAGIC
    return _open(file, read_groups(file, _WEIGHTS) if is_one else _read_shards(file), None)


def _read_shards(file: Path) -> Group:
    """Returns the groups of all shards of an index, whose names are groups of variables."""
    index, found = read_index(file), []
    for shard in dict.fromkeys(shard for shards in index.values() for shard in shards):
        if not shard.is_file():
            raise FileNotFoundError(f"the file {shard} is missing, which {file} names")
        root = read_groups(shard, _WEIGHTS)
        check_shard(shard, (group.place for group in _groups_of_arrays(root)), index)
        found.append(root)
    sizes = (array.shape for root in found for group in _groups_of_arrays(root) for array in group.arrays.values())
    size, total = sum(leaf.size * leaf.dtype.itemsize for leaf in sizes), total_size(file)
    if total is not None and size < total:  # Keras counts a boolean as a bit.
        raise ValueError(
            f"{file} is of {total} bytes of weights, the shards that it names hold {size}: one is left out"
        )
    return join_groups(found) if found else Group("/", {}, {}, {})


def _groups_of_arrays(group: Group) -> Iterator[Group]:
    """Yields the groups with arrays."""
    if group.arrays:
        yield group
    for inside in group.groups.values():
        yield from _groups_of_arrays(inside)


def _open(path: Path, root: Group, config: Config | None) -> Stored:
    older = root.groups.get(_OLDER, root)
    if _OLDER_LAYERS in older.attributes:
        found = list(_older_variables(older, path))
    else:
        model = Group(root.place, {}, {name: g for name, g in root.groups.items() if name not in _OPTIMIZERS}, {})
        found = list(_variables(model, _Layer("", config, (), known=True)))
    if not found:
        raise ValueError(f"{path} has no weights of Keras: its groups are {some_of(root.groups, 5) or 'none'}")
    counts = Counter(one.path for one in found)
    by_name = {one.path if counts[one.path] == 1 else one.array.place.strip("/"): one for one in found}
    leaves = {leaf: by_name[name] for name, leaf in paths_of(by_name, path).items()}
    unknown = [leaf for leaf, one in leaves.items() if not one.known or counts[one.path] > 1]
    if unknown:
        warnings.warn(
            f"{path} does not store the names of {some_of(unknown, 3)}: they are listed by their position in the "
            "file; a .keras file of Keras's own layers stores them",
            stacklevel=5,
        )
    divided = [leaf.rpartition("/")[0] for leaf, one in leaves.items() if one.kind == SPECTRAL]
    if divided:
        warnings.warn(
            f"{path} has layers of SpectralNormalization, {some_of(divided, 3)}: in training, Keras divides their"
            " kernels by their spectral norm, but fit with JAX stores the undivided ones. They are read as stored:"
            " divide them if the file is of such a model",
            stacklevel=5,
        )
    quantised = [leaf for leaf, one in leaves.items() if one.shape.dtype in (np.int8, np.uint8)]
    if quantised:
        warnings.warn(
            f"{path} has whole numbers of quantised layers in {some_of(quantised, 3)}, which are read as they stand: "
            "save the model before it is quantised (of a .keras file, Dense and Embedding of int8 come as float32;"
            " files of GPTQ and AWQ lack their zero points)",
            stacklevel=5,
        )

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        wanted = [part for leaf in paths for part in leaves[leaf].parts]
        parts = dict(zip(wanted, read_arrays(wanted, _WEIGHTS), strict=True))
        return {leaf: leaves[leaf].numbers(parts) for leaf in paths}

    specs = {leaf: spec_of(one.kind, leaf.rpartition("/")[2], len(one.shape.shape)) for leaf, one in leaves.items()}
    known = {leaf: spec for leaf, spec in specs.items() if spec is not None}
    return Stored(tuple(leaves), lambda paths: {leaf: leaves[leaf].shape for leaf in paths}, read, known)


def _variables(group: Group, layer: _Layer) -> Iterator[_Variable]:
    """Yields the variables of a layer and of its sublayers."""
    own = group.groups.get(_VARIABLES)
    if own is not None:
        places = sorted(own.arrays, key=lambda place: (len(place), place))  # 0, 1, ..., 10.
        if all(map(str.isdecimal, places)) and places != [str(i) for i in range(len(places))]:
            file = own.arrays[places[0]].file
            raise ValueError(f"{file} has the variables {', '.join(places)} of {own.place}, and lacks those between")
        scale = _scale(layer, [own.arrays[place] for place in places])
        places = places if scale is None else places[:-1]
        names = variables_of(layer.kind, layer.config, len(places))
        if scale is None and places and own.arrays[places[0]].shape.dtype == np.int8:
            names = None  # The last is a scale, which may replace a bias.
        known = layer.known and names is not None
        for place, name in zip(places, names or places, strict=True):
            if layer.kind == SPECTRAL and name == "kernel":  # The layer inside stores it again.
                continue
            path = "/".join((*layer.names, name))
            yield _Variable(own.arrays[place], path, known, layer.kind, scale if place == places[0] else None)
    for place, child in group.groups.items():
        if place == _LAYERS:
            configs = sublayers(layer.config)
            for name, inner in child.groups.items():
                config = configs.get(name)
                yield from _variables(inner, _inside(layer, inner, name, class_of(name, config), config))
        elif _VARIABLES in child.groups:
            config = wrapped(layer.config) if place == "layer" else None
            kind = _class_inside(place, layer.kind, child) if config is None else class_of(place, config)
            yield from _variables(child, _inside(layer, child, place, kind, config))
        elif place != _VARIABLES:  # A list of layers, or a layer without variables, which has no name.
            yield from _variables(child, _Layer(layer.kind, None, layer.names, layer.known))


def _scale(layer: _Layer, arrays: Sequence[Array]) -> tuple[Array, int] | None:
    """Returns the divisor of a layer's first variable, and its axis, if `quantize` has scaled it."""
    axis = scaled_axis(layer.kind, layer.config)
    if axis is None or len(arrays) < 2 or arrays[0].shape.dtype != np.int8 or len(arrays[0].shape.shape) != 2:
        return None
    return (arrays[-1], axis) if arrays[-1].shape.shape == arrays[0].shape.shape[axis : axis + 1] else None


def _inside(layer: _Layer, group: Group, place: str, kind: str, config: Config | None) -> _Layer:
    name = _written_name(group) or name_of(config)
    return _Layer(kind, config, (*layer.names, name or place), layer.known and name is not None)


def _class_inside(place: str, parent: str, group: Group) -> str:
    """Returns the class of a layer that is another's attribute, which no configuration names."""
    kind = f"{parent}_cell" if place == "cell" else class_of(place, None)
    names = variables_of(kind, None, len(group.groups[_VARIABLES].arrays))
    name = _written_name(group)
    return kind if names or name is None else class_of(name, None)


def _written_name(group: Group) -> str | None:
    """Returns a layer's name as newer files store it with its variables."""
    name = group.groups[_VARIABLES].attributes.get("name") if _VARIABLES in group.groups else None
    return name if isinstance(name, str) else None


def _older_variables(root: Group, path: Path) -> Iterator[_Variable]:
    """Yields the variables of a Keras 2 or `model.save("x.h5")` file, whose groups have the layers' names."""
    for layer, group in root.groups.items():
        for written in group.attributes.get(_OLDER_WEIGHTS, ()):
            name = written.decode() if isinstance(written, bytes) else str(written)
            *parents, last = name.split("/")
            inner: Group | None = group
            for parent in parents:
                inner = None if inner is None else inner.groups.get(parent)
            if inner is None or last not in inner.arrays:
                raise ValueError(f"{path} lacks the weight {name!r} of the layer {layer!r}")
            # The model's name may precede the layer's.
            bare = name.removesuffix(":0").partition(f"{layer}/")[2] or name.removesuffix(":0")
            yield _Variable(inner.arrays[last], f"{layer}/{bare}", True, class_of(layer, None))


KERAS = Format("Keras", _detect_keras, _open_keras)
HDF5 = Format("HDF5 of Keras", _detect_hdf5, _open_hdf5)
