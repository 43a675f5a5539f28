"""What a run says of itself: the plan before, the table and the curves after."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.config import RunConfig
from experiments.scenario import Scenario
from experiments.sources import Origin
from merge_jax.data import num_examples
from merge_jax.parallel import Layout
from merge_jax.runs import RunFolder

__all__ = ["mean_and_error", "print_plan", "print_results", "save_curves"]

_BASELINE = "vanilla"
_NOT_DRAWN = ("adapter/transferred", "adapter/change", "adapter/gradient_norm", "adapter/snapshot")


def print_plan(scenario: Scenario, config: RunConfig, origin: Origin, layout: Layout, folder: RunFolder) -> None:
    """Prints what is about to run."""
    key = jax.random.key(0)
    for name, role in (("source", scenario.source), ("target", scenario.target)):
        if role is None:
            continue
        params, _ = jax.eval_shape(role.init, key)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        splits = role.splits(0)
        sizes = [num_examples(s) for s in (splits.train, splits.validation, splits.test)]
        print(
            f"{name}: {role.name}, {size:,} parameters; "
            f"{sizes[0]} examples to train, {sizes[1]} to validate, {sizes[2]} to test"
        )
    print(f"source {_origin(scenario, config, origin)}")
    print(f"target trains {scenario.schedule.target.steps} steps of {config.batch_size}")
    print(f"methods: {', '.join(scenario.methods)}; seeds: {config.seeds}")
    device = jax.devices()[0].device_kind
    sharing = f"{layout.num_devices} x {device} by {config.parallel}" if layout.num_devices > 1 else device
    print(f"devices: {sharing}; run folder: {folder.path}")


def _origin(scenario: Scenario, config: RunConfig, origin: Origin) -> str:
    if scenario.source is None:
        return "is the target itself"
    if origin.live:
        return "is trained beside the target"
    trained = (
        f"is trained {origin.lengths.steps} steps"
        if origin.lengths is not None
        else f"is read from {config.source_from}"
    )
    if origin.snapshots is None:
        return f"{trained}, and frozen"
    return f"{trained}; {origin.snapshots} steps of its training are replayed"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, `std(ddof=1) / sqrt(n)`; no error for a single value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return float(np.mean(values)), None if error is None else float(error)


def print_results(
    scenario: Scenario,
    config: RunConfig,
    results: Sequence[Mapping[str, Any]],
    folder: RunFolder,
) -> None:
    """Prints the table, one row a method, and saves it as `table.txt`."""

    def of(method: str, name: str, scale: float = 1.0) -> np.ndarray:
        rows = sorted((r["seed"], r[name]) for r in results if r["method"] == method and r[name] is not None)
        return scale * np.array([value for _, value in rows])

    metric = _words(scenario.target.metric)
    table = Table(
        box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=f"{scenario.name}: test {metric} of the target, %"
    )
    headings = ("target", f"- {_BASELINE}", "best val.", "source", "s/run", "compile s", "adapter")
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = of(_BASELINE, "target_test", 100)
    for method in scenario.methods:
        reached = of(method, "target_test", 100)
        compared = method != _BASELINE and len(baseline)
        table.add_row(
            method,
            _format(reached),
            _format(reached - baseline, "+") if compared else "",
            _format(best) if len(best := of(method, "target_best_validation", 100)) else "",
            _format(of_source) if len(of_source := of(method, "source_test", 100)) else "",
            f"{np.mean(of(method, 'seconds')):.1f}",
            f"{np.max(of(method, 'compile_seconds')):.1f}",
            f"{int(of(method, 'adapter_parameters')[0]):,}",
        )
    environment = folder.read_json("environment.json", [])[0]
    plural = "s" if config.seeds > 1 else ""
    source = f"{scenario.target.name} to itself"
    if scenario.source is not None:
        source = f"{scenario.source.name} -> {scenario.target.name}"
        if scenario.source.metric != scenario.target.metric:
            source += f" (source: test {_words(scenario.source.metric)})"
    notes = (
        f"{source}; after the last of {scenario.schedule.target.steps} steps; "
        f"mean ± standard error over {config.seeds} seed{plural}, differences paired by seed. "
        f"best val.: best validation {metric} of all reports. s/run: seconds of training; "
        "compile s: seconds of compiling its loop, once.\n"
        f"{environment['command']}\n"
        f"{config.devices or len(environment['devices'])} x {environment['devices'][0]}, "
        f"{environment['cpu_count']} cores, jax "
        f"{environment['versions']['jax']}, {environment['date'][:10]}"
    )
    console = Console(record=True, width=max(100, shutil.get_terminal_size().columns))
    console.print(table)
    others = [name for name in results[0]["test_metrics"]["target"] if name not in (scenario.target.metric, "loss")]
    if others:
        console.print(_other_metrics(scenario, results, others))
    console.print(notes, highlight=False)
    for result in results:
        if result.get("faults"):
            counts = ", ".join(f"{name} {count}" for name, count in result["faults"].items())
            console.print(f"not finite, or out of bounds: {result['method']}, seed {result['seed']}: {counts}")
    folder.write_text("table.txt", console.export_text())


def _other_metrics(scenario: Scenario, results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Returns a table of the target's other metrics on the test split, one column a method."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title="other test metrics of the target, %")
    table.add_column("metric", no_wrap=True)
    for method in scenario.methods:
        table.add_column(method, justify="right", no_wrap=True)
    for name in names:
        by_method = {
            method: np.array([100 * r["test_metrics"]["target"][name] for r in results if r["method"] == method])
            for method in scenario.methods
        }
        table.add_row(_words(name), *(_format(values) for values in by_method.values()))
    return table


def _format(values: np.ndarray, sign: str = "") -> str:
    mean, error = mean_and_error(values.tolist())
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def save_curves(scenario: Scenario, records: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """Saves `curves.png`: the target's validation metric over steps, mean and standard error over seeds.

    Where nothing is held out to validate on, it is the accuracy on the batches. Gates, and what else a transfer has to
    follow, are a second picture, `gates.png`.
    """
    metric = scenario.target.metric
    validated = any(f"target/validation_{metric}" in record for record in records)
    name = f"target/validation_{metric}" if validated else "target/accuracy"
    words = f"validation {_words(metric)}" if validated else "training accuracy"
    curves = {method: _curve(records, method, name, 100) for method in scenario.methods}
    _save_picture(folder, "curves.png", curves, f"{words} of the target (%)")
    followed = {
        (method, name)
        for record in records
        for name in record
        if name.startswith("adapter/") and name not in _NOT_DRAWN
        for method in [record["run"].rsplit("-seed", 1)[0]]
        if method in scenario.methods
    }
    if followed:
        curves = {
            f"{method}: {name.removeprefix('adapter/')}": _curve(records, method, name)
            for method, name in sorted(followed)
        }
        _save_picture(folder, "gates.png", curves, "gates and weights of the transfer (means between reports)")


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("f1", "F1")


def _curve(
    records: Sequence[Mapping[str, Any]], method: str, name: str, scale: float = 1.0
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns steps, means and standard errors over seeds."""
    values: dict[int, list[float]] = {}
    for record in records:
        if record["run"].rsplit("-seed", 1)[0] == method and name in record:
            values.setdefault(record["step"], []).append(scale * record[name])
    steps = sorted(values)
    means, errors = np.array([mean_and_error(values[step]) for step in steps], float).T
    return steps, means, errors


def _save_picture(
    folder: RunFolder, file: str, curves: Mapping[str, tuple[list[int], np.ndarray, np.ndarray]], label: str
) -> None:
    from matplotlib.figure import Figure  # It takes half a second that --help should not.

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, means, errors) in curves.items():
        axes.plot(steps, means, label=name, marker="." if len(steps) < 20 else None)
        axes.fill_between(steps, means - errors, means + errors, alpha=0.2)
    axes.set(xlabel="step of the target", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small" if len(curves) > 8 else None)
    figure.savefig(folder.path / file, dpi=150)
