"""The report of a study: tables with tests, every number as JSON, and figures."""

import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from merge_jax.runs import OPPONENTS, mean_and_error
from merge_jax.runs.folder import RunFolder
from merge_jax.runs.table import START_NOTE, STARTS, format_values, opponent_note
from merge_jax.study.experiment import find_experiment
from merge_jax.study.grids.grid import Grid, GridRun, Row, Setting
from merge_jax.study.statistics import Comparison, holm, paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measured", "write_report"]

_Difference = tuple[str, float, float, bool]
"""A row's name, its difference and standard error, and whether it is a control."""

_CONTROLS = frozenset({"no_source", "itself"})  # Methods that read no source.

_LEVEL = 0.01
_MARK = "**"
_WIDTH = 120


@dataclass(frozen=True)
class Measured:
    """The results of a row in a setting.

    Attributes:
      setting: the grid's setting.
      row: the grid's row.
      command: the command that produces it.
      results: the results of each seed, as in the run's `results.json`.
      opponent: whether no method trains it; it is compared, but not counted in Holm's adjustment.
    """

    setting: Setting
    row: Row
    command: str
    results: tuple[Mapping[str, Any], ...]
    opponent: bool = False

    @property
    def metric(self) -> str:
        """The target's metric."""
        return self.results[0]["target_metric"].replace("_", " ").replace("f1", "F1")

    def by_seed(self, name: str, scale: float = 1.0) -> dict[int, float]:
        """Returns a value for each seed that has it."""
        return {result["seed"]: scale * result[name] for result in self.results if result.get(name) is not None}

    def values(self, name: str, scale: float = 1.0) -> list[float]:
        """Returns the values of all seeds that have it."""
        return list(self.by_seed(name, scale).values())

    def minus(self, other: "Measured") -> Comparison | None:
        """Returns the comparison of test metrics on shared seeds, as fractions; None without any."""
        mine, others = self.by_seed("target_test"), other.by_seed("target_test")
        seeds = sorted(mine.keys() & others.keys())
        return paired_difference([mine[seed] for seed in seeds], [others[seed] for seed in seeds]) if seeds else None


@dataclass(frozen=True)
class _Comparisons:
    """A setting's comparisons with each baseline row, and those significant after Holm's adjustment."""

    by_pair: Mapping[tuple[str, str], Comparison]
    significant: frozenset[tuple[str, str]]
    tested: int


def write_report(grid: Grid, runs: Sequence[GridRun], folder: RunFolder) -> str:
    """Writes tables, numbers and figures of finished runs into the study's folder, and returns the tables."""
    measured = [one for run in runs for one in _measured(run, folder)]
    folder.write_json("results.json", [entry for one in measured for entry in _entries(one)])
    console = Console(record=True, width=_WIDTH, file=io.StringIO())
    markdown = []
    by_setting = {
        s.name: ordered | _opponents(ordered, runs, folder)
        for s in grid.settings
        if (ordered := _setting_rows(grid, s, measured))
    }
    for name, rows in by_setting.items():
        comparisons = _comparisons(rows, grid.against)
        for against in [other for other in grid.against if other in rows] or [None]:
            title = f"{name}: test {next(iter(rows.values())).metric} of the target, %"
            headings, lines = _table(rows, comparisons, against)
            console.print(_as_rich(title, headings, lines))
            markdown += [f"### {title}", "", *_as_markdown(headings, lines), ""]
        note = _comparison_note(grid, name, rows, comparisons)
        console.print(note + "\n", highlight=False)
        markdown += [note, ""]
    opponents = dict.fromkeys(name for rows in by_setting.values() for name, one in rows.items() if one.opponent)
    note = _note(measured, opponents, runs, folder)
    console.print(note, highlight=False)
    markdown.append(note.replace("\n", "\n\n"))
    text = console.export_text()
    folder.write_text("table.txt", text)
    folder.write_text("table.md", "\n".join(markdown) + "\n")
    if by_setting:
        _save_differences(grid, by_setting, folder)
        _save_sizes(grid, by_setting, folder)
    return text


def _measured(run: GridRun, folder: RunFolder) -> list[Measured]:
    """Returns the rows of a run with results."""
    results = RunFolder(folder.path / run.name).read_json("results.json", [])
    command = f"python -m {find_experiment(run.setting.experiment)} {shlex.join(run.arguments)}"
    found = []
    for row in run.rows:
        own = sorted((r for r in results if r["method"] == row.method), key=lambda result: result["seed"])
        if own:
            found.append(Measured(run.setting, row, command, tuple(own)))
    return found


def _setting_rows(grid: Grid, setting: Setting, measured: Sequence[Measured]) -> dict[str, Measured]:
    """Returns the rows of a setting by display name, in grid order.

    If a row chooses among options, uses the choice with the best mean validation over seeds, the first if tied.
    """
    found = {one.row.name: one for one in measured if one.setting.name == setting.name}
    rows: dict[str, Measured] = {}
    for row in grid.rows:
        if row.name in found:
            one, best = found[row.name], rows.get(row.shown)
            if best is None or _validation(one) > _validation(best):
                rows[row.shown] = one
    return rows


def _validation(one: Measured) -> float:
    values = one.values("target_validation")
    return float(np.mean(values)) if values else -math.inf


def _opponents(rows: Mapping[str, Measured], runs: Sequence[GridRun], folder: RunFolder) -> dict[str, Measured]:
    """Returns the opponents of a setting, from the run with the fewest options besides the setting's."""
    first = next(iter(rows.values()))
    own = [run for run in runs if run.setting.name == first.setting.name]
    found: dict[str, Measured] = {}
    for run in sorted(own, key=lambda run: len(run.rows[0].options)):
        entries = RunFolder(folder.path / run.name).read_json(OPPONENTS, [])
        for name in dict.fromkeys(entry["opponent"] for entry in entries):
            results = tuple(
                {**entry, "target_metric": first.results[0]["target_metric"]}
                for entry in entries
                if entry["opponent"] == name
            )
            found.setdefault(name, Measured(first.setting, Row(name, ""), "", results, opponent=True))
    return found


def _entries(one: Measured) -> list[dict[str, Any]]:
    return [
        {
            "setting": one.setting.name,
            "row": one.row.name,
            "seed": result["seed"],
            "metric": result["target_metric"],
            "test": result["target_test"],
            "start_test": result.get("target_start_test"),
            "start_reset": result.get("target_start_reset"),
            "start_probe": result.get("target_start_probe"),
            "probe": result.get("target_probe"),
            "validation": result["target_validation"],
            "best_validation": result["target_best_validation"],
            "source_test": result["source_test"],
            "test_metrics": result["test_metrics"],
            "seconds": result["seconds"],
            "compile_seconds": result["compile_seconds"],
            "adapter_parameters": result["adapter_parameters"],
            "experiment": one.setting.experiment,
            "preset": one.setting.preset,
            "method": one.row.method,
            "options": {**one.setting.options, **one.row.options},
            "routes": one.row.routes,
            "curve": one.setting.curve,
            "size": one.setting.size,
            "command": one.command,
        }
        for result in one.results
    ]


def _comparisons(rows: Mapping[str, Measured], against: Sequence[str]) -> _Comparisons:
    """Returns all comparisons of a setting; Holm counts the comparison of two baseline rows once."""
    by_pair: dict[tuple[str, str], Comparison] = {}
    for other in [name for name in against if name in rows]:
        for name, one in rows.items():
            if name != other and (comparison := one.minus(rows[other])) is not None:
                by_pair[name, other] = comparison
    tested = {
        frozenset(pair): found.p_t
        for pair, found in by_pair.items()
        if found.p_t is not None and not rows[pair[0]].opponent
    }
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    significant = frozenset(
        pair for pair in by_pair if not rows[pair[0]].opponent and adjusted.get(frozenset(pair), 1.0) < _LEVEL
    )
    return _Comparisons(by_pair, significant, len(tested))


def _table(
    rows: Mapping[str, Measured], comparisons: _Comparisons, against: str | None
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and lines of a table that compares a setting's rows with one of them."""
    differences = [] if against is None else [f"- {against}", "p (t)"]
    starts = {heading: name for heading, name in STARTS.items() if any(one.values(name) for one in rows.values())}
    headings = ["row", "n", "test", *starts, "validation", *differences, "s/run", "adapter"]
    lines = []
    for name, one in rows.items():
        columns = "target_test", *starts.values(), "target_validation"
        line = [name, str(len(one.results)), *(format_values(one.values(column, 100)) for column in columns)]
        if against is not None:
            comparison = comparisons.by_pair.get((name, against))
            line += ["", ""] if comparison is None else _compared(comparison)
            if (name, against) in comparisons.significant:
                line[0] += f" {_MARK}"
        seconds, adapter = one.values("seconds"), one.values("adapter_parameters")
        lines.append([*line, *([f"{np.mean(seconds):.1f}", f"{int(adapter[0]):,}"] if seconds else ["", ""])])
    return headings, lines


def _compared(comparison: Comparison) -> list[str]:
    error = "" if comparison.error is None else f" ± {100 * comparison.error:.1f}"
    return [f"{100 * comparison.mean:+.1f}{error}", _p(comparison.p_t)]


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _comparison_note(grid: Grid, setting: str, rows: Mapping[str, Measured], comparisons: _Comparisons) -> str:
    missing = [name for name in grid.against if name not in rows]
    chosen = [one.row.name for one in rows.values() if one.row.choice_of is not None]
    note = f"{setting}: {comparisons.tested} comparisons; "
    if not comparisons.tested:
        note = f"{setting}: nothing to test; "
    left = [f"{name} - {other}" for name, other in comparisons.by_pair if (name, other) in comparisons.significant]
    note += f"significant at {_LEVEL} after Holm ({_MARK}): {', '.join(left) or 'none'}."
    note += f" Chosen on validation, over all seeds: {'; '.join(chosen)}." if chosen else ""
    return note + (f" Without {', '.join(missing)}: not run." if missing else "")


def _note(measured: Sequence[Measured], opponents: Iterable[str], runs: Sequence[GridRun], folder: RunFolder) -> str:
    """Returns notes on columns, missing results, machine and date."""
    environment = folder.read_json("environment.json", [])[0]
    expected = [(run.setting, row) for run in runs for row in run.rows]
    seeds = sum(setting.seeds for setting, _ in expected)
    starts = any(one.values("target_start_test") for one in measured)
    missing = seeds - sum(len(one.results) for one in measured)
    lines = [
        "After the last step; mean ± standard error over n seeds, differences paired by seed. p: two-sided, of the "
        "paired t-test; Holm adjusts it for all comparisons of a setting. validation: at the last step. s/run: seconds "
        "of training. adapter: its parameters.",
    ]
    if starts:
        lines.append(START_NOTE.format(metric="metric"))
    if opponents:
        lines.append(f"{opponent_note(opponents)} Holm counts them only where rows are compared with them.")
    if missing:
        lines.append(f"Not done yet: {missing} of {seeds} results.")
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("jax", "flax", "optax"))
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    lines += [
        environment["command"],
        f"{len(environment['devices'])} x {environment['devices'][0]}, {environment['cpu_count']} cores, "
        f"Python {environment['python']}, {versions}{commit}, {environment['date'][:10]}",
    ]
    return "\n".join(lines)


def _as_rich(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=title)
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _as_markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    marked = [[text.replace(_MARK, r"\*\*") for text in line] for line in lines]
    rule = [" --- ", *(" ---: " for _ in headings[1:])]
    return [f"| {' | '.join(headings)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in marked)]


def _save_differences(grid: Grid, by_setting: Mapping[str, Mapping[str, Measured]], folder: RunFolder) -> None:
    """Saves `differences.png`: each row's difference to the first baseline, one panel per setting."""
    if not grid.against:
        return
    against, panels = grid.against[0], {}
    for name, rows in by_setting.items():
        if against in rows:
            compared = {row: one.minus(rows[against]) for row, one in rows.items() if row != against}
            panels[name] = [
                (row, 100 * found.mean, 100 * (found.error or 0.0), _is_control(rows[row]))
                for row, found in compared.items()
                if found is not None
            ]
    panels = {name: differences for name, differences in panels.items() if differences}
    if panels:
        figure = _draw_differences(panels, f"test metric minus {against} (points)")
        figure.savefig(folder.path / "differences.png", dpi=150)


def _is_control(one: Measured) -> bool:
    """Returns whether a row is a control, not a method to use."""
    options = {**one.setting.options, **one.row.options}
    return one.opponent or one.row.method in _CONTROLS or options.get("source_control", "none") != "none"


def _draw_differences(panels: Mapping[str, Sequence[_Difference]], label: str) -> "Figure":
    """Draws differences in one panel per setting, best first and controls below, with a common scale and row spacing.

    Args:
      panels: the differences of each setting, at least one.
      label: the label of the common scale.
    """
    from matplotlib.figure import Figure  # The import takes half a second, too long for --help.

    columns = min(3, len(panels))
    longest_first = sorted(panels.items(), key=lambda panel: -len(panel[1]))
    lines = [longest_first[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(len(rows) for _, rows in line) for line in lines]
    figure = Figure(figsize=(2 + 4 * columns, sum(1 + 0.25 * height for height in heights)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, sharex=True, height_ratios=heights)
    for line, height, row_of_axes in zip(lines, heights, axes, strict=True):
        for panel in row_of_axes[len(line) :]:
            panel.remove()
        for panel, (name, rows) in zip(row_of_axes, line, strict=False):
            ordered = sorted(rows, key=lambda row: (row[3], -row[1]))
            for place, (_, mean, error, control) in enumerate(ordered):
                panel.errorbar(mean, place, xerr=error, fmt="o", color="0.5" if control else "C0", capsize=2)
            methods = sum(not row[3] for row in rows)
            if 0 < methods < len(rows):
                panel.axhline(methods - 0.5, color="0.5", linewidth=0.8, linestyle=":")
            panel.axvline(0, color="0.5", linewidth=0.8)
            panel.set_yticks(range(len(rows)), [row[0] for row in ordered], fontsize="small")
            panel.set(title=name, ylim=(height - 0.5, -0.5))
            panel.tick_params(labelbottom=True)
            panel.grid(alpha=0.3, axis="x")
    figure.supxlabel(label)
    return figure


def _save_sizes(grid: Grid, by_setting: Mapping[str, Mapping[str, Measured]], folder: RunFolder) -> None:
    """Saves `sizes.png`: the test metric of each row over the settings' sizes, one panel per curve."""
    from matplotlib.figure import Figure

    curves: dict[str, list[Setting]] = {}
    for setting in grid.settings:
        if setting.curve is not None and setting.name in by_setting:
            curves.setdefault(setting.curve, []).append(setting)
    if not curves:
        return
    figure = Figure(figsize=(7 * len(curves), 4.5), layout="constrained")
    for panel, (curve, settings) in zip(
        figure.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True
    ):
        settings = sorted(settings, key=lambda setting: setting.size or 0.0)
        for number, row in enumerate(dict.fromkeys(name for setting in settings for name in by_setting[setting.name])):
            points = [(s.size, by_setting[s.name][row]) for s in settings if row in by_setting[s.name]]
            if points:
                means, errors = zip(*(mean_and_error(one.values("target_test", 100)) for _, one in points), strict=True)
                panel.errorbar(
                    [size for size, _ in points],
                    means,
                    yerr=[error or 0.0 for error in errors],
                    label=row,
                    marker="os^Dv"[number // 10 % 5],
                    capsize=2,
                )
        metric = next(iter(by_setting[settings[0].name].values())).metric
        panel.set(title=curve, xlabel="size", ylabel=f"test {metric} of the target (%)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(folder.path / "sizes.png", dpi=150)
