"""The report of every benchmark: a table, machine and date, and the figures as JSON."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.runs import describe_environment
from merge_jax.study.cli import parse

__all__ = ["parse_config", "report"]

_Config = TypeVar("_Config")


def parse_config(
    presets: Mapping[str, _Config], module: str, description: str | None, check: Callable[[_Config], None]
) -> _Config:
    """Returns the config of this process's command line; a wrong option is one line and exit code 2."""
    try:
        config = parse(presets, module, description or "", sys.argv[1:])
        check(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def report(
    title: str, config: Any, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: Any, notes: str = ""
) -> None:
    """Prints the table with its notes and writes `runs/benchmarks/<title>.json`."""
    environment = describe_environment()
    table = Table(box=box.SIMPLE, title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    path = Path("runs/benchmarks") / f"{title.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "config": {name: str(value) for name, value in asdict(config).items()},
        "environment": environment,
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(
        f"{notes}\n{environment['devices'][0]}, {environment['cpu_count']} cores, "
        f"jax {environment['versions']['jax']}, {environment['date'][:10]}\n{environment['command']}\nwritten to {path}"
    )
