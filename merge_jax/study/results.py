"""The results of a run: one entry per trial, and the table, figures and report of all."""

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge_jax.runs import Run, as_text, draw, followed, html_report, judged, notes, result_tables
from merge_jax.runs.folder import RunFolder
from merge_jax.study.scenario import Scenario
from merge_jax.study.trainer import Trained
from merge_jax.study.trial import Trial

__all__ = ["save_sample_images", "show_results", "trial_result"]

_COLUMNS = 3
_LINE = 52


def trial_result(
    trial: Trial, seed: int, trained: Trained, frozen: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Returns the result entry of a method on a seed.

    Args:
      trial: the method's trial.
      seed: the seed.
      trained: the outcome of its training.
      frozen: the metrics of a source that no method changes, if known; otherwise it is tested.
    """
    state, seconds, compile_seconds, start, records = trained
    metrics = {"target": trial.test(state, seed, "target")}
    metrics["source"] = dict(frozen) if frozen is not None else trial.test(state, seed, "source")
    metric = {role: model.metric for role, model in trial.roles.items()}
    name = f"target/validation_{metric['target']}"
    validation = [record[name] for record in records if name in record]
    rows = trial.method.transfer.describe(state.source.params, state.target.params)
    return {
        "method": trial.name,
        "seed": seed,
        "target_metric": metric["target"],
        "target_test": metrics["target"][metric["target"]],
        "target_start_test": start.get("target_start_test"),
        "target_start_reset": start.get("target_start_reset"),
        "target_start_probe": start.get("target_start_probe"),
        **trial.measure_end(state, seed),
        "target_validation": validation[-1] if validation else None,
        "target_best_validation": max(validation) if validation else None,
        "source_test": metrics["source"][metric["source"]] if metrics["source"] else None,
        "test_metrics": metrics,
        "answers": trial.answers(state) if seed == trial.config.first_seed else {},
        "faults": _count_faults(records),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        # Without the zeros around padded images.
        "adapter_parameters": sum(row.parameters for row in rows),
    }


def _count_faults(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the numbers of skipped updates and rejected transfers, by role; empty if none.

    Steps of a report interrupted by a stop are not counted.
    """
    counts: dict[str, int] = {}
    last = 0
    for record in records:
        steps, last = record["step"] - last, record["step"]
        for metric, mean in record.items():
            if metric.endswith(("/skipped", "/rejected")) and mean:
                counts[metric] = counts.get(metric, 0) + round(mean * steps)
    return counts


def show_results(run: Run, folder: RunFolder) -> None:
    """Prints and saves the table, the figures and the report."""
    text = as_text(result_tables(run), notes(run))
    print(text, end="")
    folder.write_text("table.txt", text)
    print("drawing curves and writing the report", file=sys.stderr)
    curves, label = judged(run)
    draw(curves, label).savefig(folder.path / "curves.png", dpi=150)
    gates, label = followed(run)
    if gates:
        draw(gates, label).savefig(folder.path / "gates.png", dpi=150)
    folder.write_text("report.html", html_report(run))
    print(f"run folder: {run.path}; all of it on one page: {run.path / 'report.html'}")
    export = "" if run.trained is None else f", or merge-jax export {run.trained} FILE.safetensors"
    print(f"next: merge-jax compare {run.path} ANOTHER_RUN, merge-jax summary {run.path}{export}")


def save_sample_images(scenario: Scenario, results: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """Saves `samples.png`: a few test images, if the target has some, with every method's answers for the first seed.

    A mark shows whether an answer is correct. If the source has the same questions, its answers come first.
    """
    samples = scenario.target.sample_images
    if samples is None:
        return
    of_first = {result["method"]: result["answers"] for result in results if result["answers"]}
    answers = {method: of_roles["target"] for method, of_roles in of_first.items()}
    source = None if scenario.source is None else scenario.source.sample_images
    if source is not None and (source.asked, source.right) == (samples.asked, samples.right):
        answers = {"source": next(iter(of_first.values()))["source"], **answers}

    from matplotlib.figure import Figure  # The import takes half a second, too long for --help.

    images = samples.images()
    rows = -(-len(images) // _COLUMNS)
    titles = []
    for i, (asked, right) in enumerate(zip(samples.asked, samples.right, strict=True)):
        lines = [asked] if asked else []
        lines.append(f"truth: {right[0]}")
        lines += [f"{'✓' if given[i] in right else '✗'} {name}: {given[i]}" for name, given in answers.items()]
        titles.append("\n".join(textwrap.fill(line, _LINE, subsequent_indent="    ") for line in lines))
    most = max(title.count("\n") + 1 for title in titles)
    figure = Figure(figsize=(3.6 * _COLUMNS, (2.4 + 0.16 * most) * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=8, loc="left", x=-0.25)
    figure.savefig(folder.path / "samples.png", dpi=150, bbox_inches="tight")
