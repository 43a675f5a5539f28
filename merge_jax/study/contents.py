"""What a run is: its options, and what the files and folders that they name hold, wherever these lie."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_jax.study.config import RunConfig, run_options

__all__ = ["contents_of", "current_options", "run_identity"]

# Options of version 0.1 that are gone, by the value that stands for what this version does.
_REMOVED = {"vectorized": False, "cycle_end": None, "gate": "learned", "max_width": 512}

_RENAMED = {"view": "compare_on"}

# Options of transfers that are new, by the value that stands for what was done before.
_ADDED = {"routes": ["**=**"], "unlabelled": 0, "head_first": False, "target_rate": 1.0}

_PLACES = ("data_dir",)  # Data sets are kept there; which examples are learned from is a fact of every checkpoint.
_BLOCK, _BLOCKS, _FILES = 2**16, 16, 64
_SOURCE_LEAVES = ("target/params/", "target/model_state/")  # On its own, the source is trained as a target.


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Returns what a run is; with anything other, it is another run.

    That is its options, and under `contents` what those hold that are paths, by which a run folder knows them
    wherever they lie; see `contents_of`.

    Raises:
      ValueError: the folder of a run is named whose checkpoints are damaged.
    """
    options = run_options(config)
    contents = contents_of(options)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return options | ({"contents": contents} if contents else {})


def current_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the saved options of a run as options of this version; what it cannot do stays, and shows as a change.

    A run of version 0.1 with a method of MergeNet is one of them: the same names mean other forms now.
    """
    options = {
        _RENAMED.get(name, name): value for name, value in saved.items() if (name, value) not in _REMOVED.items()
    }
    if "agreement" in options:
        options = _ADDED | options
    if not any(method.startswith("mergenet") for method in saved.get("methods", ())):
        options.pop("output", None)
    return options


def contents_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Returns a digest of the contents of each option that is a path of something that exists.

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
        parts = _file_parts(path)
    elif (path / "checkpoints").is_dir():
        parts = _run_parts(path, options["seeds"], every_step=options["source"] == "trajectory")
    else:
        parts = _folder_parts(path)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"content {digest.hexdigest()[:16]}"


def _file_parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{size}\n".encode()
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1) if size > _BLOCK * _BLOCKS else _BLOCK * i)
            yield file.read(_BLOCK)


def _folder_parts(path: Path) -> Iterator[bytes]:
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    names = sorted(name for name in files if not any(part.startswith(".") for part in name.split(os.sep)))
    for name in names:
        yield f"{name} {files[name].stat().st_size}\n".encode()
    for name in names[:: -(-len(names) // _FILES) or 1]:
        yield from _file_parts(files[name])


def _run_parts(path: Path, seeds: int, *, every_step: bool) -> Iterator[bytes]:
    from merge_jax.checkpoints.orbax import Checkpoints

    for folder in (path / "checkpoints" / f"source-seed{seed}" for seed in range(seeds)):
        if folder.is_dir():
            with Checkpoints(folder, read_only=True) as checkpoints:
                for step in checkpoints.steps if every_step else checkpoints.steps[-1:]:
                    leaves = checkpoints.manifest(step).leaves.items()
                    digests = {name: dict(leaf.sha256) for name, leaf in leaves if name.startswith(_SOURCE_LEAVES)}
                    yield json.dumps([folder.name, step, digests], sort_keys=True).encode()
    vocabulary = path / "vocabulary.json"
    if vocabulary.exists():
        yield vocabulary.read_bytes()
