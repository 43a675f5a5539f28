"""The command line of an experiment: a preset by name, then any option of its config."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

from merge_jax.checks import check_choice
from merge_jax.study.config import RunConfig, run_options
from merge_jax.study.option_groups import parse_grouped
from merge_jax.training.compilation_cache import use_cache

if TYPE_CHECKING:
    from merge_jax.study.scenario import Scenario

__all__ = ["as_found", "folded", "main", "parse"]

_SMOKE = "a smoke test: it shows that all works; its figures mean nothing"

_Options = TypeVar("_Options")
_Config = TypeVar("_Config", bound=RunConfig)


def parse(presets: Mapping[str, _Options], module: str, description: str, arguments: Sequence[str]) -> _Options:
    """Returns the preset named by the first argument (by default `default`), changed by the options.

    Raises:
      ValueError: no preset has that name.
      SystemExit: an unknown or malformed option (tyro prints it, with near misses), or `--help`.
    """
    name, options = _split_preset(arguments)
    check_choice("preset", name, presets)
    description = as_found(description, module) + (
        f"\n\nPRESET is one of {', '.join(presets)}. Defaults shown are those of {name!r} (PRESET --help for another)."
    )
    prog, preset = f"python -m {module} [PRESET]", presets[name]
    if isinstance(preset, RunConfig):
        return parse_grouped(preset, options, prog, folded(description))
    return tyro.cli(type(preset), default=preset, args=options, prog=prog, description=folded(description))


def as_found(description: str, module: str) -> str:
    """Returns a description with commands for the module's location: in a package, its parent differs."""
    package = module.rpartition(".")[0]
    return description.replace("python -m experiments.", f"python -m {package}.") if package else description


def folded(text: str) -> str:
    """Returns the text wrapped to the terminal; a comment after `#` goes below its command.

    Every line begins with a space: tyro joins lines that begin with a letter.
    """
    lines: list[str] = []
    width = shutil.get_terminal_size().columns
    for paragraph in re.split(r"\n(?=[\s-])|(?<=\n)\n", re.sub(r"\n{2,}", "\n\n", text)):
        command, _, comment = paragraph.partition("  # ")
        if not paragraph.startswith(" "):
            lines += textwrap.wrap(paragraph, width, initial_indent=" ", subsequent_indent=" ") or [""]
        elif len(paragraph) > width and comment:
            lines.append(command.rstrip())
            lines += textwrap.wrap(f"# {comment}", width, initial_indent=" " * 8, subsequent_indent=" " * 10)
        else:
            lines.append(paragraph.rstrip())
    return "\n".join(lines)


def main(
    presets: Mapping[str, _Config],
    module: str,
    description: str | None,
    build: Callable[[_Config], Scenario],
    arguments: Sequence[str] | None = None,
    *,
    measured: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Parses, checks and runs; invalid options are one line on standard error and exit code 2.

    Args:
      presets: configs by name, including `default`.
      module: the module's name, for the help.
      description: a description of the experiment.
      build: builds the scenario of a config, or raises ValueError.
      arguments: the command line arguments; by default those of this process.
      measured: measured durations of presets, in words.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(presets, module, description or "", arguments)
        config.check()
        # JAX is imported only for valid options.
        import jax

        from merge_jax.training.distributed import await_all, connect, exit_on_error

        use_cache(config.compilation_cache)
        if config.hosts:
            connect()
        elif config.coordinator is not None:
            print(f"waiting for all {config.num_processes} processes at {config.coordinator}", file=sys.stderr)
            connect(config.coordinator, config.num_processes, config.process_id)
        if config.process_id > 0 or (config.hosts and jax.process_index() > 0):  # Only process 0 prints.
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    except (ValueError, TimeoutError) as error:
        _refuse(error)
    with exit_on_error("start all of them again, with --resume"):
        matching = (name for name, preset in presets.items() if run_options(preset) == run_options(config))
        caution = _SMOKE if _split_preset(arguments)[0] == "smoke" else ""
        run = _prepare(build, config, measured.get(next(matching, ""), ""), caution)
        run()  # An error here is not the options' fault, and keeps its traceback.
        await_all(None)  # All exit together: JAX waits only a short time for processes that still print.


def _split_preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the name of the preset, and the options that follow it."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return "default", list(arguments)


def _prepare(build: Callable[[_Config], Scenario], config: _Config, expected: str, caution: str) -> Callable[[], None]:
    """Returns the training function; if one of several processes is refused, all are."""
    from merge_jax.study.runner import check_paths, prepare_run
    from merge_jax.training.distributed import await_all

    run, problem = None, None
    try:
        check_paths(config)
        run = prepare_run(build(config), config, expected, caution)
    except (ValueError, OSError) as error:  # From the options, or from files and folders that they name.
        problem = error
    try:
        await_all(problem)
    except ValueError as error:
        problem = error
    if run is None or problem is not None:
        _refuse(problem)
    return run


def _refuse(problem: Exception | None) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2) from None
