"""Curves of a run over its steps."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from merge_jax.runs.run import Run, mean_and_error, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "as_svg", "draw", "followed", "judged", "overlaid"]

_NOT_DRAWN = tuple(
    f"adapter/{name}" for name in ("transferred", "change", "norm", "norm_before", "gradient_norm", "snapshot")
)


class Curve(NamedTuple):
    """A metric over steps: the mean and the standard error over seeds."""

    steps: Sequence[int]
    means: np.ndarray
    errors: np.ndarray


def judged(run: Run) -> tuple[dict[str, Curve], str]:
    """Returns the curve of each method's validation metric, and its title.

    Without a validation split, it is the accuracy on the batches.
    """
    metric = run.plan.target.metric
    validated = any(f"target/validation_{metric}" in record for record in run.records)
    name = f"target/validation_{metric}" if validated else "target/accuracy"
    label = f"validation {words(metric)}" if validated else "training accuracy"
    return {method: _curve(run, method, name, 100) for method in run.methods}, f"{label} of the target (%)"


def followed(run: Run) -> tuple[dict[str, Curve], str]:
    """Returns the curves of gates and other monitored values of a transfer, if any, and their title."""
    names = {
        (method, name)
        for record in run.records
        for name in record
        if name.startswith("adapter/") and name not in _NOT_DRAWN and not name.endswith(("/skipped", "/rejected"))
        for method in [record["run"].rsplit("-seed", 1)[0]]
        if method in run.methods
    }
    curves = {f"{method}: {name.removeprefix('adapter/')}": _curve(run, method, name) for method, name in sorted(names)}
    return curves, "gates of the transfer, means"


def overlaid(runs: Mapping[str, Run]) -> tuple[dict[str, Curve], str]:
    """Returns the curves of several runs, by name and method."""
    curves, labels = {}, []
    for name, run in runs.items():
        of_run, label = judged(run)
        curves |= {f"{name}: {method}": curve for method, curve in of_run.items()}
        labels.append(label)
    return curves, " / ".join(dict.fromkeys(labels))


def _curve(run: Run, method: str, name: str, scale: float = 1.0) -> Curve:
    values: dict[int, list[float]] = {}
    for record in run.records:
        # A non-finite number is stored as text.
        if record["run"].rsplit("-seed", 1)[0] == method and name in record:
            values.setdefault(record["step"], []).append(scale * float(record[name]))
    steps = sorted(values)
    pairs = [mean_and_error(values[step]) for step in steps]
    means, errors = np.array([(mean, error or 0.0) for mean, error in pairs], float).reshape(-1, 2).T
    return Curve(steps, means, errors)


def draw(curves: Mapping[str, Curve], label: str) -> "Figure":
    """Returns the figure of curves."""
    from matplotlib.figure import Figure  # The import takes half a second, too long for --help.

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (steps, means, errors) in curves.items():
        axes.plot(steps, means, label=name, marker="." if len(steps) < 20 else None)
        axes.fill_between(steps, means - errors, means + errors, alpha=0.2)
    axes.set(xlabel="step of the target", ylabel=label)
    axes.grid(alpha=0.3)
    if len(curves) <= 4:
        axes.legend()
    else:  # Beside the curves: it would hide some of them.
        figure.set_size_inches(10, max(4.5, 0.25 * len(curves)))
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def as_svg(figure: "Figure") -> str:
    """Returns a figure as SVG, the same text for the same curves."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "merge_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
