"""A study: many settings by many rows, with controls and statistics, from one TOML file.

    python -m experiments.ablation smoke             # one tiny setting; a minute or two, shows that it works
    python -m experiments.ablation digits            # across structures on digits, with controls of the source
    python -m experiments.ablation digits --jobs 2   # two runs at a time, each on its share of the cores
    python -m experiments.ablation my_grid.toml      # a grid of one's own
    python -m experiments.ablation digits --resume   # go on with the last one
    python -m experiments.ablation --help

Grids stand in experiments/grids/. Each cell, a row in a setting, is a command of an experiment; --dry-run prints them.
Everything is checked before anything trains. A setting's source is trained once, by its first run, and read by the
others where their options cannot touch it; results are the same to the digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.cli import folded
from merge_jax.compilation_cache import CacheChoice

__all__ = ["Options", "main"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a study."""

    grid: tyro.conf.Positional[str]
    """Name of a grid in experiments/grids/, or the path of a .toml file."""
    run_dir: Path | None = None
    """Folder of the study; by default a new numbered one in runs/."""
    resume: bool = False
    """Go on with the study in --run-dir, or with the last numbered one: what is done stays."""
    jobs: int = 1
    """Runs at a time, each in a process on its share of the cores."""
    seeds: int | None = None
    """Number of seeds instead of the grid's."""
    only: tuple[str, ...] = ()
    """Only runs with a setting, a row, or a setting/row that one of these globs matches; rows that share a run, and
    the run that trains their source, come along."""
    apart: bool = False
    """A run for each row, also where rows with the same options could share one: for machines with many cores, since
    more of them run at a time. Sources are shared all the same, and results are the same."""
    traced: bool = True
    """Trace every run before the first trains, some seconds a row: what does not fit is told now, not in an hour."""
    dry_run: bool = False
    """Check all, print the commands of the runs, and train nothing."""
    compilation_cache: CacheChoice = "default"
    """Where compiled programs are kept for later runs: none, or a folder, which may grow to 512 MiB. By default that of
    JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, runs and reports; what is wrong with grid or options is one line on standard error and exit code 2.

    A run that fails is told, and the others go on; then the exit code is 1.
    """
    told = folded(__doc__ or "")
    options = tyro.cli(Options, args=arguments, prog="python -m experiments.ablation", description=told)
    from experiments.study import run_study  # With JAX, which --help needs none of.

    run_study(options)


if __name__ == "__main__":
    main()
