"""Reads and writes weights in safetensors files, without model code."""

import mmap
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from merge_jax.checkpoints.foreign import explain_unsafe
from merge_jax.checkpoints.names import paths_of, put
from merge_jax.checkpoints.shards import check_shard, only_file, parse_json, read_index
from merge_jax.paths import Pattern, find_paths, flatten
from merge_jax.types import Params

__all__ = [
    "leaf_shapes",
    "load_safetensors",
    "read_leaves",
    "save_safetensors",
    "select_paths",
    "tensor_names",
    "written_by_mlx",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_METADATA = "__metadata__"
_PIECES = "DCP_SHARDING_INFO"  # Where each tensor starts within the whole one, by torch.distributed.checkpoint.
_PART = re.compile(r"shard-\d+(-model-.*)")
_DTYPES = {  # By the format's names.
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def load_safetensors(path: str | os.PathLike[str], *, select: Pattern | Sequence[Pattern] | None = None) -> Params:
    """Returns the tensors of a safetensors file as a parameter tree of NumPy arrays; no model code is needed.

    Names are split at dots, so `encoder.layer.0.attention.self.query.weight` is the leaf
    `encoder/layer/0/attention/self/query/weight`. Torch's layouts, `[out, in]` and `[out, in, kh, kw]`, are unchanged:
    `matrix_spec` recognises them by the name `weight`. Of tied tensors, `save_model` of safetensors stores one, and the
    names of the others in the header: each of these is a leaf too, and the same array.

    The arrays are memory-mapped: values are read on access and use no extra memory. Writes to an array do not reach the
    file; if another program changes the file in place, the arrays change too.

    Args:
      path: a `.safetensors` file, an index of shards (`*.safetensors.index.json`), or a folder with one of them, such
        as a Hugging Face model. Only shards with a selected tensor are opened.
      select: paths or patterns of the tensors to read, over paths with `/`; all by default.

    Raises:
      FileNotFoundError: no such file or folder, no weights in the folder, or a missing shard.
      ValueError: a file that is truncated or not a safetensors file (the message identifies it and says how to convert
        it, if known), a duplicate name, tensors missing from the index or the shards, names that collide as paths, a
        shard outside the folder of its index, or a pattern that matches nothing (near misses are listed).
    """
    return read_leaves(path, select_paths(tensor_names(path), select))


def select_paths(paths: Iterable[str], select: Pattern | Sequence[Pattern] | None) -> list[str]:
    """Returns the paths of a file that match the patterns, each once; all without patterns."""
    if select is None:
        return list(paths)
    patterns = [select] if not isinstance(select, Sequence) or isinstance(select, str) else list(select)
    paths = list(paths)
    return list(dict.fromkeys(path for pattern in patterns for path in find_paths(paths, pattern, role="file")))


def read_leaves(path: str | os.PathLike[str], paths: Iterable[str]) -> Params:
    """Returns a tree of some of the leaves that `load_safetensors` reads, mapped from the file."""
    shard_of, names = _listed(path)
    tree: dict[str, Any] = {}
    by_shard: dict[Path, list[str]] = {}
    for leaf in paths:
        by_shard.setdefault(shard_of[names[leaf]], []).append(leaf)
    for shard, leaves in by_shard.items():
        _check_shard(shard, shard_of)
        header, start = _header(shard)
        with shard.open("rb") as opened:  # Private: writes to an array do not reach the file.
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        for leaf in leaves:
            put(tree, leaf, _tensor(mapped, start, shard, names[leaf], header[names[leaf]]))
    return tree


def tensor_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the name in the file of the tensor of each leaf that `load_safetensors` would read, by path.

    Tied leaves share one.

    Raises:
      FileNotFoundError, ValueError: as `load_safetensors`, but for what only the numbers show.
    """
    return _listed(path)[1]


def leaf_shapes(path: str | os.PathLike[str], leaves: Iterable[str] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of leaves that `load_safetensors` would read, by path, from the headers alone.

    Args:
      path: as `load_safetensors`.
      leaves: their paths; all by default. Only shards with one of them are opened.

    Raises:
      FileNotFoundError, ValueError: as `load_safetensors`, but for what only the numbers show.
    """
    shard_of, names = _listed(path)
    wanted = {leaf: names[leaf] for leaf in (names if leaves is None else leaves)}
    headers = {}
    for shard in dict.fromkeys(shard_of[name] for name in wanted.values()):
        _check_shard(shard, shard_of)
        headers[shard] = _header(shard)[0]
    return {leaf: _shape(shard_of[name], name, headers[shard_of[name]][name]) for leaf, name in wanted.items()}


def written_by_mlx(path: str | os.PathLike[str]) -> bool:
    """Returns whether MLX wrote the file, or the first shard of an index.

    `save_safetensors` of MLX writes null for missing strings, which the library of the format does not; mlx-lm writes
    its name.
    """
    shard_of, _ = _listed(path)
    header = _header(next(iter(shard_of.values())))[0] if shard_of else {}
    strings = header.get(_METADATA, {})
    return strings is None or (isinstance(strings, dict) and strings.get("format") == "mlx")


def _listed(path: str | os.PathLike[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the shard of each tensor by name, and the name of each leaf by path."""
    file = _weights_file(Path(path))
    if file.suffix == ".json":
        shard_of, strings = _read_index(file), parse_json(file.read_text("utf-8"), file).get("metadata")
    else:
        header = _checked_header(file)
        strings = header.pop(_METADATA, None)
        _check_whole(file, strings)
        shard_of = dict.fromkeys(header, file)
    # Of tied tensors, save_model of safetensors stores one; the strings map the others' names to it.
    pairs = strings.items() if isinstance(strings, dict) else ()
    tied = {name: kept for name, kept in pairs if name not in shard_of and isinstance(kept, str) and kept in shard_of}
    return shard_of, {path: tied.get(name, name) for name, path in paths_of([*shard_of, *tied], file).items()}


def save_safetensors(
    path: str | os.PathLike[str],
    params: Params,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a parameter tree to a safetensors file; leaf names are paths with dots: `fc/kernel` as `fc.kernel`.

    A tree from `load_safetensors` is written under its original names and in its original layout. The file is written
    atomically, with the permissions of the umask.

    Args:
      path: the file.
      params: a pytree of arrays: booleans, 8 to 64-bit integers, 8 to 64-bit floats or complex64.
      metadata: strings for the file's header; `transformers` requires `{"format": "pt"}` in files of its models.
      overwrite: whether to replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is not set.
      ValueError: a leaf that is not an array or has another dtype, such as a random key; a tree that is a single array,
        or whose names could not be read back (an empty key, `__metadata__`, a path inside another, too many levels); or
        metadata that are not strings.
    """
    if metadata is not None and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata are strings by name, got {dict(metadata)}")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists; pass overwrite=True to replace it")
    arrays = {}
    for name, leaf in flatten(params).items():
        if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
            raise ValueError(
                f"the leaf {name!r} must be an array, got {type(leaf).__name__}: give its numbers (numpy.asarray), or"
                " leave it out"
            )
        if str(leaf.dtype) not in _DTYPES.values():
            raise ValueError(
                f"the leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, which a safetensors file cannot hold; it holds"
                f" {', '.join(_DTYPES.values())}. Convert it, or leave it out: of an NNX module, nnx.state(module,"
                " (nnx.Param, nnx.BatchStat)) has no random keys"
            )
        arrays[name.replace("/", ".")] = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    if _METADATA in arrays:
        raise ValueError(f"no leaf of a safetensors file can be named {_METADATA!r}, which holds the file's strings")
    paths_of(arrays, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # As set by the umask; the library uses 0600.
        save_file(arrays, temporary, metadata=None if metadata is None else dict(metadata))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _weights_file(path: Path) -> Path:
    """Returns the weight file for a path."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir():
        return path
    for name in (_INDEX, _SINGLE):
        if (path / name).exists():
            return path / name
    file = only_file(path, list(path.glob("*.safetensors.index.json")) or path.glob("*.safetensors"))
    if file is None:
        known = explain_unsafe(path)
        raise FileNotFoundError(
            f"the folder {path} has neither {_INDEX} nor a .safetensors file{known and f': {known}'}"
        )
    return file


def _read_index(file: Path) -> dict[str, Path]:
    """Returns the shard of each tensor by name."""
    return {name: shard for name, (shard,) in read_index(file, single=True).items()}


def _check_shard(shard: Path, shard_of: Mapping[str, Path]) -> None:
    names = [name for name in _checked_header(shard) if name != _METADATA]
    check_shard(shard, names, {name: (file,) for name, file in shard_of.items()})


def _check_whole(file: Path, strings: Any) -> None:
    """Raises ValueError for one process's part of a distributed checkpoint, whose tensors are pieces."""
    if not isinstance(strings, dict) or not isinstance(pieces := strings.get(_PIECES), str):
        return
    starts = [piece.get("saved_offsets") for piece in parse_json(pieces, file).values() if isinstance(piece, dict)]
    later = any(isinstance(start, list) and any(start) for start in starts)
    name = _PART.fullmatch(file.name)  # The first piece starts at zero, like a whole tensor.
    if later or (name and len(list(file.parent.glob(f"shard-*{name[1]}"))) > 1):
        raise ValueError(
            f"{file} is one process's part of a checkpoint of torch.distributed.checkpoint: its tensors are pieces."
            " Save it with HuggingFaceStorageWriter(..., save_distributed=True, enable_consolidation=True), or load all"
            " parts with HuggingFaceStorageReader"
        )


def _checked_header(file: Path) -> dict[str, Any]:
    """Returns the header of a file, after the library has checked it."""
    with _opened(file):
        pass
    return _header(file)[0]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a file that the library has checked, and the offset of the data."""
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        # If two tensors share a name, the library silently uses the last.
        return parse_json(handle.read(size).decode("utf-8"), file), 8 + size


def _opened(file: Path) -> Any:
    if not os.path.exists(file):  # Path.exists raises for names that the file system rejects.
        raise FileNotFoundError(f"the file {file} is missing")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        if known := explain_unsafe(file):
            raise ValueError(f"{file} is no safetensors file: {known}") from None
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None


def _shape(shard: Path, name: str, entry: Any) -> jax.ShapeDtypeStruct:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"the tensor {name!r} of {shard} cannot be read: it is {entry['dtype']}, known are {', '.join(_DTYPES)}"
        )
    return jax.ShapeDtypeStruct(tuple(map(int, entry["shape"])), np.dtype(_DTYPES[entry["dtype"]]))


def _tensor(mapped: mmap.mmap, start: int, shard: Path, name: str, entry: Any) -> np.ndarray:
    """Returns a tensor as a view of the mapped file: values are read only on access."""
    spec = _shape(shard, name, entry)
    if spec.size == 0:
        return np.empty(spec.shape, spec.dtype)
    try:
        array = np.ndarray(spec.shape, spec.dtype, mapped, start + int(entry["data_offsets"][0]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the tensor {name!r} of {shard} cannot be read: {error}") from None
    return array if array.flags.aligned else array.copy()
