"""Compares this work tree with a commit, side by side on this machine.

    python -m benchmarks.against_commit db687a9                      # all but the heavy ones, with their targets
    python -m benchmarks.against_commit db687a9 --only init_5x2 help # some
    python -m benchmarks.against_commit db687a9 --heavy              # all: hours
    python -m benchmarks.against_commit --list

Git creates a work tree of the commit in a temporary folder. Each tree gets a separate environment with this one's
packages, and every process checks that it imports its own tree. Measurements run in fresh processes in turns (before,
after, before, after, ...), without a compilation cache. The table shows medians; a ratio is the median over repetitions
of the ratio of neighbours. CPU seconds are user and system time of all threads and children; they are more reliable
than wall seconds on a shared machine. The steps of `joint_run_*` are timed only by wall seconds, and need an idle
machine.
"""

import contextlib
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm.auto import tqdm

from benchmarks.measured_tree import MeasurementError, Tree, make_tree, work_tree
from benchmarks.measurements import MEASUREMENTS, Figures, Measurement, Program
from merge_jax.checks import check_at_least_one, check_choice

__all__ = ["Config", "Row", "Side", "chosen", "main", "markdown", "measure", "rows_of"]

ROOT = Path(__file__).parent.parent
_COLUMNS = ("measurement", "figure", "before", "after", "ratio", "target", "reached")
_DIRTY = "-dirty"
_OUT = Path("runs/benchmarks")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    commit: tyro.conf.Positional[str] = ""
    """What to compare with, as git names it."""
    only: tuple[str, ...] = ()
    """Measurements to take, heavy ones too; by default all that are not heavy."""
    heavy: bool = False
    """Take those that need many minutes too."""
    repetitions: int = 3
    """Times that each is taken on each side."""
    dirty: bool = False
    """Measure this work tree even if it has changes that no commit has."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the measurements with their targets, and end."""

    def check(self) -> None:
        """Raises ValueError for an option out of range."""
        check_at_least_one(repetitions=self.repetitions)
        for name in self.only:
            check_choice("measurement", name, MEASUREMENTS)
        if not self.commit and not self.show:
            raise ValueError("name the commit to compare with, e.g. HEAD~1; --list lists what is measured")


@dataclass
class Side:
    """What was measured on one side: figures by repetition, or how it failed."""

    taken: list[Figures] = field(default_factory=list)
    failure: str = ""

    def take(self, program: Program, tree: Tree) -> None:
        """Measures once; after a failure, no more."""
        if self.failure:
            return
        try:
            self.taken.append(program(tree))
        except MeasurementError as error:
            self.failure = str(error)
        except (KeyError, OSError, TypeError, ValueError) as error:  # What it wrote is not what was expected.
            self.failure = f"{type(error).__name__}: {error}"

    def values(self, figure: str) -> list[float]:
        """Returns a figure in all repetitions; empty after a failure, or where there is no such figure."""
        if self.failure or any(figure not in figures for figures in self.taken):
            return []
        return [figures[figure] for figures in self.taken]


class Row(NamedTuple):
    """A figure of a measurement.

    Attributes:
      measurement: its name.
      figure: its name and unit; empty where nothing was measured.
      before: median of the first side, or None.
      after: median of the second side, or None.
      ratio: median of after over before in each repetition, or None.
      target: in words, or empty.
      reached: whether it is, or None where that is unknown or there is no target.
      failures: how the two sides failed; empty where they did not.
    """

    measurement: str
    figure: str
    before: float | None
    after: float | None
    ratio: float | None
    target: str
    reached: bool | None
    failures: tuple[str, str]

    def cells(self) -> tuple[str, ...]:
        """Returns the row of the table."""
        sides = [
            f"failed: {failure.replace('|', '/')}" if failure else _number(value)
            for value, failure in zip((self.before, self.after), self.failures, strict=True)
        ]
        reached = {True: "yes", False: "no", None: "not known" if self.target else ""}[self.reached]
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return (self.measurement, self.figure, *sides, ratio, self.target, reached)


def _number(value: float | None) -> str:
    """Returns three digits, or as many as stand before the point."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def chosen(config: Config) -> dict[str, Measurement]:
    """Returns the measurements that a config asks for."""
    if config.only:
        return {name: MEASUREMENTS[name] for name in dict.fromkeys(config.only)}
    return {name: one for name, one in MEASUREMENTS.items() if config.heavy or not one.heavy}


def measure(measurement: Measurement, before: Tree, after: Tree, repetitions: int, bar: tqdm) -> tuple[Side, Side]:
    """Returns both sides, which are measured in turns."""
    first, second = Side(), Side()
    for _ in range(repetitions):
        if measurement.base is not None:
            first.take(measurement.base, after)
        elif not measurement.alone:
            first.take(measurement.program, before)
        bar.update()
        second.take(measurement.program, after)
        bar.update()
    return first, second


def rows_of(name: str, measurement: Measurement, first: Side, second: Side) -> list[Row]:
    """Returns the rows of a measurement: what is judged first, then its other figures."""
    failures = first.failure, second.failure
    targets = {target.figure: target for target in measurement.targets}
    measured = dict.fromkeys(
        figure for side in (second, first) if not side.failure for figures in side.taken for figure in figures
    )
    rows = []
    for figure in dict.fromkeys([*targets, *measured]):
        before, after = first.values(figure), second.values(figure)
        ratio = statistics.median(_over(b, a) for a, b in zip(before, after, strict=True)) if before and after else None
        first_median, second_median = (statistics.median(values) if values else None for values in (before, after))
        target = targets.get(figure)
        reached = None
        if target is not None:
            judged = ratio if target.kind == "ratio" else second_median
            if judged is not None:
                reached = judged <= target.limit
            elif second.failure:
                reached = False
        in_words = "" if target is None else str(target)
        rows.append(Row(name, figure, first_median, second_median, ratio, in_words, reached, failures))
    return rows or [Row(name, "", None, None, None, "", None, failures)]


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _git(*words: str) -> str:
    """Returns what git says of the repository of this file.

    Raises:
      ValueError: there is no git, or it refuses.
    """
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"git cannot be started: {error}") from None
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"git {words[0]} failed")
    return done.stdout.strip()


def _resolve(config: Config) -> tuple[str, str]:
    """Returns the hashes of the commit and of this work tree, the latter marked where it has changes.

    Raises:
      ValueError: there is no repository or no such commit, or the tree has changes that were not allowed.
    """
    try:
        top = Path(_git("rev-parse", "--show-toplevel"))
    except ValueError as error:
        raise ValueError(f"{ROOT} is no git repository: {error}") from None
    if top.resolve() != ROOT.resolve():
        raise ValueError(f"{ROOT} is no git repository of its own: it lies in that of {top}")
    try:
        commit = _git("rev-parse", "--verify", "--end-of-options", f"{config.commit}^{{commit}}")
    except ValueError:
        raise ValueError(f"there is no commit {config.commit!r} in {ROOT}") from None
    changed = _git("status", "--porcelain").splitlines()
    if changed and not config.dirty:
        raise ValueError(f"{len(changed)} changes in {ROOT} are in no commit: commit them, or add --dirty")
    return commit, _git("rev-parse", "HEAD") + (_DIRTY if changed else "")


def _where(tree: Tree, name: str) -> dict[str, Any]:
    """Returns what a tree runs on; also the first process of each, which reads all packages from the disk.

    Raises:
      ValueError: it cannot be imported, or something else is.
    """
    try:
        return tree.program("where")
    except MeasurementError as error:
        raise ValueError(f"the tree of {name} cannot be imported: {error}") from None


def _parse(arguments: Sequence[str] | None) -> Config:
    config = tyro.cli(Config, args=arguments, prog="python -m benchmarks.against_commit", description=__doc__)
    config.check()
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; what is wrong with options or repository is one line and exit code 2."""
    try:
        config = _parse(arguments)
        if config.show:
            print(_listed())
            return
        commit, here = _resolve(config)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="against_commit-")))
            root = stack.enter_context(work_tree(ROOT, commit, folder / "tree"))
            before, after = make_tree(root, folder / "before"), make_tree(ROOT, folder / "after")
            places = {"before": _where(before, commit[:12]), "after": _where(after, "this folder")}
            _measure_all(config, (before, after), _Table(config, (commit, here), places))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _listed() -> str:
    rows = [
        (name, one.what, "; ".join(f"{t.figure}: {t}" for t in one.targets), "heavy" if one.heavy else "")
        for name, one in MEASUREMENTS.items()
    ]
    return markdown(("measurement", "what", "target", ""), rows)


@dataclass
class _Table:
    """What came out so far; written after each measurement, so that who stops it keeps it."""

    config: Config
    commits: tuple[str, str]
    places: Mapping[str, Mapping[str, Any]]
    load: tuple[float, float, float] = field(default_factory=os.getloadavg)
    rows: list[Row] = field(default_factory=list)
    sides: dict[str, Any] = field(default_factory=dict)

    @property
    def stem(self) -> Path:
        return _OUT / f"against_{self.commits[0][:12]}"

    def add(self, name: str, measurement: Measurement, first: Side, second: Side) -> list[Row]:
        """Adds and writes a measurement; returns its rows."""
        new = rows_of(name, measurement, first, second)
        self.rows += new
        self.sides[name] = {"what": measurement.what, "before": vars(first), "after": vars(second)}
        content = {
            "commits": self.commits,
            "repetitions": self.config.repetitions,
            "environment": self.places,
            "load": [self.load, os.getloadavg()],
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rows": [row._asdict() for row in self.rows],
            "measured": self.sides,
        }
        _OUT.mkdir(parents=True, exist_ok=True)
        self.stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
        self.stem.with_suffix(".md").write_text(self.text() + "\n")
        return new

    def text(self) -> str:
        """Returns the table with what a reader needs to judge it."""
        place, (before, after) = self.places["after"], self.commits
        versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("jax", "jaxlib", "flax", "numpy"))
        return "\n".join(
            [
                markdown(_COLUMNS, [row.cells() for row in self.rows]),
                "",
                f"before: {before[:12]}; after: {after[:12]}{_DIRTY if after.endswith(_DIRTY) else ''}",
                f"medians of {self.config.repetitions} repetitions, in turns; ratio: median of after / before",
                f"{place['devices'][0]}, {place['cpu_count']} cores, Python {place['python']}, {versions}",
                f"load average {self.load[0]:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, "
                f"{place['date'][:10]}",
            ]
        )


def _measure_all(config: Config, trees: tuple[Tree, Tree], table: _Table) -> None:
    measurements = chosen(config)
    with tqdm(total=2 * config.repetitions * len(measurements), unit="turn") as bar:
        for name, measurement in measurements.items():
            bar.set_description(name)
            rows = table.add(name, measurement, *measure(measurement, *trees, config.repetitions, bar))
            bar.write("\n".join(f"| {' | '.join(row.cells())} |" for row in rows), file=sys.stderr)
    print(f"{table.text()}\nwritten to {table.stem}.md and .json")


if __name__ == "__main__":
    main()
