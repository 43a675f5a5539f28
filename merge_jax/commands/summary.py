"""`merge-jax summary`: the contents of checkpoints and weight files, from their headers alone."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.checkpoints.manifest import LeafRecord, Manifest
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checkpoints.weights.load import FORMATS, find_format, find_weights, weight_shapes
from merge_jax.checkpoints.weights.orbax_folders import is_ours
from merge_jax.paths import find_paths
from merge_jax.runs.checkpoint_folders import checkpoint_folders, locate_checkpoints

__all__ = ["summarize_checkpoint"]


def summarize_checkpoint(path: Path, pattern: str | None, *, verify: bool) -> None:
    """Prints the contents of a run's checkpoints, one checkpoint folder, one step, or a weight file.

    Args:
      path: the path of any of these.
      pattern: the leaves to list; None for none.
      verify: whether to read all values of the step and compare them with their digests.

    Raises:
      ValueError: the path is none of these, it is damaged, or the pattern matches nothing.
    """
    console = Console()
    file = find_weights(path)
    if file.is_file() or (file.is_dir() and _is_of_others(file)):
        print(f"{path}: {find_format(file).name}")
        leaves = {name: LeafRecord(leaf.shape, str(leaf.dtype)) for name, leaf in weight_shapes(file, "**").items()}
        _print_parts(console, leaves, depth=1)
        _print_leaves(console, leaves, pattern)
        if verify:
            raise ValueError(f"{path} has no digests to verify: those of checkpoints of merge_jax have")
        return
    if (path / "config.json").exists():
        _print_folders(console, path)
        if pattern is not None or verify:
            raise ValueError(f"{path} is a whole run: name one of its folders, such as {checkpoint_folders(path)[0]}")
        return
    folder, step = locate_checkpoints(path)
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = checkpoints.best_step
        print(f"{folder}: steps {', '.join(map(str, checkpoints.steps))}" + ("" if best is None else f"; best {best}"))
        manifest = checkpoints.manifest(checkpoints.steps[-1] if step is None else step)
        _print_manifest(manifest)
        _print_parts(console, manifest.leaves, depth=2)
        _print_leaves(console, manifest.leaves, pattern)
        if verify:
            checkpoints.restore_arrays(manifest.step)
            print(f"step {manifest.step}: all {len(manifest.leaves)} leaves are as they were saved")


def _is_of_others(path: Path) -> bool:
    """Returns whether a folder holds weights, and not steps saved by `Checkpoints`."""
    return any(kind.detect(path, b"") for kind in FORMATS) and not any(map(is_ours, (path, *path.iterdir())))


def _print_folders(console: Console, run: Path) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False, title=f"checkpoints of {run}")
    for heading in ("folder", "steps", "best", "score", "MB"):
        table.add_column(heading, justify="left" if heading == "folder" else "right")
    folders = checkpoint_folders(run)
    if not folders:
        raise ValueError(f"{run} has no checkpoints yet")
    for folder in folders:
        with Checkpoints(folder, read_only=True) as checkpoints:
            best = checkpoints.best_step
            score = None if best is None else checkpoints.manifest(best).score
            table.add_row(
                str(folder.relative_to(run)),
                ", ".join(map(str, checkpoints.steps)),
                "" if best is None else str(best),
                "" if score is None else f"{score:.4g}",
                f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f}",
            )
    console.print(table)
    print(f"one of them: merge-jax summary {folders[-1]}")


def _print_manifest(manifest: Manifest) -> None:
    score = "" if manifest.score is None else f", score {manifest.score:.4g}"
    print(f"step {manifest.step}{score}")
    for title, entries in (("facts", manifest.facts), ("saved under", manifest.environment)):
        if entries:
            print(f"{title}: " + ", ".join(f"{name} {str(value)[:24]}" for name, value in entries.items()))


def _print_parts(console: Console, leaves: Mapping[str, LeafRecord], depth: int) -> None:
    by_part: dict[str, list[LeafRecord]] = {}
    for path, leaf in leaves.items():
        by_part.setdefault("/".join(path.split("/")[:depth]), []).append(leaf)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("part", "leaves", "numbers", "bytes", "dtypes"):
        table.add_column(heading, justify="left" if heading in ("part", "dtypes") else "right")
    for name, part_leaves in [*by_part.items(), ("all", list(leaves.values()))]:
        sizes = [math.prod(leaf.shape) for leaf in part_leaves]
        widths = [np.dtype(leaf.dtype).itemsize for leaf in part_leaves]
        total = sum(size * width for size, width in zip(sizes, widths, strict=True))
        dtypes = ", ".join(dict.fromkeys(leaf.dtype for leaf in part_leaves))
        table.add_row(name, f"{len(part_leaves):,}", f"{sum(sizes):,}", f"{total:,}", dtypes)
    console.print(table)


def _print_leaves(console: Console, leaves: Mapping[str, LeafRecord], pattern: str | None) -> None:
    if pattern is None:
        return
    for path in find_paths(leaves, pattern, role="checkpoint"):
        console.print(f"{path}  {leaves[path]}", highlight=False, markup=False, soft_wrap=True)
