"""The table of a run."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.runs.run import Run, mean_and_error, words

__all__ = [
    "BASELINE",
    "OPPONENT_NOTES",
    "STARTS",
    "START_NOTE",
    "Rows",
    "as_text",
    "difference",
    "format_values",
    "meaning",
    "notes",
    "opponent_note",
    "result_tables",
    "starts_in",
]

BASELINE = "vanilla"
STARTS = {"after write": "target_start_test", "reset": "target_start_reset", "probe": "target_start_probe"}
"""Headings of what a target is worth before its first step, and their names in results."""
START_NOTE = (
    "after write: test {metric} of the target right after the first write, before any step; reset: the same with "
    "BatchNorm's statistics of the training inputs; probe: test accuracy of a logistic regression on its features "
    "then, fitted to the labelled examples."
)
OPPONENT_NOTES = {
    "inputs_lr": "inputs_lr: logistic regression on the raw inputs",
    "source_lr": "source_lr: logistic regression on the source's features of them",
    "source": "source: the source itself",
}
_WIDTH = 100


class Rows(NamedTuple):
    """The content of a table.

    Attributes:
      title: the title above it.
      headings: the column headings; the first column holds names.
      rows: the cells.
    """

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def drawn(self) -> Table:
        """Returns the table for a terminal or a text file."""
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=self.title)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def result_tables(run: Run) -> list[Rows]:
    """Returns the table of a run, one row per method, and a second table of other test metrics, if any."""
    metric = words(run.plan.target.metric)
    starts = starts_in(run.results)
    headings = ("method", "target", f"- {BASELINE}", *starts, "best val.", "source", "s/run", "compile s", "adapter")
    baseline = run.by_seed(BASELINE, "target_test", 100)
    rows: list[tuple[str, ...]] = []
    for method in run.methods:
        reached = run.by_seed(method, "target_test", 100)
        rows.append(
            (
                method,
                format_values(reached.values()),
                difference(reached, baseline) if method != BASELINE else "",
                *(format_values(run.by_seed(method, name, 100).values()) for name in starts.values()),
                format_values(run.by_seed(method, "target_best_validation", 100).values()),
                format_values(run.by_seed(method, "source_test", 100).values()),
                f"{np.mean(list(run.by_seed(method, 'seconds').values())):.1f}",
                f"{max(run.by_seed(method, 'compile_seconds').values()):.1f}",
                f"{max(run.by_seed(method, 'adapter_parameters').values()):,.0f}",
            )
        )
    for opponent, reached in run.opponents_by_seed(100).items():
        cells = (opponent, format_values(reached.values()), difference(reached, baseline))
        rows.append((*cells, *("" for _ in headings[len(cells) :])))
    tables = [Rows(f"{run.plan.experiment}: test {metric} of the target, %", headings, rows)]
    others = [name for name in _tested(run, run.methods[0]) if name not in (run.plan.target.metric, "loss")]
    if others:
        by_name = [
            (words(name), *(format_values(100 * value for value in _tested(run, m)[name]) for m in run.methods))
            for name in others
        ]
        tables.append(Rows("other test metrics of the target, %", ("metric", *run.methods), by_name))
    return tables


def starts_in(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns those of `STARTS` that any result has; results of earlier versions have none."""
    results = list(results)
    return {heading: name for heading, name in STARTS.items() if any(one.get(name) is not None for one in results)}


def _tested(run: Run, method: str) -> dict[str, list[float]]:
    """Returns all test metrics of the target, over seeds."""
    values: dict[str, list[float]] = {}
    for result in run.results:
        if result["method"] == method:
            for name, value in result["test_metrics"]["target"].items():
                values.setdefault(name, []).append(value)
    return values


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """Returns the mean paired difference over shared seeds; an empty string without any."""
    common = sorted(values.keys() & baseline.keys())
    return format_values([values[seed] - baseline[seed] for seed in common], "+")


def format_values(values: Iterable[float], sign: str = "") -> str:
    """Returns mean and standard error with one digit; an empty string without values."""
    values = list(values)
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def meaning(run: Run) -> str:
    """Returns one sentence on a run's result: which method gains most, and whether that is sure.

    A gain is sure if it exceeds twice its standard error over at least three seeds (our choice: a rule of thumb, not a
    test; `experiments.ablation` has tests).
    """
    if run.plan.caution:
        return f"This is {run.plan.caution}."
    baseline = run.by_seed(BASELINE, "target_test", 100)
    gains = {}
    for method in run.methods:
        values = run.by_seed(method, "target_test", 100)
        common = values.keys() & baseline.keys()
        if method != BASELINE and common:
            gains[method] = [values[seed] - baseline[seed] for seed in sorted(common)]
    if not gains:
        return f"No method stands beside {BASELINE}, so there is no gain to tell."
    best = max(gains, key=lambda method: mean_and_error(gains[method])[0])
    mean, error = mean_and_error(gains[best])
    points = f"{format_values(gains[best], '+')} points of test {words(run.plan.target.metric)} over {BASELINE}"
    if error is None or len(gains[best]) < 3:
        return f"{best} comes to {points}, but fewer than three seeds make nothing sure."
    if mean <= 2 * error:
        return f"No method surely gains: the best, {best}, comes to {points}, not more than twice its standard error."
    return f"{best} gains most, {points} in {len(gains[best])} seeds, more than twice its standard error."


def notes(run: Run) -> list[str]:
    """Returns the notes below a table: models, protocol, command, hardware, versions, date and problems."""
    plan, session = run.plan, run.sessions[0]
    several = f"mean ± standard error over {plan.seeds} seeds, differences paired by seed and taken before rounding"
    protocol = (
        f"{plan.models}; after the last of {plan.steps} steps; {several if plan.seeds > 1 else 'one seed'}. "
        f"best val.: best validation {words(plan.target.metric)} of all reports. s/run: seconds of training; "
        "compile s: seconds of compiling its loop, once."
    )
    if "after write" in starts_in(run.results):
        protocol += " " + START_NOTE.format(metric=words(plan.target.metric))
    if run.opponents:
        protocol += f" {opponent_note(run.opponents_by_seed())}"
    lines = [protocol, *filter(None, [plan.caution]), run.command]
    lines.append(
        f"{plan.devices}, {session['cpu_count']} cores, jax {session['versions']['jax']}, {session['date'][:10]}"
    )
    ended = {(result["method"], result["seed"]) for result in run.results}
    if len(ended) < plan.seeds * len(plan.methods):
        lines.append(f"not ended: {len(ended)} of {plan.seeds * len(plan.methods)} trainings are here")
    seeds = {seed for _, seed in ended}
    for name, reached in run.opponents_by_seed().items():
        if missing := len(seeds - reached.keys()):
            lines.append(f"{name}: measured on {len(seeds) - missing} of {len(seeds)} seeds")
    for result in run.results:
        if result.get("faults"):
            counts = ", ".join(f"{name} {count}" for name, count in result["faults"].items())
            lines.append(f"not finite, or out of bounds: {result['method']}, seed {result['seed']}: {counts}")
    return lines


def opponent_note(names: Iterable[str]) -> str:
    """Returns one sentence that explains opponents."""
    return f"Not trained here, with the same labelled examples: {'; '.join(OPPONENT_NOTES.get(n, n) for n in names)}."


def as_text(tables: Sequence[Rows], lines: Sequence[str]) -> str:
    """Returns tables and their notes, the same on any terminal and in a file."""
    file = io.StringIO()
    console = Console(file=file, width=1000)  # Tables are never cut; they take the width they need.
    for table in tables:
        console.print(table.drawn())
    written = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
    return written + "\n" + "\n".join(textwrap.fill(line, _WIDTH, break_long_words=False) for line in lines) + "\n"
