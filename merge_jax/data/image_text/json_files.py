"""Annotations in JSON files, with errors that name the file and the position in it."""

import collections
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_jax.data.images.image_files import check_inside
from merge_jax.paths import natural_order, some_of

__all__ = ["check_once", "columns", "entry", "files_in", "parse_json", "read_json"]

Hook = Callable[[dict[str, Any]], Any]
"""What a JSON object becomes as soon as it is read: the objects of a large file as a whole may fill the memory."""


def files_in(folder: Path | str, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """Returns the resolved folder, and the files with these relative names in it.

    Raises:
      ValueError: the folder or a file is missing, or a link leads out of the folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"the folder {folder} is missing; expected in it are {', '.join(names)}")
    root = Path(folder).resolve()
    files = [root / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        place = (root / missing[0]).parent
        place = place if place.is_dir() else root
        found = sorted((child.name for child in place.iterdir()), key=natural_order)
        there = some_of(found, 20) or "nothing"
        raise ValueError(f"{root} lacks {missing[0]}; expected are {', '.join(names)}, and in {place} there is {there}")
    for file in files:
        check_inside(root, file)
    return root, files


def read_json(path: Path, hook: Hook | None = None) -> Any:
    """Returns the content of a UTF-8 JSON file.

    Raises:
      ValueError: it is not JSON, or not UTF-8.
    """
    return parse_json(path.read_bytes(), path, hook)


def parse_json(content: bytes, name: object, hook: Hook | None = None) -> Any:
    """Returns the content of UTF-8 JSON; `name` identifies it in errors.

    Raises:
      ValueError: it is not JSON, or not UTF-8.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_hook=hook)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8, at the byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON, or truncated: {error}") from error


def columns(content: Any, key: str, kinds: Mapping[str, type], name: object) -> dict[str, list[Any]]:
    """Returns, by key, entries of these types from all objects in the list `content[key]`.

    Raises:
      ValueError: `content` is not an object with such a list, or the list is empty; an object lacks an entry, or has
        one of another type.
    """
    objects = entry(content, key, list, name)
    if not objects:
        raise ValueError(f"{name} has no {key}")
    return {
        column: [entry(item, column, kind, name, (key, i)) for i, item in enumerate(objects)]
        for column, kind in kinds.items()
    }


def entry(entries: Any, key: str, kind: type, name: object, *place: tuple[str, int]) -> Any:
    """Returns an entry of a given type from a JSON object; the position is the key and index of each enclosing list.

    Raises:
      ValueError: `entries` is not an object, lacks the entry, or has one of another type.
    """
    if isinstance(entries, dict) and key in entries:
        value = entries[key]
        # Booleans are integers in Python, and 0 may stand for 0.0.
        kinds = (int, float) if kind is float else kind
        if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
            return value
        problem = f"the entry {key!r} must be {kind.__name__}, got {type(value).__name__}"
    elif isinstance(entries, dict):
        problem = f"no entry {key!r}, found {list(entries)[:20]}"
    else:
        problem = f"expected a JSON object, got {type(entries).__name__}"
    at = "".join(f", {around} {i}" for around, i in place)
    raise ValueError(f"{name}{at}: {problem}")


def check_once(ids: Iterable[Any], noun: str, name: object) -> None:
    """Raises ValueError if ids repeat; `noun` names what they identify."""
    twice = [id_ for id_, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{name} has {len(twice)} {noun} that appear twice, such as {twice[0]!r}")
