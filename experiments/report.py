"""What a run says of itself: the plan before, the table and the curves after."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.config import RunConfig
from experiments.scenario import Scenario
from merge_jax.runs import RunFolder, describe_environment

__all__ = ["mean_and_error", "print_plan", "print_results", "save_curves"]

_BASELINE = "vanilla"


def print_plan(scenario: Scenario, config: RunConfig, folder: RunFolder) -> None:
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
        f"trained {config.source_steps} steps, then frozen"
        if config.source == "pretrained"
        else "trained beside the target"
    )
    print(f"source is {training}; target trains {config.steps} steps of {config.batch_size}")
    print(f"methods: {', '.join(scenario.methods)}; {config.seeds} seeds each")
    print(f"devices: {', '.join(describe_environment()['devices'])}; run folder: {folder.path}")


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
        rows = sorted((r["seed"], r[name]) for r in results if r["method"] == method)
        return scale * np.array([value for _, value in rows])

    environment = describe_environment()
    table = Table(
        title=f"{scenario.name}: test accuracy (%) of the target after the last step",
        caption=(
            f"mean ± standard error over {config.seeds} seeds, paired; "
            f"{scenario.source.name} -> {scenario.target.name}\n"
            f"{environment['command']} | {environment['devices'][0]} | {environment['date'][:10]}"
        ),
    )
    table.add_column("method")
    for heading in (
        "target",
        f"minus {_BASELINE}",
        "source",
        "seconds a run",
        "compile s",
        "adapter parameters",
    ):
        table.add_column(heading, justify="right")
    for method in scenario.methods:
        accuracy = of(method, "target_test_accuracy", 100)
        difference = "-"
        if _BASELINE in scenario.methods and method != _BASELINE:
            difference = _format(accuracy - of(_BASELINE, "target_test_accuracy", 100), "+")
        table.add_row(
            method,
            _format(accuracy),
            difference,
            _format(of(method, "source_test_accuracy", 100)),
            f"{np.mean(of(method, 'seconds')):.1f}",
            f"{np.sum(of(method, 'compile_seconds')):.1f}",
            f"{results_parameters(results, method):,}",
        )
    Console().print(table)
    console = Console(width=100, record=True, quiet=True)
    console.print(table)
    folder.write_text("table.txt", console.export_text())


def results_parameters(results: Sequence[Mapping[str, Any]], method: str) -> int:
    """Returns the number of parameters of a method's adapter."""
    return next(r["adapter_parameters"] for r in results if r["method"] == method)


def _format(values: np.ndarray, sign: str = "") -> str:
    mean, error = mean_and_error(values.tolist())
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def save_curves(
    methods: Sequence[str], records: Sequence[Mapping[str, Any]], folder: RunFolder
) -> None:
    """Saves `curves.png`: the target's validation accuracy over steps, mean and standard error over seeds."""
    from matplotlib.figure import Figure  # It takes half a second that --help should not.

    name = "target/validation_accuracy"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        values: dict[int, list[float]] = {}
        for record in records:
            if record["run"].rsplit("-seed", 1)[0] == method:
                values.setdefault(record["step"], []).append(100 * record[name])
        steps = sorted(values)
        means, errors = np.array([mean_and_error(values[step]) for step in steps], float).T
        axes.plot(steps, means, label=method)
        axes.fill_between(steps, means - errors, means + errors, alpha=0.2)
    axes.set(xlabel="step of the target", ylabel="validation accuracy of the target (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.path / "curves.png", dpi=150)
