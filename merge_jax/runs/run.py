"""A run read from its folder: plan and results."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from merge_jax.paths import near_misses, some_of
from merge_jax.runs.folder import MetricsLog, RunFolder

__all__ = ["OPPONENTS", "PLAN", "Model", "Plan", "RouteStats", "Run", "mean_and_error", "words"]

PLAN = "plan.json"
"""The name of the file of a run folder that has the plan."""

OPPONENTS = "opponents.json"
"""The name of the file of a run folder that has the test accuracies of opponents, which no method trains."""


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
      name: the display name.
      parameters: the number of parameters.
      metric: the metric that scores it.
      examples: the numbers of training, validation and test examples.
      code: Python lines that define `model`, its variables as shapes, `like`, and its `apply` function; empty if
        unknown.
    """

    name: str
    parameters: int
    metric: str
    examples: tuple[int, int, int]
    code: str = ""

    def __str__(self) -> str:
        """Returns a one-line description."""
        train, validate, test = self.examples
        return (
            f"{self.name}, {self.parameters:,} parameters; "
            f"{train} examples to train, {validate} to validate, {test} to test"
        )


@dataclass(frozen=True)
class RouteStats:
    """The routes of a method's transfer, and the size of its adapter.

    Attributes:
      routes: each as `target <- source`.
      parameters: the number of adapter parameters.
    """

    routes: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run; with the results, it contains everything the tables need.

    Attributes:
      experiment: the experiment's name.
      source: the source model; None if the target is its own source.
      target: the target model.
      origin: where the source comes from, worded to follow "source".
      steps: the target's training steps.
      batch_size: examples per batch.
      methods: the compared methods, in order.
      seeds: the number of seeds.
      transfers: the routes of each method that transfers, by name.
      devices: the number and kind of devices.
      control: the control applied to the source; empty for none.
      expected: the measured duration; empty if not measured.
      caution: why its figures mean little, if so; otherwise empty.
      moments: how many of the steps transfer; empty if none.
      first_seed: the first seed.
    """

    experiment: str
    source: Model | None
    target: Model
    origin: str
    steps: int
    batch_size: int
    methods: tuple[str, ...]
    seeds: int
    transfers: Mapping[str, RouteStats]
    devices: str
    control: str = ""
    expected: str = ""
    caution: str = ""
    moments: str = ""
    first_seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Returns the plan from `to_json`; other input raises KeyError, TypeError or AttributeError."""

        def model(entry: Mapping[str, Any]) -> Model:
            train, validate, test = entry["examples"]
            examples = (train, validate, test)
            return Model(entry["name"], entry["parameters"], entry["metric"], examples, entry.get("code", ""))

        transfers = {
            method: RouteStats(tuple(stats["routes"]), stats["parameters"])
            for method, stats in content["transfers"].items()
        }
        return cls(
            **{
                **content,
                "source": None if content["source"] is None else model(content["source"]),
                "target": model(content["target"]),
                "methods": tuple(content["methods"]),
                "transfers": transfers,
            }
        )

    def lines(self) -> list[str]:
        """Returns the plan as readable lines."""
        lines = [] if self.source is None else [f"source: {self.source}"]
        lines += [f"target: {self.target}", f"source {self.origin}"]
        if self.control:
            lines.append(f"source control: {self.control}")
        lines.append(f"target trains {self.steps} steps of {self.batch_size}")
        first = f", from {self.first_seed} on" if self.first_seed else ""
        lines.append(f"methods: {', '.join(self.methods)}; seeds: {self.seeds}{first}")
        by_routes: dict[tuple[str, ...], list[str]] = {}
        for method, stats in self.transfers.items():
            by_routes.setdefault(stats.routes, []).append(method)
        for routes, methods in by_routes.items():
            plural = f"{len(routes)} route{'s' if len(routes) > 1 else ''}"
            lines.append(f"{plural} (target <- source) of {', '.join(methods)}: {some_of(routes, 3)}")
        adapters = [f"{name} {stats.parameters:,}" for name, stats in self.transfers.items() if stats.parameters]
        if adapters:
            lines.append(f"adapter parameters: {', '.join(adapters)}")
        if self.moments:
            lines.append(self.moments)
        if self.caution:
            lines.append(self.caution)
        return [*lines, f"devices: {self.devices}"]

    @property
    def models(self) -> str:
        """A short description of the models."""
        if self.source is None:
            return f"{self.target.name} to itself"
        pair = f"{self.source.name} -> {self.target.name}"
        if self.source.metric != self.target.metric:
            pair += f" (source: test {words(self.source.metric)})"
        return pair


@dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    Attributes:
      path: the folder.
      plan: the plan of the run.
      config: every option.
      sessions: the environment and date of the first session and of each resume.
      results: one entry for each finished method and seed.
      records: the metric records.
      opponents: one entry for each opponent and seed: baselines that no method trains, such as a regression on the
        inputs; empty for runs of earlier versions.
    """

    path: Path
    plan: Plan
    config: Mapping[str, Any]
    sessions: Sequence[Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    records: Sequence[Mapping[str, Any]]
    opponents: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Returns the run of a folder.

        Raises:
          ValueError: the folder is missing or holds no run, the run has no plan (an old version) or no finished method,
            or a file is damaged.
        """
        path = Path(path)
        if not path.is_dir():
            there = [str(one.parent) for one in path.parent.glob("*/config.json")]
            raise ValueError(f"there is no run folder {path}; {near_misses(str(path), there)}")
        if not (path / "config.json").exists():
            inside = [str(one.parent) for one in sorted(path.glob("*/config.json"))]
            hint = f"; there are runs in it: {some_of(inside, 10)}" if inside else ""
            raise ValueError(f"{path} is not a run folder: it has no config.json{hint}")
        folder = RunFolder(path)
        try:
            plan = folder.read_json(PLAN, None)
            if plan is None:
                raise ValueError(f"{path} has no {PLAN}: resume the run with this version, which writes it")
            run = cls(
                path,
                Plan.from_json(plan),
                folder.read_json("config.json", {}),
                folder.read_json("environment.json", []),
                folder.read_json("results.json", []),
                MetricsLog(folder).records(),
                folder.read_json(OPPONENTS, []),
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the run folder {path} is damaged: {type(error).__name__}: {error}") from None
        if not run.results:
            raise ValueError(f"no method of the run {path} has ended yet: resume it first")
        return run

    @property
    def command(self) -> str:
        """The command of the last session, without --resume; an earlier one may have fewer seeds and methods."""
        return shlex.join(word for word in shlex.split(self.sessions[-1]["command"]) if word != "--resume")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods finished for at least one seed, in the order of the plan."""
        ended = {result["method"] for result in self.results}
        return tuple(method for method in self.plan.methods if method in ended)

    @property
    def trained(self) -> Path | None:
        """The checkpoint folder of the last method and the first seed; None if a run of version 0.1 has none."""
        folder = self.path / "checkpoints" / f"{self.methods[-1]}-seed{self.plan.first_seed}"
        return folder if folder.is_dir() else None

    def by_seed(self, method: str, name: str, scale: float = 1.0) -> dict[int, float]:
        """Returns a value of a method, for each seed that has it."""
        rows = sorted((r["seed"], r[name]) for r in self.results if r["method"] == method and r.get(name) is not None)
        return {seed: scale * value for seed, value in rows}

    def opponents_by_seed(self, scale: float = 1.0) -> dict[str, dict[int, float]]:
        """Returns the test accuracy of each opponent, for each seed that has it."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.opponents:
            found.setdefault(entry["opponent"], {})[entry["seed"]] = scale * entry["target_test"]
        return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, `std(ddof=1) / sqrt(n)`; no error for a single value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return float(np.mean(values)), None if error is None else float(error)


def words(metric: str) -> str:
    """Returns the display name of a metric."""
    return metric.replace("_", " ").replace("f1", "F1")
