"""The command line of a study: a grid by name or file, and options for its runs."""

from collections.abc import Sequence

import tyro

from merge_jax.study.cli import as_found, folded
from merge_jax.study.grids.grid import Options

__all__ = ["main"]


def main(module: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Checks, runs and reports; an invalid grid or option is one line on standard error and exit code 2.

    If a run fails, it is named and the others continue; the exit code is then 1.
    """
    description = folded(as_found(description or "", module))
    options = tyro.cli(Options, args=arguments, prog=f"python -m {module}", description=description)
    from merge_jax.study.grids.runner import run_study  # This imports JAX, which --help does not need.

    run_study(options)
