"""What the files and folders that options name hold, in few letters: a run is known by that, wherever they lie."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["contents_of"]

_PLACES = ("data_dir",)  # Data sets are kept there; which examples are learned from is a fact of every checkpoint.
_BLOCK, _BLOCKS, _FILES = 2**16, 16, 64
_OF_THE_SOURCE = ("target/params/", "target/model_state/")  # On its own, the source is trained as a target.


def contents_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Returns a digest of what each option holds that is a path of something; nothing of a path of nothing.

    Cheap however large a file is. Of a file, its size and 16 blocks of 64 KiB are read, evenly spread from its first
    byte to its last, which is all of a file of up to 1 MiB. Of a folder, the names and sizes of all files that are not
    hidden, and as much of 64 of them. Of the folder of a run, the digests of every number that its sources have, which
    stand beside their checkpoints, and its vocabulary; its tables and logs may change.
    """
    paths = {name: Path(value) for name, value in options.items() if _is_path(value)}
    return {name: _digest(name, path, options) for name, path in paths.items() if os.path.exists(path)}


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and ("/" in value or os.path.isfile(value)))


def _digest(name: str, path: Path, options: Mapping[str, Any]) -> str:
    if name in _PLACES:
        return "a place"
    if path.is_file():
        parts = _of_file(path)
    elif (path / "checkpoints").is_dir():
        parts = _of_run(path, options["seeds"], every_step=options["source"] == "trajectory")
    else:
        parts = _of_folder(path)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"content {digest.hexdigest()[:16]}"


def _of_file(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{size}\n".encode()
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1) if size > _BLOCK * _BLOCKS else _BLOCK * i)
            yield file.read(_BLOCK)


def _of_folder(path: Path) -> Iterator[bytes]:
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    names = sorted(name for name in files if not any(part.startswith(".") for part in name.split(os.sep)))
    for name in names:
        yield f"{name} {files[name].stat().st_size}\n".encode()
    for name in names[:: -(-len(names) // _FILES) or 1]:
        yield from _of_file(files[name])


def _of_run(path: Path, seeds: int, *, every_step: bool) -> Iterator[bytes]:
    from merge_jax.checkpoints.orbax import Checkpoints

    for cell in (path / "checkpoints" / f"source-seed{seed}" for seed in range(seeds)):
        if cell.is_dir():
            with Checkpoints(cell, read_only=True) as checkpoints:
                for step in checkpoints.steps if every_step else checkpoints.steps[-1:]:
                    leaves = checkpoints.manifest(step).leaves.items()
                    of_source = {leaf: dict(one.sha256) for leaf, one in leaves if leaf.startswith(_OF_THE_SOURCE)}
                    yield json.dumps([cell.name, step, of_source], sort_keys=True).encode()
    vocabulary = path / "vocabulary.json"
    if vocabulary.exists():
        yield vocabulary.read_bytes()
