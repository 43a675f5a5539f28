"""A study as a grid: settings by rows, read from a TOML file, and the resulting runs."""

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import tyro

from merge_jax.checks import check_choice, error_context
from merge_jax.paths import some_of
from merge_jax.study.choices import OPPONENTS
from merge_jax.study.config import check_types
from merge_jax.study.experiment import load_experiment
from merge_jax.training.compilation_cache import CacheChoice

__all__ = ["Grid", "GridRun", "Options", "Row", "Setting", "SlurmOptions", "make_runs", "read_grid", "select"]

_NOT_IN_NAMES = re.compile(r"[^\w=+. -]")
_NAME = re.compile(r"[\w=+][\w=+. -]*")
# The study sets these once for all runs.
_NOT_OPTIONS = {
    "methods": "a row's method says it",
    "seeds": "seeds stand at the top of the grid, or in a setting",
    "run_dir": "it is that of the study",
    "resume": "it is that of the study",
    "compilation_cache": "it is that of the study",
    "hosts": "runs of a study are of one process each",
    "coordinator": "runs of a study are of one process each",
    "num_processes": "runs of a study are of one process each",
    "process_id": "runs of a study are of one process each",
}
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What each run requests from Slurm."""

    partition: str | None = None
    """Slurm partition; by default Slurm's choice."""
    minutes: int = 240
    """Time limit of a run. A longer run is saved, queued again, and continues."""
    cpus: int = 4
    """Cores per run."""
    gpus: int = 0
    """GPUs per run."""
    other: tuple[str, ...] = ()
    """Other options of sbatch, as name=value: account=physics mem=16G."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a study."""

    grid: tyro.conf.Positional[str]
    """Name of a grid in experiments/grids/, or the path of a .toml file."""
    run_dir: Path | None = None
    """Folder of the study; by default a new numbered folder in runs/."""
    resume: bool = False
    """Continue the study in --run-dir, or the last numbered one. Finished runs are kept."""
    executor: str = "local"
    """Where runs execute: local; dask:HOST:PORT, the workers of a Dask scheduler; or slurm, as Slurm jobs."""
    jobs: int = 1
    """Number of local runs at a time. If several, each has a separate process and its share of the cores."""
    seeds: int | None = None
    """Number of seeds instead of the grid's."""
    only: tuple[str, ...] = ()
    """Only settings, rows or setting/row pairs that match one of these globs, and the runs that they depend on."""
    apart: bool = False
    """One run for each row, even if rows could share one, so more run at a time. Results do not change."""
    traced: bool = True
    """Trace every run before the first one trains (seconds per row), so errors show early."""
    dry_run: bool = False
    """Check everything and print the runs' commands, without training."""
    compilation_cache: CacheChoice = "default"
    """Where to keep compiled programs (up to 512 MiB): default, none, or a folder."""
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    """What each run requests from Slurm."""


@dataclass(frozen=True)
class Setting:
    """The common part of a table's rows: an experiment, a preset and options.

    Attributes:
      name: the setting's name.
      experiment: a built-in experiment's name, or any other's module, `package.module`.
      preset: one of its presets.
      options: the options by name, as in TOML; nested ones are `name.name`.
      seeds: the number of seeds, from 0 on.
      routes: named lists of routes that rows may use.
      curve: settings with the same value form one figure over `size`.
      size: this setting's position in it.
    """

    name: str
    experiment: str
    preset: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 10
    routes: Mapping[str, list[str]] = field(default_factory=dict)
    curve: str | None = None
    size: float | None = None


@dataclass(frozen=True)
class Row:
    """A compared row: a method with its options.

    Attributes:
      name: the row's name.
      method: the experiment's method.
      options: the options by name; they override the setting's.
      routes: the name of a list in the setting; None for the experiment's routes.
      settings: globs of the settings with this row.
      choice_of: the row that chooses among options on validation, if this is one of the choices; else None.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    routes: str | None = None
    settings: list[str] = field(default_factory=lambda: ["*"])
    choice_of: str | None = None

    @property
    def shown(self) -> str:
        """The row's name in tables."""
        return self.choice_of or self.name


@dataclass(frozen=True)
class Grid:
    """A study: settings, rows, and the rows or opponents to compare with, paired by seed."""

    name: str
    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    against: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    """The keys at the top of a grid's file."""

    settings: Mapping[str, Any]
    rows: Mapping[str, Any]
    seeds: int = 10
    against: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GridRun:
    """Rows of a setting that differ only by method: one command of an experiment.

    Attributes:
      setting: their setting.
      rows: the rows, in order.
      words: the command line arguments, without methods and run folder.
    """

    setting: Setting
    rows: tuple[Row, ...]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """`<setting>/<first row>`, the run's folder within the study's."""
        return f"{self.setting.name}/{self.rows[0].name}".replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """All command line arguments except the run folder."""
        return [*self.words, "--methods", *(row.method for row in self.rows)]


def read_grid(path: Path, seeds: int | None = None) -> Grid:
    """Returns the grid of a file, with `seeds` replaced if given.

    Raises:
      ValueError: the file is not TOML, or has an invalid key, name or value; near misses are named.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the grid {path} cannot be read: {error}") from None
    file = _make(_File, "the grid", content)
    for noun, tables in (("setting", file.settings), ("row", file.rows)):
        if not tables:
            raise ValueError(f"the grid has no {noun}s")
        for name in tables:
            _check_name(noun, name)
    settings = tuple(_setting(name, table, file.seeds, seeds) for name, table in file.settings.items())
    rows = tuple(row for name, table in file.rows.items() for row in _rows(name, table))
    _check_once("a row appears twice", (row.name for row in rows))
    for row in rows:
        if row.name in OPPONENTS:
            raise ValueError(f"the row {row.name!r} has the name of an opponent, which every table has: choose another")
    for name in file.against:
        check_choice("row in against", name, [*dict.fromkeys(row.shown for row in rows), *OPPONENTS])
    _check_once("a row appears twice in against", file.against)
    return Grid(path.stem, settings, rows, tuple(file.against))


def make_runs(grid: Grid, *, apart: bool = False) -> list[GridRun]:
    """Returns the runs of a grid, setting by setting; rows with the same options share a run, unless `apart`.

    Raises:
      ValueError: an unknown experiment, preset, method, option or list of routes; a row without a setting; two rows
        with the same command. Near misses are named.
    """
    for row in grid.rows:
        for glob in row.settings:
            if not any(fnmatchcase(setting.name, glob) for setting in grid.settings):
                names = ", ".join(setting.name for setting in grid.settings)
                raise ValueError(f"the row {row.name!r} matches no setting with {glob!r}; there is {names}")
    runs: list[GridRun] = []
    for setting in grid.settings:
        by_words: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in grid.rows:
            if any(fnmatchcase(setting.name, glob) for glob in row.settings):
                words = _words(setting, row)
                by_method = by_words.setdefault(words, {})
                if row.method in by_method:
                    raise ValueError(
                        f"the rows {by_method[row.method].name!r} and {row.name!r} of the setting {setting.name!r} are "
                        f"the same command: {' '.join(words)} --methods {row.method}"
                    )
                by_method[row.method] = row
        for words, by_method in by_words.items():
            rows = tuple(by_method.values())
            runs += [GridRun(setting, (row,), words) for row in rows] if apart else [GridRun(setting, rows, words)]
    _check_once("two rows have the same run folder, give them other names", (run.name for run in runs))
    return runs


def select(runs: Sequence[GridRun], patterns: Sequence[str]) -> list[GridRun]:
    """Returns the runs whose setting, row or `setting/row` matches one of the globs; all without globs.

    Raises:
      ValueError: a glob that matches nothing.
    """
    if not patterns:
        return list(runs)

    def matches(run: GridRun, pattern: str) -> bool:
        rows = {name for row in run.rows for name in (row.name, row.shown)}
        names = {run.setting.name} | rows | {f"{run.setting.name}/{row}" for row in rows}
        return any(fnmatchcase(name, pattern) for name in names)

    for pattern in patterns:
        if not any(matches(run, pattern) for run in runs):
            names = {run.setting.name for run in runs} | {row.name for run in runs for row in run.rows}
            check_choice("setting or row in --only", pattern, sorted(names))
    return [run for run in runs if any(matches(run, pattern) for pattern in patterns)]


def _make(kind: type[_Made], place: str, table: Any, **given: Any) -> _Made:
    """Returns a dataclass from a table of the file.

    Raises:
      ValueError: an unknown key, a missing one, or a value of another type.
    """
    _check_table(place, table)
    with error_context(place):
        free = {one.name: one for one in fields(kind) if one.name not in given}  # type: ignore[arg-type]
        for key in table:
            check_choice("key", key, free)
        for name, one in free.items():
            if name not in table and one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(f"there is no {name}")
        made = kind(**table, **given)
        check_types(made)
        return made


def _setting(name: str, table: Any, default_seeds: int, seeds: int | None) -> Setting:
    place = f"the setting {name!r}"
    setting = _make(Setting, place, table, name=name)
    number: int = table.get("seeds", default_seeds) if seeds is None else seeds
    if number < 1:
        raise ValueError(f"{place}: seeds must be at least 1, got {number}")
    if (setting.curve is None) != (setting.size is None):
        raise ValueError(f"{place}: curve and size go together, one is missing")
    return replace(setting, seeds=number, options=_flatten_options(place, setting.options))


def _rows(name: str, table: Any) -> list[Row]:
    """Returns the row of a table, or all rows of a crossing, one for each combination of varied values.

    If a row chooses among options, each choice is a row too, and the report shows the best.
    """
    place = f"the row {name!r}"
    _check_table(place, table)
    shared = {key: value for key, value in table.items() if key not in ("options", "vary", "choose")}
    options, vary, choose = (_flatten_options(place, table.get(key, {})) for key in ("options", "vary", "choose"))
    for kind, lists in (("vary", vary), ("choose", choose)):
        for key, values in lists.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{place}: {kind} {key} must be a list of one value or more, got {values!r}")
    if twice := vary.keys() & choose.keys():
        raise ValueError(f"{place}: {some_of(sorted(twice), 3)} cannot both vary and be chosen")
    rows = []
    for values in itertools.product(*vary.values(), *choose.values()):
        chosen = dict(zip((*vary, *choose), values, strict=True))
        names = [name, *(f"{key}={_shown(value)}" for key, value in chosen.items())]
        full_name, group = " ".join(names), " ".join(names[: 1 + len(vary)])
        _check_name("row", full_name)
        own = {key: chosen.pop(key) for key in ("method", "routes") if key in chosen}
        table = {**shared, **own, "options": {**options, **chosen}}
        rows.append(_make(Row, place, table, name=full_name, choice_of=group if choose else None))
    return rows


def _flatten_options(place: str, table: Any, prefix: str = "") -> dict[str, Any]:
    """Returns options by name: `-` becomes `_`, and those of a nested table `name.name`."""
    _check_table(place, table)
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key.replace("-", "_")
        new = _flatten_options(place, value, f"{name}.") if isinstance(value, dict) else {name: value}
        for option in new:
            if option in _NOT_OPTIONS:
                raise ValueError(f"{place}: {option} is not an option of a row: {_NOT_OPTIONS[option]}")
            if option in options:
                raise ValueError(f"{place}: the option {option!r} appears twice")
        options |= new
    return options


def _check_table(place: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a table, got {value!r}")


def _words(setting: Setting, row: Row) -> tuple[str, ...]:
    """Returns the command line of a row in a setting, without its method: preset, options, seeds."""
    options = {**setting.options, **row.options}
    with error_context(f"the row {row.name!r} of the setting {setting.name!r}"):
        module = load_experiment(setting.experiment)
        check_choice("preset", setting.preset, module.PRESETS)
        if row.routes is not None:
            check_choice("list of routes", row.routes, setting.routes)
            if "routes" in row.options:
                raise ValueError("routes are named, and stand among the options too")
            options["routes"] = setting.routes[row.routes]
        for name in options:
            _check_option(name, module.PRESETS[setting.preset])
        words = [word for name in sorted(options) for word in _as_words(name, options[name])]
    return (setting.preset, *words, "--seeds", str(setting.seeds))


def _check_option(name: str, config: Any) -> None:
    """Raises ValueError unless a config has the option; for a part of it, `part.option`."""
    first, _, rest = name.partition(".")
    check_choice("option", first, [option.name for option in fields(config) if option.name not in _NOT_OPTIONS])
    if rest and is_dataclass(getattr(config, first)):
        _check_option(rest, getattr(config, first))


def _as_words(name: str, value: Any) -> list[str]:
    *parts, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*parts, last if value else f"no-{last}"])]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise ValueError(f"{name} must be a string, a number, a truth value or a list of such, got {value!r}")
    return ["--" + ".".join([*parts, last]), *map(str, values)]


def _check_name(noun: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{noun} {name!r}: a name is letters, digits, spaces and any of _ = + . -, as it names folders"
        )


def _check_once(problem: str, names: Iterable[str]) -> None:
    names = list(names)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{problem}: {name!r}")


def _shown(value: Any) -> str:
    """Returns a value as shown in a row's name."""
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return _NOT_IN_NAMES.sub("-", str(value))
