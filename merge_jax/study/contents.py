"""The identity of a run: its options, and the contents of files and folders that they name, at any path."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_jax.study.config import RunConfig, run_options

__all__ = ["contents_of", "current_options", "extended_options", "run_identity"]

# Options removed since version 0.1, with the value that matches this version's behaviour.
_REMOVED = {"vectorized": False, "cycle_end": None, "gate": "learned", "max_width": 512}

_RENAMED = {"view": "compare_on"}

# New options of transfers, with the value that matches the previous behaviour.
_ADDED = {"routes": ["**=**"], "unlabelled": 0, "head_first": False, "head_floor": 0.0, "target_rate": 1.0}

_PLACES = ("data_dir",)  # Data sets are stored there; every checkpoint records which examples were used for training.
_BLOCK, _BLOCKS, _FILES = 2**16, 16, 64
_SOURCE_LEAVES = ("target/params/", "target/model_state/")  # Pre-training trains the source as a target.


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Returns the identity of a run; any change makes it another run.

    It consists of the options and, under `contents`, digests of those that are paths, so that moved files are
    recognised; see `contents_of`.

    Raises:
      ValueError: an option names a run folder with damaged checkpoints.
    """
    options = run_options(config)
    contents = contents_of(options)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return options | ({"contents": contents} if contents else {})


def current_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's saved options as options of this version; unsupported ones stay, and count as changes.

    An example is a run of version 0.1 with a MergeNet method: the same names now mean other forms.
    """
    options = {
        _RENAMED.get(name, name): value for name, value in saved.items() if (name, value) not in _REMOVED.items()
    }
    options.setdefault("first_seed", 0)
    if "agreement" in options:
        options = _ADDED | options
    if not any(method.startswith("mergenet") for method in saved.get("methods", ())):
        options.pop("output", None)
    return options


def extended_options(saved: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Returns a run's saved options as options of this version, with the seeds and methods that a config adds.

    Each seed of a method has its own result, so a resumed run may add both: the results that it has stay the same.
    """
    options, given = current_options(saved), run_options(config)
    if set(options.get("methods", ())) <= set(given["methods"]):
        options["methods"] = list(given["methods"])
    before = options.get("seeds", config.seeds)
    if before < config.seeds:
        options["seeds"] = config.seeds
        # A source that is a run has a digest of as many seeds.
        if options.get("contents") == contents_of(given | {"seeds": before}):
            options["contents"] = contents_of(given)
    return options


def contents_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Returns a digest of the contents of each option that is a path of something that exists.

    This is cheap for files of any size. For a file, it reads the size and 16 blocks of 64 KiB, evenly spread from the
    first byte to the last, which covers files of up to 1 MiB. For a folder, it reads the names and sizes of all files
    that are not hidden, and as much of 64 of them. For a run folder, it reads the digests of its sources, stored beside
    their checkpoints, and its vocabulary; tables and logs may change.
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
        first = options["first_seed"]
        parts = _run_parts(path, range(first, first + options["seeds"]), every_step=options["source"] == "trajectory")
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


def _run_parts(path: Path, seeds: range, *, every_step: bool) -> Iterator[bytes]:
    from merge_jax.checkpoints.orbax import Checkpoints

    for folder in (path / "checkpoints" / f"source-seed{seed}" for seed in seeds):
        if folder.is_dir():
            with Checkpoints(folder, read_only=True) as checkpoints:
                for step in checkpoints.steps if every_step else checkpoints.steps[-1:]:
                    leaves = checkpoints.manifest(step).leaves.items()
                    digests = {name: dict(leaf.sha256) for name, leaf in leaves if name.startswith(_SOURCE_LEAVES)}
                    yield json.dumps([folder.name, step, digests], sort_keys=True).encode()
    vocabulary = path / "vocabulary.json"
    if vocabulary.exists():
        yield vocabulary.read_bytes()
