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
from merge_jax.parallel import Layout
from merge_jax.runs import RunFolder

__all__ = ["mean_and_error", "print_plan", "print_results", "save_curves"]

_BASELINE = "vanilla"


def print_plan(scenario: Scenario, config: RunConfig, layout: Layout, folder: RunFolder) -> None:
    """Prints what is about to run."""
    key = jax.random.key(0)
    for name, role in (("source", scenario.source), ("target", scenario.target)):
        params, _ = jax.eval_shape(role.init, key)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        splits = role.splits(0)
        sizes = [len(s["label"]) for s in (splits.train, splits.validation, splits.test)]
        print(
            f"{name}: {role.name}, {size:,} parameters; "
            f"{sizes[0]} examples to train, {sizes[1]} to validate, {sizes[2]} to test"
        )
    training = (
        f"trained {scenario.schedule.source.steps} steps, then frozen"
        if config.source == "pretrained"
        else "trained beside the target"
    )
    print(f"source is {training}; target trains {scenario.schedule.target.steps} steps of {config.batch_size}")
    print(f"methods: {', '.join(scenario.methods)}; seeds: {config.seeds}")
    device = jax.devices()[0].device_kind
    sharing = f"{layout.num_devices} x {device} by {config.parallel}" if layout.num_devices > 1 else device
    print(f"devices: {sharing}; run folder: {folder.path}")


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

    table = Table(
        box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1), title=f"{scenario.name}: test accuracy of the target, %"
    )
    headings = ("target", f"- {_BASELINE}", "best val.", "source", "s/run", "compile s", "adapter")
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = of(_BASELINE, "target_test_accuracy", 100)
    for method in scenario.methods:
        accuracy = of(method, "target_test_accuracy", 100)
        compared = method != _BASELINE and len(baseline)
        table.add_row(
            method,
            _format(accuracy),
            _format(accuracy - baseline, "+") if compared else "",
            _format(best) if len(best := of(method, "target_best_validation_accuracy", 100)) else "",
            _format(of(method, "source_test_accuracy", 100)),
            f"{np.mean(of(method, 'seconds')):.1f}",
            f"{np.max(of(method, 'compile_seconds')):.1f}",
            f"{int(of(method, 'adapter_parameters')[0]):,}",
        )
    environment = folder.read_json("environment.json", [])[0]
    plural = "s" if config.seeds > 1 else ""
    notes = (
        f"{scenario.source.name} -> {scenario.target.name}; after the last of {scenario.schedule.target.steps} steps; "
        f"mean ± standard error over {config.seeds} seed{plural}, differences paired by seed. "
        "best val.: best validation accuracy of all reports. s/run: seconds of training; "
        "compile s: seconds of compiling its loop, once.\n"
        f"{environment['command']}\n"
        f"{config.devices or len(environment['devices'])} x {environment['devices'][0]}, "
        f"{environment['cpu_count']} cores, jax "
        f"{environment['versions']['jax']}, {environment['date'][:10]}"
    )
    console = Console(record=True, width=max(100, shutil.get_terminal_size().columns))
    console.print(table)
    console.print(notes, highlight=False)
    folder.write_text("table.txt", console.export_text())


def _format(values: np.ndarray, sign: str = "") -> str:
    mean, error = mean_and_error(values.tolist())
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def save_curves(methods: Sequence[str], records: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """Saves `curves.png`: the target's validation accuracy over steps, mean and standard error over seeds.

    Where nothing is held out to validate on, it is the accuracy on the batches.
    """
    from matplotlib.figure import Figure  # It takes half a second that --help should not.

    validated = any("target/validation_accuracy" in record for record in records)
    name = "target/validation_accuracy" if validated else "target/accuracy"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        values: dict[int, list[float]] = {}
        for record in records:
            if record["run"].rsplit("-seed", 1)[0] == method:
                values.setdefault(record["step"], []).append(100 * record[name])
        steps = sorted(values)
        means, errors = np.array([mean_and_error(values[step]) for step in steps], float).T
        axes.plot(steps, means, label=method, marker="." if len(steps) < 20 else None)
        axes.fill_between(steps, means - errors, means + errors, alpha=0.2)
    kind = "validation" if validated else "training"
    axes.set(xlabel="step of the target", ylabel=f"{kind} accuracy of the target (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.path / "curves.png", dpi=150)
