"""A picture of a few test images with what each model made of them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from merge_jax.runs.folder import RunFolder
from merge_jax.study.scenario import Scenario

__all__ = ["save_samples"]

_COLUMNS = 3
_LINE = 52


def save_samples(scenario: Scenario, results: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """Saves `samples.png`, if the target has samples: each with the answers of every method's target, of seed 0.

    A mark says whether an answer is right. Where the source was asked the same, its answers stand first.
    """
    samples = scenario.target.sample_images
    if samples is None:
        return
    answers = {result["method"]: result["answers"]["target"] for result in results if result["seed"] == 0}
    source = scenario.source
    of_source = None if source is None else source.sample_images
    if of_source is not None and (of_source.asked, of_source.right) == (samples.asked, samples.right):
        answers = {"source": results[0]["answers"]["source"], **answers}

    from matplotlib.figure import Figure  # It takes half a second that --help should not.

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
