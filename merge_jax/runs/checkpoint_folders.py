"""Finds the checkpoints of a run."""

from pathlib import Path

from merge_jax.paths import natural_order, near_misses, some_of

__all__ = ["checkpoint_folders", "locate_checkpoints"]


def checkpoint_folders(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, one for each method and seed."""
    parent = run / "checkpoints"
    folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return sorted(folders, key=lambda path: natural_order(path.name))


def locate_checkpoints(path: Path) -> tuple[Path, int | None]:
    """Returns the checkpoint folder that a path names, and the step, if it names one.

    Raises:
      ValueError: there is no such folder, or it has no checkpoints; the message lists what exists.
    """
    if path.is_file():
        raise ValueError(
            f"{path} is a file, and checkpoints are folders: if it holds weights, merge-jax convert {path} FILE"
            " converts it to safetensors"
        )
    if not path.is_dir():
        parent = path.parent
        kind = "file" if path.suffix else "folder"
        there = parent.iterdir() if parent.is_dir() else ()
        alike = [str(child) for child in there if child.is_dir() == (kind == "folder")]
        raise ValueError(f"there is no {kind} {path}; {near_misses(str(path), alike)}")
    if path.name.isdigit():
        return path.parent, int(path.name)
    if any(child.is_dir() and child.name.isdigit() for child in path.iterdir()):
        return path, None
    folders = checkpoint_folders(path)
    hint = f"; it is a run, name one of {some_of(list(map(str, folders)), 20)}" if folders else ""
    raise ValueError(f"{path} has no checkpoints{hint}")
