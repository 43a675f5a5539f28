"""Grids: the runs that they are made into, the sources that these share, and what is refused before anything trains."""

import pytest

from merge_jax.study.cli import parse
from merge_jax.study.experiment import find_grid, load_experiment
from merge_jax.study.grids import ablation
from merge_jax.study.grids.grid import make_runs, read_grid, select
from tests import ROOT
from tests.study.grids import LITTLE, grid_of, study, write


def dry_run(path, capsys, *options):
    ablation.main("experiments.ablation", None, [str(path), "--run-dir", "d", "--dry-run", *options])
    return [line.removeprefix("python -m tests.") for line in capsys.readouterr().out.splitlines()]


def test_a_dry_run_prints_commands(tmp_path, untraced, capsys):
    path = write(tmp_path, LITTLE)
    read = "--source frozen --source-from d/digits/vanilla"
    assert dry_run(path, capsys) == [
        "tiny default --adapter-learning-rate 0.02 --seeds 1 --methods vanilla share --run-dir d/digits/vanilla",
        "tiny default --adapter-learning-rate 0.02 --source-control shuffled --seeds 1 --methods share"
        f" {read} --run-dir d/digits/shuffled",
        "tiny default --adapter-learning-rate 0.02 --cycle 2 --labels 50 --routes fc/bias=fc/bias --stop 0.5 --seeds 1"
        f" --methods share {read} --run-dir d/digits/seldom",
    ]
    assert not (tmp_path / "d").exists()


def test_rows_apart_are_runs_of_their_own_that_share_a_source(tmp_path, untraced, capsys):
    path = write(tmp_path, LITTLE)
    vanilla, share, *others = dry_run(path, capsys, "--apart")
    assert vanilla == "tiny default --adapter-learning-rate 0.02 --seeds 1 --methods vanilla --run-dir d/digits/vanilla"
    assert share == (
        "tiny default --adapter-learning-rate 0.02 --seeds 1 --methods share"
        " --source frozen --source-from d/digits/vanilla --run-dir d/digits/share"
    )
    assert others == dry_run(path, capsys)[1:]


def test_sources_are_shared_where_options_cannot_touch_them(tmp_path, untraced, capsys):
    rows = """
[rows.other_seed]
method = "share"
options = { source_control = "other_seed" }
[rows.random]
method = "share"
options = { source_control = "random" }
[rows.longer]
method = "share"
options = { source_steps = 6 }
[rows.slower]
method = "share"
options = { adapter_learning_rate = 0.001 }
"""
    lines = dry_run(write(tmp_path, LITTLE + rows), capsys)
    assert "--adapter-learning-rate 0.001" in lines[-1]  # What a row says is stronger than its setting.
    read = {line.split()[-1]: "frozen" in line for line in lines}
    assert read == {
        "d/digits/vanilla": False,
        "d/digits/shuffled": True,
        "d/digits/seldom": True,
        "d/digits/other_seed": False,
        "d/digits/random": False,
        "d/digits/longer": False,
        "d/digits/slower": True,
    }


def test_a_model_that_is_its_own_source_shares_none(tmp_path, untraced, capsys):
    path = write(
        tmp_path,
        """
[settings.inside]
experiment = "self_transfer"
preset = "smoke"
[rows.vanilla]
method = "vanilla"
[rows.warm]
method = "mergenet_warm"
options = { capped = false }
""",
    )
    lines = dry_run(path, capsys, "--seeds", "3")
    assert [line.split("--seeds ")[1] for line in lines] == [
        "3 --methods vanilla --run-dir d/inside/vanilla",
        "3 --methods mergenet_warm --run-dir d/inside/warm",
    ]
    assert "--no-capped" in lines[1]


CROSSED = """
[settings.a_1]
experiment = "cross_modal"
preset = "smoke"
routes = { one = ["a=b"], two = ["a=b", "c=d"] }
[settings.b_1]
experiment = "cross_modal"
seeds = 3
[rows.plain]
method = "vanilla"
[rows.by]
method = "share"
options = { labels = 10 }
vary = { routes = ["one", "two"], capped = [true, false], cycle = [1, 4] }
settings = ["a_*"]
"""


def test_a_crossing_is_a_row_for_each_choice_of_its_values(tmp_path):
    grid = grid_of(tmp_path, CROSSED)
    names = [row.name for row in grid.rows]
    assert names[:3] == ["plain", "by routes=one capped=true cycle=1", "by routes=one capped=true cycle=4"]
    assert len(names) == 9
    runs = make_runs(grid)
    assert [run.name for run in runs][-2:] == ["a_1/by_routes=two_capped=false_cycle=4", "b_1/plain"]
    assert runs[1].arguments == [
        *("smoke", "--capped", "--cycle", "1", "--labels", "10", "--routes", "a=b", "--seeds", "10"),
        *("--methods", "share"),
    ]
    assert runs[-2].arguments[1:8] == ["--no-capped", "--cycle", "4", "--labels", "10", "--routes", "a=b"]
    assert runs[-1].arguments == ["default", "--seeds", "3", "--methods", "vanilla"]
    assert {run.setting.seeds for run in make_runs(read_grid(tmp_path / "little.toml", seeds=2))} == {2}


def test_only_takes_runs_by_setting_row_or_both(tmp_path):
    runs = make_runs(grid_of(tmp_path, CROSSED))

    def names(*patterns):
        return [run.name for run in select(runs, patterns)]

    assert names() == [run.name for run in runs]
    assert names("plain") == ["a_1/plain", "b_1/plain"]
    assert names("b_*") == ["b_1/plain"]
    assert names("a_1/plain", "b_1") == ["a_1/plain", "b_1/plain"]
    assert len(names("by *")) == 8
    with pytest.raises(ValueError, match="unknown setting or row in --only 'plane'; did you mean 'plain'"):
        names("plane")


@pytest.mark.parametrize(
    "path",
    [
        # One within an experiment and one of several settings; CI runs them all.
        pytest.param(path, id=path.stem, marks=() if path.stem in ("smoke", "digits") else pytest.mark.slow)
        for path in sorted(ROOT.glob("experiments/grids/*.toml"))
    ],
)
def test_the_grids_that_come_along_are_right(path):
    assert find_grid(path.stem) == path
    for one in make_runs(read_grid(path)):
        module = load_experiment(one.setting.experiment)
        parse(module.PRESETS, "", "", one.arguments).check()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"tests.tiny"',
            '"cross_struktur"',
            "unknown experiment 'cross_struktur'; did you mean 'cross_structure'",
        ),
        (
            '"tests.tiny"',
            '"tests.helpers"',
            "tests.helpers is not an experiment: it has no PRESETS and no build",
        ),
        ('"tests.tiny"', '"tests.tiny"\npreset = "defalt"', "unknown preset 'defalt'; did you mean 'default'"),
        ('method = "vanilla"', 'method = "vanila"', "unknown method 'vanila'; did you mean 'vanilla'"),
        ("cycle = 2", "cycl = 2", "'seldom' of the setting 'digits': unknown option 'cycl'; did you mean 'cycle'"),
        (
            "cycle = 2",
            "seeds = 2",
            "seeds is not an option of a row: seeds stand at the top of the grid, or in a setting",
        ),
        (
            "cycle = 2",
            "source_epochs = 0",
            "'seldom' of the setting 'digits': source_epochs must be a whole number of at least",
        ),
        ("cycle = 2", "cycle = [[1]]", "cycle must be a string, a number, a truth value or a list of such"),
        ("cycle = 2", 'cycle = "two"', "of the setting 'digits': its command is python -m tests.tiny default"),
        ('"bias"\n', '"bia"\n', "unknown list of routes 'bia'; did you mean 'bias'"),
        ("fc/bias=fc/bias", "fc/bias", "a route must be target=source, such as fc/kernel=fc/kernel, got 'fc/bias'"),
        ('routes = "bias"', 'route = "head"', "the row 'seldom': unknown key 'route'; did you mean 'routes'"),
        ('routes = "bias"', "routes = 1", "the row 'seldom': routes must be str | None, got 1"),
        ('routes = "bias"', 'settings = ["digit"]', "the row 'seldom' matches no setting with 'digit'"),
        ('routes = "bias"', "vary = { stop = 0.1 }", "the row 'seldom': vary stop must be a list of one value or more"),
        ('"vanilla", "share"]', '"vanila"]', "unknown row in against 'vanila'; did you mean 'vanilla'"),
        ('"vanilla", "share"]', '"share", "share"]', "a row appears twice in against: 'share'"),
        ("[rows.seldom]", "[rows.share]", "little.toml cannot be read: "),
        ("[rows.seldom]", "[rows.'../seldom']", "row '../seldom': a name is letters, digits"),
        ("seeds = 1", "seeds = ", "(at line 2, column 9)"),
        ("seeds = 1", "seeds = 0", "seeds must be at least 1, got 0"),
        ("seeds = 1", 'seeds = "1"', "the grid: seeds must be int, got '1'"),
        (
            "options = { adapter_learning_rate = 0.02 }",
            'curve = "c"',
            "the setting 'digits': curve and size go together",
        ),
        ('experiment = "tests.tiny"', "", "the setting 'digits': there is no experiment"),
        (
            'options = { source_control = "shuffled" }',
            "",
            "'share' and 'shuffled' of the setting 'digits' are the same",
        ),
        (
            "adapter_learning_rate = 0.02",
            'source = "live"',
            "source_control is for a source that is pretrained or frozen",
        ),
    ],
)
def test_a_wrong_grid_is_refused_in_a_line_before_anything_trains(old, new, message, tmp_path, untraced, capsys):
    assert old in LITTLE
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE.replace(old, new, 1)), tmp_path / "study")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stop = 0.5", "stop = 0.1", "'seldom' of the setting 'digits': stop is 0.1 of 4 steps"),
        ("cycle = 2", "cycle = 0", "'seldom' of the setting 'digits': cycle must be a whole number of at least 1"),
        ("fc/bias=", "fc/bais=", "'seldom' of the setting 'digits': unknown target path 'fc/bais'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_trains(old, new, message, tmp_path, capsys):
    """By tracing all runs."""
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE.replace(old, new)), tmp_path / "study")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
