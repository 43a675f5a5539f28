"""Where the checkpoints of a run are."""

from pathlib import Path

from merge_jax.paths import natural_order, near_misses, some_of

__all__ = ["cells_of", "located"]


def cells_of(run: Path) -> list[Path]:
    """Returns the folders of checkpoints of a run: one of each method and seed."""
    folder = run / "checkpoints"
    cells = [cell for cell in folder.iterdir() if cell.is_dir()] if folder.is_dir() else []
    return sorted(cells, key=lambda cell: natural_order(cell.name))


def located(path: Path) -> tuple[Path, int | None]:
    """Returns the folder of checkpoints that a path names, and the step, if it names one.

    Raises:
      ValueError: there is no such folder, or it has no checkpoints; what is there is named.
    """
    if not path.is_dir():
        parent = path.parent
        there = [str(child) for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
        raise ValueError(f"there is no folder {path}; {near_misses(str(path), there)}")
    if path.name.isdigit():
        return path.parent, int(path.name)
    if any(child.is_dir() and child.name.isdigit() for child in path.iterdir()):
        return path, None
    cells = cells_of(path)
    hint = f"; it is a run, name one of {some_of([str(cell) for cell in cells], 20)}" if cells else ""
    raise ValueError(f"{path} has no checkpoints{hint}")
