"""Reports of studies: tables, numbers and pictures of the results that there are."""

import json
import re

import numpy as np
import pytest

from merge_jax.runs.folder import RunFolder
from merge_jax.study.grids.grid import make_runs, select
from merge_jax.study.grids.report import _draw_differences, write_report
from tests.study.grids import grid_of

CURVE = """
seeds = 4
against = ["vanilla", "share"]
[settings.few]
experiment = "cross_structure"
options = { labels = 50 }
curve = "labels"
size = 50
[settings.many]
experiment = "cross_structure"
options = { labels = 100 }
curve = "labels"
size = 100
[rows.vanilla]
method = "vanilla"
[rows.share]
method = "share"
[rows.kd]
method = "kd"
[rows.mergenet]
method = "mergenet"
"""

TESTS = {
    "vanilla": [0.50, 0.60, 0.55, 0.52],
    "share": [0.70, 0.81, 0.75, 0.71],
    "kd": [0.51, 0.55, 0.60, 0.50],
}


@pytest.fixture
def reported(tmp_path):
    """Returns the report of two settings; one row is not done yet, and of another one seed is missing."""
    grid = grid_of(tmp_path, CURVE)
    runs = make_runs(grid)
    folder = RunFolder.open(tmp_path / "study", {"grid": "little"}, resume=False)
    for one in runs:
        results = [
            {
                "method": method,
                "seed": seed,
                "target_metric": "accuracy",
                "target_test": value,
                "target_validation": value + 0.1,
                "target_best_validation": value + 0.2,
                "source_test": 0.9,
                "test_metrics": {"target": {"accuracy": value}},
                "seconds": 2.0 + seed,
                "compile_seconds": 1.0,
                "adapter_parameters": 1234,
            }
            for method, values in TESTS.items()
            for seed, value in enumerate(values)
            if (one.setting.name, method, seed) != ("many", "share", 3)
        ]
        path = folder.path / one.name
        path.mkdir(parents=True)
        (path / "results.json").write_text(json.dumps(results))
    return write_report(grid, runs, folder), folder.path


def test_tables_compare_rows_with_each_that_is_asked_for(reported):
    text, folder = reported
    assert text == (folder / "table.txt").read_text()
    assert max(map(len, text.splitlines())) <= 120
    few = (folder / "table.md").read_text().split("### ")
    assert [part.splitlines()[0] for part in few[1:]] == [
        *["few: test accuracy of the target, %"] * 2,
        *["many: test accuracy of the target, %"] * 2,
    ]
    against_vanilla, against_share = few[1].splitlines(), few[2].splitlines()
    assert against_vanilla[2] == "| row | n | test | validation | - vanilla | p (t) | s/run | adapter |"
    # Differences 0.20, 0.21, 0.20, 0.19: mean 0.20, deviation sqrt(0.0002 / 3), t = 49.
    assert against_vanilla[5] == (r"| share \*\* | 4 | 74.2 ± 2.5 | 84.2 ± 2.5 | +20.0 ± 0.4 | 2e-05 | 3.5 | 1,234 |")
    assert against_vanilla[6].startswith("| kd | 4 | 54.0 ± 2.3 | 64.0 ± 2.3 | -0.2 ± 2.1 |")
    assert against_vanilla[4] == "| vanilla | 4 | 54.2 ± 2.2 | 64.2 ± 2.2 |  |  | 3.5 | 1,234 |"
    assert against_share[4].startswith(r"| vanilla \*\* | 4 | 54.2 ± 2.2 | 64.2 ± 2.2 | -20.0 ± 0.4 | 2e-05 |")
    # Of three rows there are three pairs, though vanilla and share stand in both tables.
    assert "few: 3 comparisons; significant at 0.01 after Holm (**): share - vanilla, " in few[2]
    # Without a seed of one row, the others are compared with it on those that both have: 0.19, 0.26, 0.15 below.
    assert few[4].splitlines()[6].startswith("| kd | 4 | 54.0 ± 2.3 | 64.0 ± 2.3 | -20.0 ± 3.2 |")
    assert few[4].splitlines()[5].startswith("| share | 3 | 75.3 ")
    assert "Not done yet: 9 of 32 results." in text
    assert "cores, Python" in text


def test_numbers_and_pictures_are_saved(reported):
    _, folder = reported
    entries = json.loads((folder / "results.json").read_text())
    assert len(entries) == 23
    assert entries[1] | {"options": None} == {
        "setting": "few",
        "row": "vanilla",
        "seed": 1,
        "metric": "accuracy",
        "test": 0.6,
        "start_test": None,
        "start_reset": None,
        "start_probe": None,
        "probe": None,
        "validation": 0.7,
        "best_validation": 0.8,
        "source_test": 0.9,
        "test_metrics": {"target": {"accuracy": 0.6}},
        "seconds": 3.0,
        "compile_seconds": 1.0,
        "adapter_parameters": 1234,
        "experiment": "cross_structure",
        "preset": "default",
        "method": "vanilla",
        "options": None,
        "routes": None,
        "curve": "labels",
        "size": 50,
        "command": "python -m experiments.cross_structure default --labels 50 --seeds 4 --methods vanilla share kd "
        "mergenet",
    }
    for name in ("differences.png", "sizes.png"):
        assert (folder / name).stat().st_size > 10_000


def test_a_picture_has_one_scale_and_one_spacing_best_first_and_controls_below():
    rows = [("share", 2.0, 1.0, False), ("share of noise", 9.0, 1.0, True), ("kd", 5.0, 1.0, False)]
    panels = {"one": [("kd", -8.0, 1.0, False)], "two": rows, "three": rows[:2], "four": rows}
    figure = _draw_differences(panels, "points")
    assert [panel.get_title() for panel in figure.axes] == ["two", "four", "three", "one"]  # And none is empty.
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["kd", "share", "share of noise"]
    assert len({panel.get_xlim() for panel in figure.axes}) == 1
    figure.canvas.draw()
    spacing = {round(panel.get_window_extent().height / abs(np.subtract(*panel.get_ylim()))) for panel in figure.axes}
    assert max(spacing) - min(spacing) <= 3  # Pixels.


CHOOSING = """
seeds = 2
against = ["vanilla", "inputs_lr"]
[settings.few]
experiment = "cross_structure"
[rows.vanilla]
method = "vanilla"
[rows.share]
method = "share"
choose = { target_rate = [0.1, 1.0] }
"""


def test_a_row_shows_the_choice_with_the_best_validation_beside_opponents(tmp_path):
    """Of which no test accuracy decides, and opponents are compared with, not counted."""
    grid = grid_of(tmp_path, CHOOSING)
    runs = make_runs(grid)
    assert [row.name for row in grid.rows] == ["vanilla", "share target_rate=0.1", "share target_rate=1.0"]
    assert {row.name for run in select(runs, ["share"]) for row in run.rows} >= {row.name for row in grid.rows[1:]}
    folder = RunFolder.open(tmp_path / "study", {"grid": "little"}, resume=False)
    reached = {"vanilla": (0.5, 0.5), "share target_rate=0.1": (0.6, 0.9), "share target_rate=1.0": (0.8, 0.7)}
    for one in runs:
        results = [
            {
                "method": row.method,
                "seed": seed,
                "target_metric": "accuracy",
                "target_test": reached[row.name][0] + 0.01 * seed * (row.method == "share"),
                "target_validation": reached[row.name][1],
                "target_best_validation": 0.9,
                "target_start_test": 0.25,
                "source_test": 0.9,
                "test_metrics": {"target": {"accuracy": 0.5}},
                "seconds": 2.0,
                "compile_seconds": 1.0,
                "adapter_parameters": 0,
            }
            for row in one.rows
            for seed in range(2)
        ]
        path = folder.path / one.name
        path.mkdir(parents=True, exist_ok=True)
        (path / "results.json").write_text(json.dumps(results))
        opponents = [{"opponent": "inputs_lr", "seed": seed, "target_test": 0.55} for seed in range(2)]
        (path / "opponents.json").write_text(json.dumps(opponents))
    text = " ".join(write_report(grid, runs, folder).split())
    table = (folder.path / "table.md").read_text().splitlines()
    assert table[2] == "| row | n | test | after write | validation | - vanilla | p (t) | s/run | adapter |"
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table[4:7]]
    assert rows == ["vanilla", "share", "inputs_lr"]
    assert "| 60.5 ± 0.5 | 25.0 ± 0.0 | 90.0 ± 0.0 |" in table[5]
    assert "Chosen on validation, over all seeds: share target_rate=0.1." in text
    assert "inputs_lr: logistic regression on the raw inputs" in text
    assert len(json.loads((folder.path / "results.json").read_text())) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0.1, 1.0]", "0.1", "the row 'share': choose target_rate must be a list of one value or more, got 0.1"),
        (
            "choose",
            "vary = { target_rate = [1.0] }\nchoose",
            "the row 'share': target_rate cannot both vary and be chosen",
        ),
        ("[rows.vanilla]", "[rows.source]", "the row 'source' has the name of an opponent"),
        ('"inputs_lr"', '"input_lr"', "unknown row in against 'input_lr'; did you mean 'inputs_lr'"),
    ],
)
def test_choices_and_opponents_are_checked(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grid_of(tmp_path, CHOOSING.replace(old, new))
