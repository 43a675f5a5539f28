"""Weights in safetensors files: any model's, without its code; and a merged target back into such a file."""

import json
import os
import stat
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from merge_jax.checkpoints.formats import explain_file, explain_folder
from merge_jax.paths import Pattern, find_paths, flatten, near_misses, some_of
from merge_jax.types import Params

__all__ = [
    "leaf_paths",
    "leaf_shapes",
    "load_params",
    "load_safetensors",
    "paths_of",
    "put",
    "read_json",
    "save_safetensors",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_METADATA = "__metadata__"
_DEEPEST = 100  # Parts of a name; a tree of thousands of levels would end the program.
# By the names of files; NumPy has no float8 of its own, so that the library leaves them to us to read.
_FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64", "complex64", *_FLOAT8.values()),
)


def load_safetensors(path: str | os.PathLike[str], *, select: Pattern | Sequence[Pattern] | None = None) -> Params:
    """Returns the tensors of a safetensors file as a parameter tree of NumPy arrays; no model code is needed.

    A name is split at its dots, so `encoder.layer.0.attention.self.query.weight` is the leaf
    `encoder/layer/0/attention/self/query/weight`. Torch's layouts, `[out, in]` and `[out, in, kh, kw]`, stay as they
    are: `matrix_spec` knows them by the name `weight`.

    Args:
      path: a `.safetensors` file, an index of shards (`*.safetensors.index.json`), or a folder that has one of
        them, as Hugging Face models do. Only the shards that hold a selected tensor are opened.
      select: paths or patterns of the tensors to read, over paths with `/`; all by default.

    Raises:
      FileNotFoundError: no such file or folder, no weights in the folder, or a shard that is missing.
      ValueError: a file that is truncated or otherwise no safetensors file (the message says what it is and how it
        becomes one, where that is known), a name that stands twice, tensors that the index names and the shards lack,
        or the other way round, names that collide as paths, a shard outside the folder of its index, or a pattern that
        names nothing (near misses are listed).
    """
    shard_of, names = _listed(path)
    if select is None:
        chosen = list(names)
    else:
        patterns = [select] if not isinstance(select, Sequence) or isinstance(select, str) else list(select)
        chosen = [path for pattern in patterns for path in find_paths(names, pattern, role="file")]
    tree: dict[str, Any] = {}
    by_shard: dict[Path, list[str]] = {}
    for path in dict.fromkeys(chosen):
        by_shard.setdefault(shard_of[names[path]], []).append(path)
    for shard, paths in by_shard.items():
        _check_shard(shard, shard_of)
        with _opened(shard) as tensors:
            for path in paths:
                put(tree, path, _tensor(tensors, shard, names[path]))
    return tree


def leaf_paths(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the paths of the leaves that `load_safetensors` would read, from the headers alone.

    Raises:
      FileNotFoundError, ValueError: as `load_safetensors`, but for what only the numbers show.
    """
    return tuple(_listed(path)[1])


def leaf_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each leaf that `load_safetensors` would read, by path, from the headers alone.

    Raises:
      FileNotFoundError, ValueError: as `load_safetensors`, but for what only the numbers show.
    """
    shard_of, names = _listed(path)
    headers = {shard: _header(shard)[0] for shard in dict.fromkeys(shard_of.values())}
    return {path: tuple(map(int, headers[shard_of[name]][name]["shape"])) for path, name in names.items()}


def _listed(path: str | os.PathLike[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the shard of each tensor by its name, and the name of each leaf by its path."""
    file = _weights_file(Path(path))
    shard_of = _read_index(file) if file.suffix == ".json" else dict.fromkeys(_names(file), file)
    return shard_of, {path: name for name, path in paths_of(shard_of, file).items()}


def load_params(path: str | os.PathLike[str], like: Params) -> Params:
    """Returns the parameters of a model from a file that `save_safetensors` wrote, in the structure of `like`.

    Args:
      path: as `load_safetensors`.
      like: the model's parameters as they start, or their shapes.

    Raises:
      FileNotFoundError, ValueError: as `load_safetensors`; the file has other leaves, shapes or dtypes than the
        model (the first three are named).
    """
    # A key of `like` may have dots of its own, which a file does not tell from those between keys.
    found = flatten(load_safetensors(path))
    wanted = {name.replace(".", "/"): leaf for name, leaf in flatten(like).items()}
    problems = [f"{name} is missing; {near_misses(name, found)}" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is there, but not in the model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        there, here = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (found[name], wanted[name]))
        if there != here:
            problems.append(f"{name} is {there}, the model's is {here}")
    if problems:
        there, here = (sum(np.size(leaf) for leaf in leaves.values()) for leaves in (found, wanted))
        listed = some_of(sorted(problems), 3, "; ")
        raise ValueError(
            f"{path} does not fit the model: {listed} ({there:,} numbers in the file, {here:,} in the model)"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def save_safetensors(
    path: str | os.PathLike[str],
    params: Params,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a parameter tree to a safetensors file, each leaf by its path with dots: `fc/kernel` as `fc.kernel`.

    What `load_safetensors` gave goes back under its own names and in its own layout. The file is written
    atomically, with the permissions that the umask gives.

    Args:
      path: of the file.
      params: a pytree of arrays of booleans, whole numbers of 8 to 64 bits, floats of 8 to 64 bits or complex64.
      metadata: strings for the file's header; `transformers` asks for `{"format": "pt"}` in files of its models.
      overwrite: whether a file that is there is replaced.

    Raises:
      FileExistsError: the file is there and `overwrite` is not set.
      ValueError: a leaf that is no array or has another dtype, such as a random key; a tree that is one array, or
        whose names could not be read back (an empty key, `__metadata__`, a path inside of another, too many levels);
        or metadata that are no strings.
    """
    if metadata is not None and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata are strings by name, got {dict(metadata)}")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; give overwrite=True to replace it")
    arrays = {}
    for name, leaf in flatten(params).items():
        if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
            raise ValueError(
                f"the leaf {name!r} must be an array, got {type(leaf).__name__}: give its numbers (numpy.asarray), or"
                " leave it out"
            )
        if str(leaf.dtype) not in _DTYPES:
            raise ValueError(
                f"the leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, which a safetensors file cannot hold; it holds"
                f" {', '.join(_DTYPES)}. Convert it, or leave it out: of an NNX module, nnx.state(module, (nnx.Param,"
                " nnx.BatchStat)) has no random keys"
            )
        arrays[name.replace("/", ".")] = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    if _METADATA in arrays:
        raise ValueError(f"no leaf of a safetensors file can be named {_METADATA!r}, which holds the file's strings")
    paths_of(arrays, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # As the umask gives it; the library's own is 0600.
        save_file(arrays, temporary, metadata=None if metadata is None else dict(metadata))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _weights_file(path: Path) -> Path:
    """Returns the file that a path stands for."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir():
        return path
    for name in (_INDEX, _SINGLE):
        if (path / name).exists():
            return path / name
    files = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if not files:
        known = explain_folder(path)
        raise FileNotFoundError(
            f"the folder {path} has neither {_INDEX} nor a .safetensors file{known and f': {known}'}"
        )
    if len(files) > 1:
        raise ValueError(
            f"the folder {path} has several files of weights, name one: {', '.join(f.name for f in files)}"
        )
    return files[0]


def _read_index(file: Path) -> dict[str, Path]:
    """Returns the shard of each tensor by name."""
    try:
        weight_map = _json(file.read_text("utf-8"), file)["weight_map"]
        if not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise TypeError
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{file} is no index of shards: it needs a 'weight_map' of names to files") from None
    for shard in dict.fromkeys(weight_map.values()):
        # By its name alone: the files of a downloaded model are often links to a common store.
        paths = (PurePosixPath(shard), PureWindowsPath(shard))
        if not paths[0].parts or any(p.is_absolute() or p.drive or ".." in p.parts for p in paths):
            raise ValueError(f"{file} names the shard {shard!r}, which is not inside its folder")
    return {name: file.parent / shard for name, shard in weight_map.items()}


def _check_shard(shard: Path, shard_of: Mapping[str, Path]) -> None:
    """Raises ValueError where a shard does not hold just what is expected of it."""
    found, expected = set(_names(shard)), {name for name, file in shard_of.items() if file == shard}
    if missing := sorted(expected - found):
        raise ValueError(f"{shard} lacks the tensor {missing[0]!r}; {near_misses(missing[0], found)}")
    if surplus := sorted(found - expected):
        where = f"the index has it in {shard_of[surplus[0]].name}" if surplus[0] in shard_of else "the index has it not"
        raise ValueError(f"{shard} holds the tensor {surplus[0]!r}, but {where}")


def _names(file: Path) -> list[str]:
    """Returns the names of a file's tensors, after the library has checked its header."""
    with _opened(file):
        pass
    return [name for name in _header(file)[0] if name != _METADATA]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a file that the library has checked, and where the numbers begin."""
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        # The library takes the last of two tensors of one name without a word.
        return _json(handle.read(size).decode("utf-8"), file), 8 + size


def _opened(file: Path) -> Any:
    if not os.path.exists(file):  # Path.exists raises for names that the disk does not take.
        raise FileNotFoundError(f"the file {file} is missing")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        if known := explain_file(file):
            raise ValueError(f"{file} is no safetensors file: {known}") from None
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None


def _tensor(tensors: Any, file: Path, name: str) -> np.ndarray:
    try:
        stored = tensors.get_slice(name)
        if stored.get_dtype() not in _FLOAT8:
            return tensors.get_tensor(name)
        header, start = _header(file)
        dtype, (first, end) = np.dtype(_FLOAT8[stored.get_dtype()]), map(int, header[name]["data_offsets"])
        return np.fromfile(file, dtype, end - first, offset=start + first).reshape(stored.get_shape())
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the tensor {name!r} of {file} cannot be read: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file beside weights holds; raises ValueError where it is none."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _json(text: str, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file} has the name {twice!r} twice")
        return entries

    try:
        # No number is read of it, and Python reads none of thousands of digits.
        return json.loads(text, object_pairs_hook=unique, parse_int=float)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf into a tree of dicts, and makes what is around it."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def paths_of(names: Iterable[str], file: Path) -> dict[str, str]:
    """Returns the path of each name, checked to be leaves of one tree."""
    paths: dict[str, str] = {}
    for name in names:
        path = name.replace(".", "/")
        if not all(path.split("/")):
            raise ValueError(f"{file} has the tensor {name!r}, whose name has an empty part")
        if (depth := path.count("/") + 1) > _DEEPEST:
            raise ValueError(f"{file} has a tensor whose name has {depth} parts, over the limit of {_DEEPEST}")
        if path in paths:
            raise ValueError(f"{file} has the tensors {paths[path]!r} and {name!r}, which are one path")
        paths[path] = name
    for path, name in paths.items():
        parents = path.split("/")[:-1]
        for i in range(1, len(parents) + 1):
            parent = "/".join(parents[:i])
            if parent in paths:
                raise ValueError(f"{file} has the tensors {paths[parent]!r} and {name!r}, one inside the other")
    return {name: path for path, name in paths.items()}
