"""A study as a grid: settings by rows, read from a TOML file, and the runs that its cells make."""

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tyro

from merge_jax.checks import check_choice
from merge_jax.study.experiment import load_experiment
from merge_jax.training.compilation_cache import CacheChoice

__all__ = ["Grid", "GridRun", "Options", "Row", "Setting", "read_grid", "runs_of", "select"]

_NOT_OF_A_NAME = re.compile(r"[^\w=+. -]")
_NAME = re.compile(r"[\w=+][\w=+. -]*")
# The study says them once for all of its runs.
_NOT_OPTIONS = {
    "methods": "a row's method says it",
    "seeds": "seeds stand at the top of the grid, or in a setting",
    "run_dir": "it is that of the study",
    "resume": "it is that of the study",
    "compilation_cache": "it is that of the study",
    "coordinator": "runs of a study are of one process each",
    "num_processes": "runs of a study are of one process each",
    "process_id": "runs of a study are of one process each",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a study."""

    grid: tyro.conf.Positional[str]
    """Name of a grid in experiments/grids/, or the path of a .toml file."""
    run_dir: Path | None = None
    """Folder of the study; by default a new numbered one in runs/."""
    resume: bool = False
    """Go on with the study in --run-dir, or with the last numbered one: what is done stays."""
    jobs: int = 1
    """Runs at a time, each in a process on its share of the cores."""
    seeds: int | None = None
    """Number of seeds instead of the grid's."""
    only: tuple[str, ...] = ()
    """Only runs with a setting, a row, or a setting/row that one of these globs matches; rows that share a run, and
    the run that trains their source, come along."""
    apart: bool = False
    """A run for each row, also where rows with the same options could share one: for machines with many cores, since
    more of them run at a time. Sources are shared all the same, and results are the same."""
    traced: bool = True
    """Trace every run before the first trains, some seconds a row: what does not fit is told now, not in an hour."""
    dry_run: bool = False
    """Check all, print the commands of the runs, and train nothing."""
    compilation_cache: CacheChoice = "default"
    """Where compiled programs are kept for later runs: none, or a folder, which may grow to 512 MiB. By default that of
    JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all rows of a table: an experiment, a preset and options.

    Attributes:
      name: of the setting.
      experiment: of one that ships the name, of any other its module, `package.module`.
      preset: one of its presets.
      options: by name, as TOML has them; nested ones are `name.name`.
      seeds: how many, from 0 on.
      routes: lists of routes that a row may ask for by name.
      curve: settings with the same one make one picture over `size`.
      size: where this setting stands in it.
    """

    name: str
    experiment: str
    preset: str
    options: Mapping[str, Any]
    seeds: int
    routes: Mapping[str, Sequence[str]]
    curve: str | None
    size: float | None


@dataclass(frozen=True)
class Row:
    """What is compared: a method with options of its own.

    Attributes:
      name: of the row.
      method: of the experiment.
      options: by name; they come after the setting's.
      routes: the name of a list of the setting; None for the experiment's own routes.
      settings: globs of settings that have the row.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    routes: str | None
    settings: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A study: settings, rows, and the rows that others are compared with, paired by seed."""

    name: str
    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    against: tuple[str, ...]


@dataclass(frozen=True)
class GridRun:
    """Rows of a setting that differ by their method alone: one command of an experiment.

    Attributes:
      setting: that they are of.
      rows: in order.
      words: of the command line, without methods and run folder.
    """

    setting: Setting
    rows: tuple[Row, ...]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """`<setting>/<first row>`, the folder of the run within that of the study."""
        return f"{self.setting.name}/{self.rows[0].name}".replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """The words of the whole command line, but for the run folder."""
        return [*self.words, "--methods", *(row.method for row in self.rows)]


def read_grid(path: Path, seeds: int | None = None) -> Grid:
    """Returns the grid of a file, with another number of seeds where one is given.

    Raises:
      ValueError: the file is no TOML, or a key, a name or a number in it is wrong; near misses are named.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the grid {path} cannot be read: {error}") from None
    table = _Table("the grid", content, {"seeds": int, "against": list, "settings": dict, "rows": dict})
    default = table.get("seeds", 10)
    settings = tuple(_setting(name, entry, default, seeds) for name, entry in table.named("settings"))
    rows = tuple(row for name, entry in table.named("rows") for row in _rows(name, entry))
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"a row stands twice: {_twice(row.name for row in rows)!r}")
    against = table.strings("against")
    for name in against:
        check_choice("row in against", name, [row.name for row in rows])
    if len(set(against)) < len(against):
        raise ValueError(f"a row stands twice in against: {_twice(against)!r}")
    return Grid(path.stem, settings, rows, against)


def runs_of(grid: Grid, *, apart: bool = False) -> list[GridRun]:
    """Returns the runs of a grid, setting by setting; rows with the same options are one run, unless `apart`.

    Raises:
      ValueError: an experiment, preset, method, option or list of routes that is not there; a row without a setting;
        two rows that are the same command. Near misses are named.
    """
    runs: list[GridRun] = []
    for row in grid.rows:
        unmatched = [glob for glob in row.settings if not any(fnmatchcase(s.name, glob) for s in grid.settings)]
        if unmatched:
            names = ", ".join(setting.name for setting in grid.settings)
            raise ValueError(f"the row {row.name!r} matches no setting with {unmatched[0]!r}; there is {names}")
    for setting in grid.settings:
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in grid.rows:
            if any(fnmatchcase(setting.name, glob) for glob in row.settings):
                found.setdefault(_words(setting, row), []).append(row)
        for words, rows in found.items():
            methods: dict[str, Row] = {}
            for row in rows:
                if row.method in methods:
                    raise ValueError(
                        f"the rows {methods[row.method].name!r} and {row.name!r} of the setting {setting.name!r} are "
                        f"the same command: {' '.join(words)} --methods {row.method}"
                    )
                methods[row.method] = row
            groups = [(row,) for row in rows] if apart else [tuple(rows)]
            runs += [GridRun(setting, group, words) for group in groups]
    folders = [run.name for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two rows have the run folder {_twice(folders)}: give them other names")
    return runs


def select(runs: Sequence[GridRun], patterns: Sequence[str]) -> list[GridRun]:
    """Returns the runs with a setting, a row, or a `setting/row` that one of the globs matches; all without globs.

    Raises:
      ValueError: a glob that matches nothing.
    """
    if not patterns:
        return list(runs)

    def matches(run: GridRun, pattern: str) -> bool:
        names = {run.setting.name} | {row.name for row in run.rows}
        names |= {f"{run.setting.name}/{row.name}" for row in run.rows}
        return any(fnmatchcase(name, pattern) for name in names)

    for pattern in patterns:
        if not any(matches(run, pattern) for run in runs):
            names = {run.setting.name for run in runs} | {row.name for run in runs for row in run.rows}
            check_choice("setting or row in --only", pattern, sorted(names))
    return [run for run in runs if any(matches(run, pattern) for pattern in patterns)]


class _Table:
    """A table of the file, whose keys and types are checked as they are read."""

    def __init__(self, place: str, content: Any, types: Mapping[str, type | tuple[type, ...]]):
        self._place, self._content, self._types = place, content, types
        if not isinstance(content, dict):
            raise ValueError(f"{place} must be a table, got {content!r}")
        for key, value in content.items():
            try:
                check_choice("key", key, types)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            if not isinstance(value, types[key]) or isinstance(value, bool):
                raise ValueError(f"{place}: {key} must be {_type_name(types[key])}, got {value!r}")

    def get(self, key: str, default: Any = None) -> Any:
        return self._content.get(key, default)

    def required(self, key: str) -> Any:
        if key not in self._content:
            raise ValueError(f"{self._place} has no {key}")
        return self._content[key]

    def strings(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        return _strings(f"{self._place}: {key}", self.get(key, list(default)))

    def named(self, key: str) -> Iterable[tuple[str, Any]]:
        """Returns the tables of a table, one or more, whose names can be folders."""
        entries = self.required(key)
        if not entries:
            raise ValueError(f"{self._place} has no {key}")
        for name in entries:
            _check_name(key.removesuffix("s"), name)
        return entries.items()


def _setting(name: str, content: Any, default_seeds: int, seeds: int | None) -> Setting:
    place = f"the setting {name!r}"
    types = {"experiment": str, "preset": str, "options": dict, "seeds": int, "routes": dict, "curve": str}
    table = _Table(place, content, {**types, "size": (int, float)})
    routes = {key: _strings(f"{place}: routes {key}", words) for key, words in table.get("routes", {}).items()}
    number: int = table.get("seeds", default_seeds) if seeds is None else seeds
    if number < 1:
        raise ValueError(f"{place}: seeds must be at least 1, got {number}")
    curve, size = table.get("curve"), table.get("size")
    if (curve is None) != (size is None):
        raise ValueError(f"{place}: curve and size go together, one is missing")
    options = _options(place, table.get("options", {}))
    return Setting(
        name, table.required("experiment"), table.get("preset", "default"), options, number, routes, curve, size
    )


def _rows(name: str, content: Any) -> list[Row]:
    """Returns the row of a table, or all of a crossing, by the values that vary."""
    place = f"the row {name!r}"
    types = {"method": str, "options": dict, "routes": str, "vary": dict, "settings": list}
    table = _Table(place, content, types)
    vary = _options(place, table.get("vary", {}))
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}: vary {key} must be a list of one value or more, got {values!r}")
    method = table.get("method", "") if "method" in vary else table.required("method")
    options = _options(place, table.get("options", {}))
    row = Row(name, method, options, table.get("routes"), table.strings("settings", ("*",)))
    return [_varied(row, dict(zip(vary, values, strict=True))) for values in itertools.product(*vary.values())]


def _varied(row: Row, values: Mapping[str, Any]) -> Row:
    """Returns the row of a crossing with these values; `method` and `routes` are those of the row."""
    of_row = {key: values[key] for key in ("method", "routes") if key in values}
    for key, value in of_row.items():
        if not isinstance(value, str):
            raise ValueError(f"the row {row.name!r}: vary {key} must be a list of names, got {value!r}")
    options = {**row.options, **{key: value for key, value in values.items() if key not in of_row}}
    name = " ".join([row.name, *(f"{key}={_shown(value)}" for key, value in values.items())])
    _check_name("row", name)
    return replace(row, name=name, options=options, **of_row)


def _options(place: str, content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns options by name: `-` is `_`, and those of a table in it are `name.name`."""
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = prefix + key.replace("-", "_")
        new = _options(place, value, f"{name}.") if isinstance(value, dict) else {name: value}
        for one in new:
            if one in _NOT_OPTIONS:
                raise ValueError(f"{place}: {one} is no option of a cell: {_NOT_OPTIONS[one]}")
            if one in options:
                raise ValueError(f"{place}: the option {one!r} stands twice")
        options |= new
    return options


def _words(setting: Setting, row: Row) -> tuple[str, ...]:
    """Returns the command line of a cell without its method: preset, options, seeds."""
    place = f"the row {row.name!r} of the setting {setting.name!r}"
    options = {**setting.options, **row.options}
    try:
        module = load_experiment(setting.experiment)
        check_choice("preset", setting.preset, module.PRESETS)
        config = module.PRESETS[setting.preset]
        if row.routes is not None:
            check_choice("list of routes", row.routes, setting.routes)
            if "routes" in row.options:
                raise ValueError("routes are named, and stand among the options too")
            options["routes"] = list(setting.routes[row.routes])
        for name in options:
            _check_option(name, config)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    words = [word for name in sorted(options) for word in _as_words(place, name, options[name])]
    return (setting.preset, *words, "--seeds", str(setting.seeds))


def _check_option(name: str, config: Any) -> None:
    """Raises ValueError unless a config has the option; of a part of it, as `part.option`."""
    first, _, rest = name.partition(".")
    check_choice("option", first, [field.name for field in fields(config) if field.name not in _NOT_OPTIONS])
    if rest and is_dataclass(getattr(config, first)):
        _check_option(rest, getattr(config, first))


def _as_words(place: str, name: str, value: Any) -> list[str]:
    *parts, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*parts, last if value else f"no-{last}"])]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise ValueError(f"{place}: {name} must be a string, a number, a truth value or a list of such, got {value!r}")
    return ["--" + ".".join([*parts, last]), *map(str, values)]


def _strings(place: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{place} must be a list of strings, got {value!r}")
    return tuple(value)


def _check_name(noun: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{noun} {name!r}: a name is letters, digits, spaces and any of _ = + . -, as it names folders"
        )


def _shown(value: Any) -> str:
    """Returns a value as it stands in the name of a row."""
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return _NOT_OF_A_NAME.sub("-", str(value))


def _type_name(types: type | tuple[type, ...]) -> str:
    names = {str: "a string", int: "a whole number", list: "a list", dict: "a table", float: "a number"}
    return names[types[-1] if isinstance(types, tuple) else types]


def _twice(names: Iterable[str]) -> str:
    names = list(names)
    return next(name for name in names if names.count(name) > 1)
