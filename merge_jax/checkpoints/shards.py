"""Sharded weights, and the index that maps each tensor to its file."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merge_jax.checkpoints.names import check_inside
from merge_jax.paths import near_misses

__all__ = ["beside", "check_shard", "index_ending", "only_file", "parse_json", "read_index", "read_json", "total_size"]

_MAP = "weight_map"
_ENDINGS = {".bin.index.json": ".bin", ".weights.json": ".h5"}


def read_index(file: Path, *, single: bool = False) -> dict[str, tuple[Path, ...]]:
    """Returns the shards of each name in an index; in Keras, one name covers a layer's variables in several shards.

    Raises:
      ValueError: it is not an index, a shard's name leads out of its folder, or a name has several shards although
        `single` is set.
    """
    try:
        weight_map = parse_json(file.read_text("utf-8"), file)[_MAP]
        shards = {name: [named] if isinstance(named, str) else named for name, named in weight_map.items()}
        if not all(isinstance(shard, str) for named in shards.values() for shard in named):
            raise TypeError
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{file} is no index of shards: it needs a 'weight_map' of names to files") from None
    for shard in dict.fromkeys(shard for named in shards.values() for shard in named):
        check_inside(shard, file, "shard")
    several = next((name for name, named in shards.items() if len(named) != 1), None)
    if single and several is not None:
        raise ValueError(f"{file} must name one shard for {several!r}, found {len(shards[several])}")
    return {name: tuple(file.parent / shard for shard in named) for name, named in shards.items()}


def total_size(file: Path) -> int | None:
    """Returns the total bytes of weights that an index states for its shards; None if it states none."""
    metadata = parse_json(file.read_text("utf-8"), file).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, float) and math.isfinite(total) else None


def check_shard(shard: Path, found: Iterable[str], index: Mapping[str, tuple[Path, ...]]) -> None:
    """Raises ValueError unless a shard holds exactly the names that the index assigns to it."""
    names, expected = set(found), {name for name, shards in index.items() if shard in shards}
    if missing := sorted(expected - names):
        raise ValueError(f"{shard} lacks the tensor {missing[0]!r}; {near_misses(missing[0], names)}")
    if surplus := sorted(names - expected):
        elsewhere = index.get(surplus[0])
        where = f"the index has it in {elsewhere[0].name}" if elsewhere else "the index does not name it"
        raise ValueError(f"{shard} holds the tensor {surplus[0]!r}, but {where}")


def index_ending(path: Path, head: bytes) -> str | None:
    """Returns the file ending of an index's shards, None if the file is not an index.

    For an unreadable index, uses its own name.
    """
    named = path.name.endswith((".index.json", *_ENDINGS))
    if path.is_dir() or not (named or (head.lstrip().startswith(b"{") and f'"{_MAP}"'.encode() in head)):
        return None
    try:
        return next(shard.suffix for shards in read_index(path).values() for shard in shards)
    except (ValueError, StopIteration):
        return next((suffix for ending, suffix in _ENDINGS.items() if path.name.endswith(ending)), ".safetensors")


def only_file(folder: Path, files: Iterable[Path]) -> Path | None:
    """Returns the only weight file in a folder, None if there is none; raises ValueError for several."""
    found = sorted(files)
    if len(found) > 1:
        raise ValueError(
            f"the folder {folder} has several files of weights, name one: {', '.join(file.name for file in found)}"
        )
    return found[0] if found else None


def beside(path: str | os.PathLike[str], name: str) -> Path:
    """Returns the path of another file of a model: in its folder, or in that of its weight file."""
    return (Path(path) if Path(path).is_dir() else Path(path).parent) / name


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file beside weights; raises ValueError if it is not an object."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str, file: Path) -> dict[str, Any]:
    """Returns the JSON of a weight file, without duplicate names; integers are not parsed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file} has the name {twice!r} twice")
        return entries

    try:
        # Numbers are not needed, and Python refuses those with thousands of digits.
        return json.loads(text, object_pairs_hook=unique, parse_int=float)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
