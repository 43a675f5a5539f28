"""`merge-jax compare`: run folders side by side."""

from collections.abc import Sequence
from pathlib import Path

from merge_jax.runs import compare
from merge_jax.runs.folder import numbered_folder

__all__ = ["compare_runs"]


def compare_runs(runs: Sequence[Path], baseline: str | None, out: Path | None) -> None:
    """Prints the table of runs, and writes it with a figure of their curves into a new folder.

    A single run already has both: they are written again only if `out` is given.

    Raises:
      ValueError: as `merge_jax.runs.compare`, or a folder that is not empty.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not overwritten: choose another --out")
    comparison = compare(runs, baseline)
    print(comparison.text, end="")
    if out is None and len(runs) == 1:
        return
    with numbered_folder("compare", given=out) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        try:  # Another comparison may have created the same folder.
            with (folder / "table.txt").open("x") as table:
                table.write(comparison.text)
            with (folder / "curves.png").open("xb") as curves:
                comparison.figure.savefig(curves, dpi=150, format="png")
        except FileExistsError as error:
            raise ValueError(f"{error.filename} already exists and is not overwritten: choose another --out") from None
    print(f"table and curves: {folder}")
