"""Several runs in one table and one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merge_jax.paths import near_misses
from merge_jax.runs.curves import draw, judged, overlaid
from merge_jax.runs.run import Run, words
from merge_jax.runs.table import (
    BASELINE,
    START_NOTE,
    Rows,
    as_text,
    difference,
    format_values,
    notes,
    opponent_note,
    result_tables,
    starts_in,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare"]

_GRID = "grid.toml"  # Present in a study's folder, but not in a run's.


class Comparison(NamedTuple):
    """A comparison of runs: a text table, and a figure of their curves."""

    text: str
    figure: "Figure"


def compare(paths: Sequence[Path | str], baseline: str | None = None) -> Comparison:
    """Returns a comparison of runs; a single run yields its own table.

    Args:
      paths: the run folders; a study's folder stands for all of its runs with results.
      baseline: the first run's method that all others are compared with, paired by seed; by default `vanilla`, or the
        first method if there is no `vanilla`.

    Raises:
      ValueError: no folders, one that is named twice or is not a run with results, or a baseline missing from the first
        run.
    """
    if not paths:
        raise ValueError("no run folders to compare")
    runs = [run for path in paths for run in _runs_in(Path(path))]
    resolved = [run.path.resolve() for run in runs]
    twice = next((run.path for run in runs if resolved.count(run.path.resolve()) > 1), None)
    if twice is not None:
        raise ValueError(f"the run folder {twice} is named twice")
    first = runs[0]
    if baseline is not None and baseline not in first.methods:
        raise ValueError(f"{first.path} has no method {baseline!r}; {near_misses(baseline, first.methods)}")
    baseline = baseline or (BASELINE if BASELINE in first.methods else first.methods[0])
    if len(runs) == 1 and baseline == (BASELINE if BASELINE in first.methods else None):
        curves, label = judged(first)
        return Comparison(as_text(result_tables(first), notes(first)), draw(curves, label))
    names = _names(runs)
    curves, label = overlaid(dict(zip(names, runs, strict=True)))
    return Comparison(as_text([_table(runs, names, baseline)], _notes(runs, names, baseline)), draw(curves, label))


def _runs_in(path: Path) -> list[Run]:
    """Returns the runs that a folder stands for; for a study, those with the baseline come first.

    Raises:
      ValueError: as `Run.read`, or a study without results yet.
    """
    if not (path / _GRID).exists():
        return [Run.read(path)]
    runs = [Run.read(results.parent) for results in path.glob("*/*/results.json")]
    if not runs:
        raise ValueError(f"no run of the study {path} has results yet")
    return sorted(runs, key=lambda run: (BASELINE not in run.methods, str(run.path)))


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns distinct names of the runs: as many last parts of their paths as needed."""
    for count in range(1, max(len(run.path.resolve().parts) for run in runs)):
        names = ["/".join(run.path.resolve().parts[-count:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.path.resolve()) for run in runs]


def _table(runs: Sequence[Run], names: Sequence[str], baseline: str) -> Rows:
    first = runs[0]
    compared = first.by_seed(baseline, "target_test", 100)
    starts = starts_in(result for run in runs for result in run.results)
    before = ("run", "method", "target", f"- {names[0]}: {baseline}")
    headings = (*before, *starts, "best val.", "source", "seeds", "steps")
    rows: list[tuple[str, ...]] = []
    for run, name in zip(runs, names, strict=True):
        for method in run.methods:
            reached = run.by_seed(method, "target_test", 100)
            itself = run is first and method == baseline
            rows.append(
                (
                    name,
                    method,
                    format_values(reached.values()),
                    difference(reached, compared) if _same_test(run, first) and not itself else "",
                    *(format_values(run.by_seed(method, name, 100).values()) for name in starts.values()),
                    format_values(run.by_seed(method, "target_best_validation", 100).values()),
                    format_values(run.by_seed(method, "source_test", 100).values()),
                    str(len(reached)),
                    str(run.plan.steps),
                )
            )
        for opponent, reached in run.opponents_by_seed(100).items():
            cells = (opponent, format_values(reached.values()))
            minus = difference(reached, compared) if _same_test(run, first) else ""
            rows.append((name, *cells, minus, *("" for _ in starts), "", "", str(len(reached)), ""))
    metrics = dict.fromkeys(words(run.plan.target.metric) for run in runs)
    return Rows(f"test {' / '.join(metrics)} of the target, %", headings, rows)


def _same_test(run: Run, other: Run) -> bool:
    """Whether two runs score their targets alike, as far as their plans tell."""
    mine, others = run.plan.target, other.plan.target
    return (run.plan.experiment, mine.metric, mine.examples[2]) == (
        other.plan.experiment,
        others.metric,
        others.examples[2],
    )


def _notes(runs: Sequence[Run], names: Sequence[str], baseline: str) -> list[str]:
    lines = [
        "after the last step; mean ± standard error over seeds, differences paired by seed. best val.: best validation "
        "metric of all reports."
    ]
    if "after write" in starts_in(result for run in runs for result in run.results):
        lines[0] += f" {START_NOTE.format(metric='metric')}"
    opponents = dict.fromkeys(name for run in runs for name in run.opponents_by_seed())
    if opponents:
        lines[0] += f" {opponent_note(opponents)}"
    first = runs[0]
    for run, name in zip(runs, names, strict=True):
        _, *rest = notes(run)
        models = [] if run.plan.source is None else [f"{run.plan.source.name} ({run.plan.source.parameters:,})"]
        models.append(f"{run.plan.target.name} ({run.plan.target.parameters:,} parameters)")
        lines.append(f"{name}: {' -> '.join(models)}; {'; '.join(rest)}")
        if run is first:
            continue
        if not _same_test(run, first):
            lines.append(f"{name} is tested otherwise than {names[0]}: no differences between them")
        else:
            lines += _weak_points(run, first, name, names[0], baseline)
        options = first.config.keys() | run.config.keys()
        pairs = {option: (first.config.get(option), run.config.get(option)) for option in sorted(options)}
        other = [f"{option} {mine!r} and {its!r}" for option, (mine, its) in pairs.items() if mine != its]
        lines.append(f"options of {names[0]} and {name}: {'; '.join(other) or 'the same'}")
    return lines


def _weak_points(run: Run, first: Run, name: str, of_first: str, baseline: str) -> list[str]:
    """Returns reasons why differences between two runs may mislead."""
    lines = []
    compared = first.by_seed(baseline, "target_test").keys()
    common = {method: len(run.by_seed(method, "target_test").keys() & compared) for method in run.methods}
    if min(common.values()) < len(compared):
        counts = ", ".join(f"{method} {count}" for method, count in common.items())
        lines.append(f"seeds that {name} has in common with {of_first}, of {len(compared)}: {counts}")
    mine, others = run.plan.target, first.plan.target
    if (mine.name, mine.parameters) != (others.name, others.parameters):
        lines.append(
            f"{name} has another target than {of_first}: {mine.name} of {mine.parameters:,} parameters, not "
            f"{others.name} of {others.parameters:,}"
        )
    if run.plan.steps != first.plan.steps:
        lines.append(
            f"{name} trains {run.plan.steps} steps, {of_first} {first.plan.steps}: their differences are of that too"
        )
    return lines
