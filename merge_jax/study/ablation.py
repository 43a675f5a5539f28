"""The command line of a study: a grid by name or file, and how its runs go."""

from collections.abc import Sequence

import tyro

from merge_jax.study.cli import as_found, folded
from merge_jax.study.grid import Options

__all__ = ["main"]


def main(module: str, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Checks, runs and reports; what is wrong with grid or options is one line on standard error and exit code 2.

    A run that fails is named, and the others go on; then the exit code is 1.
    """
    description = folded(as_found(description or "", module))
    options = tyro.cli(Options, args=arguments, prog=f"python -m {module}", description=description)
    from merge_jax.study.grid_runner import run_study  # With JAX, which --help needs none of.

    run_study(options)
