"""Several runs in one table and one figure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
_CHOOSE = {"seeds", "first_seed", "methods"}  # Options that choose trainings, and change none.


class _Group(NamedTuple):
    """Runs that stand in a table as one.

    Attributes:
      name: the names of its runs, joined by a plus.
      runs: the runs, by name.
      joined: their results as those of one run.
    """

    name: str
    runs: dict[str, Run]
    joined: Run


class Comparison(NamedTuple):
    """A comparison of runs: a text table, and a figure of their curves."""

    text: str
    figure: "Figure"


def compare(paths: Sequence[Path | str], baseline: str | None = None) -> Comparison:
    """Returns a comparison of runs; a single run yields its own table.

    Runs with the same options and other seeds are joined: their results stand in one row.

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
    groups = _groups(dict(zip(_names(runs), runs, strict=True)))
    first = groups[0].joined
    if baseline is not None and baseline not in first.methods:
        raise ValueError(f"{first.path} has no method {baseline!r}; {near_misses(baseline, first.methods)}")
    baseline = baseline or (BASELINE if BASELINE in first.methods else first.methods[0])
    if len(runs) == 1 and baseline == (BASELINE if BASELINE in first.methods else None):
        curves, label = judged(first)
        return Comparison(as_text(result_tables(first), notes(first)), draw(curves, label))
    curves, label = overlaid({group.name: group.joined for group in groups})
    return Comparison(as_text([_table(groups, baseline)], _notes(groups, baseline)), draw(curves, label))


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


def _groups(runs: dict[str, Run]) -> list[_Group]:
    """Returns groups of runs that differ only in their seeds, in the order of their first runs."""
    grouped: list[dict[str, Run]] = []
    for name, run in runs.items():
        options, seeds = _options(run), _seeds(run)
        fits = (
            group
            for group in grouped
            if all(_options(other) == options and not _seeds(other) & seeds for other in group.values())
        )
        if (group := next(fits, None)) is None:
            grouped.append({name: run})
        else:
            group[name] = run
    return [_Group(" + ".join(group), group, _join(list(group.values()))) for group in grouped]


def _options(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.config.items() if name not in _CHOOSE}


def _seeds(run: Run) -> set[int]:
    return {result["seed"] for result in run.results}


def _join(runs: Sequence[Run]) -> Run:
    first = runs[0]
    if len(runs) == 1:
        return first
    methods = tuple(dict.fromkeys(chain.from_iterable(run.plan.methods for run in runs)))
    seeds = sum(run.plan.seeds for run in runs)
    return replace(
        first,
        plan=replace(first.plan, methods=methods, seeds=seeds),
        config={**first.config, "methods": list(methods), "seeds": seeds},
        results=[result for run in runs for result in run.results],
        records=[record for run in runs for record in run.records],
        opponents=[opponent for run in runs for opponent in run.opponents],
    )


def _table(groups: Sequence[_Group], baseline: str) -> Rows:
    of_first, _, first = groups[0]
    compared = first.by_seed(baseline, "target_test", 100)
    starts = starts_in(result for group in groups for result in group.joined.results)
    before = ("run", "method", "target", f"- {of_first}: {baseline}")
    headings = (*before, *starts, "best val.", "source", "seeds", "steps")
    rows: list[tuple[str, ...]] = []
    for name, _, run in groups:
        for method in run.methods:
            reached = run.by_seed(method, "target_test", 100)
            itself = run is first and method == baseline
            rows.append(
                (
                    name,
                    method,
                    format_values(reached.values()),
                    difference(reached, compared) if _same_test(run, first) and not itself else "",
                    *(format_values(run.by_seed(method, start, 100).values()) for start in starts.values()),
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
    metrics = dict.fromkeys(words(group.joined.plan.target.metric) for group in groups)
    return Rows(f"test {' / '.join(metrics)} of the target, %", headings, rows)


def _same_test(run: Run, other: Run) -> bool:
    """Whether two runs score their targets alike, as far as their plans tell."""
    mine, others = run.plan.target, other.plan.target
    return (run.plan.experiment, mine.metric, mine.examples[2]) == (
        other.plan.experiment,
        others.metric,
        others.examples[2],
    )


def _notes(groups: Sequence[_Group], baseline: str) -> list[str]:
    lines = [
        "after the last step; mean ± standard error over seeds, differences paired by seed. best val.: best validation "
        "metric of all reports."
    ]
    results = [result for group in groups for result in group.joined.results]
    if "after write" in starts_in(results):
        lines[0] += f" {START_NOTE.format(metric='metric')}"
    opponents = dict.fromkeys(name for group in groups for name in group.joined.opponents_by_seed())
    if opponents:
        lines[0] += f" {opponent_note(opponents)}"
    of_first, _, first = groups[0]
    for of_group, runs, joined in groups:
        for name, run in runs.items():
            _, *rest = notes(run)
            models = [] if run.plan.source is None else [f"{run.plan.source.name} ({run.plan.source.parameters:,})"]
            models.append(f"{run.plan.target.name} ({run.plan.target.parameters:,} parameters)")
            lines.append(f"{name}: {' -> '.join(models)}; {'; '.join(rest)}")
        if len(runs) > 1:
            lines.append(f"{of_group}: one row, since they have the same options and other seeds")
        if joined is first:
            continue
        if not _same_test(joined, first):
            lines.append(f"{of_group} is tested otherwise than {of_first}: no differences between them")
        else:
            lines += _weak_points(joined, first, of_group, of_first, baseline)
        lines.append(f"options of {of_first} and {of_group}: {_other_options(first, joined) or 'the same'}")
    return lines


def _other_options(first: Run, other: Run) -> str:
    options = sorted(first.config.keys() | other.config.keys())
    pairs = {option: (first.config.get(option), other.config.get(option)) for option in options}
    return "; ".join(f"{option} {mine!r} and {its!r}" for option, (mine, its) in pairs.items() if mine != its)


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
