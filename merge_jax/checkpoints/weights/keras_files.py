"""Keras: `.keras`, `.weights.h5` and the older `.h5`; layers by their names in the model, not by their places."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checkpoints.names import paths_of
from merge_jax.checkpoints.weights.archives import member_names, open_archive
from merge_jax.checkpoints.weights.keras_layers import Config, class_of, spec_of, sublayers, variables_of
from merge_jax.checkpoints.weights.stored import Format, Stored, needing, reading
from merge_jax.paths import some_of

__all__ = ["HDF5", "KERAS"]

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_VARIABLES, _LAYERS = "vars", "layers"
_OPTIMIZERS = ("optimizer", "optimizer_weights")
_LARGEST_RATIO = 1032  # As of a zip; HDF5 compresses no better.
_LARGEST_CONFIG = 100_000_000


@dataclass(frozen=True)
class _Variable:
    """A variable of a layer: its place in the file, its path in the model, and the class of its layer."""

    place: str
    path: str
    known: bool
    kind: str


def _detect_keras(path: Path, head: bytes) -> bool:
    names = member_names(path, head)
    return _CONFIG in names and any(name.startswith("model.weights") for name in names)


def _detect_hdf5(path: Path, head: bytes) -> bool:
    del path
    return head.startswith(b"\x89HDF\r\n\x1a\n")


def _open_keras(path: Path) -> Stored:
    with open_archive(path) as archive:
        if _WEIGHTS not in archive.namelist():
            raise ValueError(f"{path} has no {_WEIGHTS}; it holds {some_of(archive.namelist(), 5)}")
        if archive.getinfo(_CONFIG).file_size > _LARGEST_CONFIG:
            raise ValueError(f"{path} claims a {_CONFIG} over the limit of {_LARGEST_CONFIG} bytes")
        with reading(path, "model of Keras"):
            config = json.loads(archive.read(_CONFIG))
    return _open(path, config if isinstance(config, dict) else None)


def _open_hdf5(path: Path) -> Stored:
    return _open(path, None)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens the HDF5 file that a path is, or that is in the archive of a `.keras` file."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]  # Not at the top: it is optional.
    except ImportError:
        raise needing(path, "h5py", "keras") from None
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    with reading(path, "HDF5 file of Keras"):
        if not is_archive:
            with h5py.File(path) as opened:
                yield opened
            return
        with open_archive(path) as archive, archive.open(_WEIGHTS) as member, h5py.File(member) as opened:
            yield opened


def _open(path: Path, config: Config | None) -> Stored:
    with _opened(path) as file:
        found = list(_older_variables(file, path) if _is_older(file) else _variables(file, config, path))
        if not found:
            raise ValueError(f"{path} has no weights of Keras: its groups are {some_of(file, 5) or 'none'}")
        counts = Counter(variable.path for variable in found)
        by_name = {one.path if counts[one.path] == 1 else one.place: one for one in found}
        leaves = {leaf: by_name[name] for name, leaf in paths_of(by_name, path).items()}
        shapes = {leaf: _shape(file[one.place], path) for leaf, one in leaves.items()}
    unknown = [leaf for leaf, one in leaves.items() if not one.known or counts[one.path] > 1]
    if unknown:
        warnings.warn(
            f"{path} does not tell the names of {some_of(unknown, 3)}: they stand under their places in the file; a"
            " .keras file of layers that are Keras's own tells them",
            stacklevel=5,
        )
    specs = {
        leaf: spec_of(one.kind, one.path.rpartition("/")[2], len(shapes[leaf].shape)) for leaf, one in leaves.items()
    }

    def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
        with _opened(path) as file:
            arrays = {leaf: np.asarray(file[leaves[leaf].place]) for leaf in paths}
        # bfloat16 lies in the file as two bytes of no type.
        return {leaf: array.view(shapes[leaf].dtype) for leaf, array in arrays.items()}

    known = {leaf: spec for leaf, spec in specs.items() if spec is not None}
    return Stored(tuple(leaves), lambda paths: {leaf: shapes[leaf] for leaf in paths}, read, known)


def _variables(
    group: Any, config: Config | None, path: Path, names: tuple[str, ...] = (), known: bool = True, kind: str = ""
) -> Iterator[_Variable]:
    """Yields the variables in a group of a layer, and of those in it."""
    children = dict(_children(group, path))
    own = dict(_children(children.pop(_VARIABLES), path)) if _VARIABLES in children else {}
    places = sorted(own, key=lambda place: (len(place), place))
    called = variables_of(kind, config, len(own))
    for i, place in enumerate(places):
        name = place if called is None else called[i]
        whole = known and called is not None
        yield _Variable(own[place].name, "/".join((*names, name)), whole, kind)
    if not names:
        children = {name: child for name, child in children.items() if name not in _OPTIMIZERS}
    for name, child in children.items():
        if _is_dataset(child):
            raise ValueError(f"{path} has the array {child.name!r} where a layer should be: it is no file of Keras")
        if name == _LAYERS:
            within = sublayers(config)
            for place, layer in _children(child, path):
                yield from _layer(
                    layer, place, within.get(place), path, names, known, class_of(place, within.get(place))
                )
        elif _VARIABLES in child:
            yield from _layer(child, name, None, path, names, known, _inner_class(name, kind, child))
        else:  # A list of layers, or a layer without a name.
            yield from _variables(child, None, path, names, known, kind)


def _layer(
    group: Any, place: str, config: Config | None, path: Path, names: tuple[str, ...], known: bool, kind: str
) -> Iterator[_Variable]:
    written = group[_VARIABLES].attrs.get("name") if _VARIABLES in group else None
    options = (config or {}).get("config")
    told = options.get("name") if isinstance(options, Mapping) else None
    name = written if isinstance(written, str) else told
    # A slash in a name would be a level of its own.
    yield from _variables(group, config, path, (*names, str(name or place)), known and name is not None, kind)


def _inner_class(name: str, parent: str, group: Any) -> str:
    """Returns the class of a layer that is an attribute of another, which no configuration names."""
    kind = class_of(name, None)
    if kind == "cell":
        kind = f"{parent}_cell"
    written = group[_VARIABLES].attrs.get("name")
    return (
        kind
        if variables_of(kind, None, len(group[_VARIABLES])) or not isinstance(written, str)
        else class_of(written, None)
    )


def _is_older(file: Any) -> bool:
    return "layer_names" in file.attrs or ("model_weights" in file and "layer_names" in file["model_weights"].attrs)


def _older_variables(file: Any, path: Path) -> Iterator[_Variable]:
    """Yields the variables of a file of Keras 2, or of `model.save("x.h5")`, whose groups have the layers' names."""
    root = file.get("model_weights", file)
    for layer, group in _children(root, path):
        for written in group.attrs.get("weight_names", ()):
            name = written.decode() if isinstance(written, bytes) else str(written)
            leaf, at = group, ""
            for part in name.split("/"):
                children = dict(_children(leaf, path))
                if part not in children:
                    raise ValueError(f"{path} lacks the weight {name!r} of the layer {layer!r}")
                leaf, at = children[part], f"{at}/{part}"
            # Before the layer's own name may be that of the model.
            bare = name.removesuffix(":0").partition(f"{layer}/")[2] or name.removesuffix(":0")
            yield _Variable(leaf.name, f"{layer}/{bare}", True, class_of(layer, None))


def _children(group: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields what is in a group; raises ValueError for a link, which may lead into another file."""
    if _is_dataset(group):
        raise ValueError(f"{path} has the array {group.name!r} where a group should be: it is no file of Keras")
    for name in group:
        link = group.get(name, getlink=True)
        if type(link).__name__ != "HardLink":
            raise ValueError(f"{path} has the link {name!r} in {group.name!r}, which may lead into another file")
        yield name, group[name]


def _is_dataset(node: Any) -> bool:
    return hasattr(node, "shape")


def _shape(dataset: Any, path: Path) -> jax.ShapeDtypeStruct:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{path} has the numbers of {dataset.name!r} in another file")
    is_bfloat16 = dataset.dtype == "V2" and dataset.attrs.get("dtype") == "bfloat16"
    if dataset.dtype.kind not in "biufc" and not is_bfloat16:
        raise ValueError(f"{path} has {dataset.dtype} in {dataset.name!r}, which are no numbers")
    size = dataset.dtype.itemsize * int(np.prod(dataset.shape, dtype=object))
    if size > _LARGEST_RATIO * dataset.id.get_storage_size() + 100:
        raise ValueError(f"{path} claims {size} bytes for {dataset.name!r}, which it does not hold")
    return jax.ShapeDtypeStruct(dataset.shape, jnp.bfloat16 if is_bfloat16 else dataset.dtype)


KERAS = Format("Keras", _detect_keras, _open_keras)
HDF5 = Format("HDF5 of Keras", _detect_hdf5, _open_hdf5)
