"""Studies: a grid that is read, checked, run, resumed and reported."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

import merge_jax.study.grid_runner
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.runs.folder import RunFolder
from merge_jax.study import ablation
from merge_jax.study.cli import main, parse
from merge_jax.study.experiment import find_grid, load_experiment
from merge_jax.study.grid import make_runs, read_grid, select
from merge_jax.study.report import write_report
from merge_jax.study.sources import control_source
from merge_jax.training.joint import TrainState
from tests import ROOT, tiny
from tests.study.test_controls import assert_equal_trees

# Four steps. The last two rows read the source that the first two train.
LITTLE = """
seeds = 1
against = ["vanilla", "share"]

[settings.digits]
experiment = "tests.tiny"
options = { adapter_learning_rate = 0.02 }
routes = { bias = ["fc/bias=fc/bias"] }

[rows.vanilla]
method = "vanilla"
[rows.share]
method = "share"
[rows.shuffled]
method = "share"
options = { source_control = "shuffled" }
[rows.seldom]
method = "share"
routes = "bias"
options = { cycle = 2, stop = 0.5, labels = 50 }
"""


def write(folder, text):
    path = folder / "little.toml"
    path.write_text(text)
    return path


def study(path, folder, *options):
    ablation.main("experiments.ablation", None, [str(path), "--run-dir", str(folder), *options])
    return json.loads((folder / "results.json").read_text())


def scores(results):
    return {(one["row"], one["seed"]): (one["test_metrics"], one["validation"]) for one in results}


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    folder = tmp_path_factory.mktemp("little")
    return folder / "study", write(folder, LITTLE), study(write(folder, LITTLE), folder / "study")


@pytest.fixture
def untraced(monkeypatch):
    """Leaves out the tracing, which takes the seconds of a check."""
    monkeypatch.setattr(merge_jax.study.grid_runner, "check_run", lambda scenario, config: None)


def test_a_source_that_is_read_gives_what_one_of_its_own_does_bit_for_bit(little, tmp_path):
    """The command of a row, run by itself, trains its own source."""
    folder, _, results = little
    (read,) = [one for one in results if one["row"] == "seldom"]
    _, _, module, *words = shlex.split(read["command"])
    assert module == "tests.tiny"
    assert "frozen" not in words
    main(tiny.PRESETS, "tests.tiny", "", tiny.build, [*words, "--run-dir", str(tmp_path / "run")])
    (alone,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert alone["test_metrics"] == read["test_metrics"]
    assert alone["target_validation"] == read["validation"]
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    of_methods = [record for record in records if '"source-seed' not in record]
    assert len(of_methods) == 2 < len(records)
    assert of_methods == (folder / "digits" / "seldom" / "metrics.jsonl").read_text().splitlines()


def test_methods_are_handed_the_source_that_the_control_makes_of_the_trained_one(little):
    folder, *_ = little
    params, _ = tiny.build(tiny.Config()).source.init(jax.random.key(0))

    def saved(path, role):
        with Checkpoints(folder / "digits" / path) as checkpoints:
            parts = checkpoints.restore_parts(checkpoints.latest_step, {f"{role}/params": params})
        return TrainState(parts[f"{role}/params"], {}, None)

    trained = saved("vanilla/checkpoints/source-seed0", "target")
    handed = saved("shuffled/checkpoints/share-seed0", "source")
    assert_equal_trees(handed.params, control_source("shuffled", trained, 0).params)
    assert_equal_trees(saved("seldom/checkpoints/share-seed0", "source").params, trained.params)


def test_a_study_leaves_what_a_reader_needs(little, capsys):
    folder, path, results = little
    assert [one["row"] for one in results] == ["vanilla", "share", "shuffled", "seldom"]
    assert results[3]["options"]["cycle"] == 2
    for name in ("table.txt", "table.md", "differences.png", "README.md", "environment.json", "digits/seldom.log"):
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "sizes.png").exists()  # No setting is of a curve.
    assert (folder / "grid.toml").read_text() == path.read_text()
    (session,) = json.loads((folder / "digits" / "seldom" / "environment.json").read_text())
    assert session["command"].startswith("python -m tests.tiny default --adapter-learning-rate 0.02 --cycle 2 ")
    assert session["command"] in (folder / "digits" / "seldom" / "README.md").read_text()
    # The source was trained once.
    assert [path.parent.parent.name for path in folder.glob("digits/*/checkpoints/source-seed0")] == ["vanilla"]


def test_a_study_goes_on_where_it_was(little, tmp_path, capsys):
    """In whatever folder: what is done stays, a run that was begun goes on, and one that is missing is run."""
    folder, path, results = little
    copied = tmp_path / "study"
    shutil.copytree(folder, copied)
    (copied / "digits" / "seldom" / "results.json").unlink()
    shutil.rmtree(copied / "digits" / "shuffled")
    kept = (copied / "digits" / "vanilla" / "environment.json").read_text()
    again = study(path, copied, "--resume")
    assert scores(again) == scores(results)
    assert (copied / "digits" / "vanilla" / "environment.json").read_text() == kept
    assert "3 runs of 4 rows: 1 done, 2 to do" in capsys.readouterr().out
    assert scores(study(path, copied, "--resume")) == scores(results)
    assert "3 runs of 4 rows: 3 done, 0 to do" in capsys.readouterr().out


two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to share"
)


@two_cores
def test_a_run_in_a_process_of_its_own_gives_what_one_in_this_does(little, tmp_path, untraced):
    _, path, results = little
    found = study(path, tmp_path / "study", "--jobs", "2", "--only", "vanilla")
    assert scores(found) == {key: value for key, value in scores(results).items() if key[0] in ("vanilla", "share")}


@two_cores
@pytest.mark.parametrize(
    ("slow", "failing", "expected"),
    [
        ("vanilla", None, ["vanilla", "longer", "longest", "shuffled", "seldom"]),
        ("longer", None, ["vanilla", "longer", "longest", "shuffled", "seldom"]),
        ("longer", "vanilla", ["vanilla", "longer", "longest"]),
    ],
)
def test_of_two_jobs_those_that_train_a_source_come_first(
    slow, failing, expected, tmp_path, untraced, monkeypatch, capsys
):
    """Those that read it wait until it is there, and are not run where it failed."""
    begun, at_once = [], []

    def start(one, cores):
        name = one.folder.path.name
        ended = {other for other, process in begun if process.poll() is not None}
        at_once.append(len(begun) - len(ended) + 1)
        assert one.base is None or one.base.removeprefix("digits/") in ended
        one.log.parent.mkdir(parents=True, exist_ok=True)
        one.log.write_text("half\r\nthe last line\n")
        code = f"import time, sys; time.sleep({1 if name == slow else 0}); sys.exit({int(name == failing)})"
        begun.append((name, subprocess.Popen([sys.executable, "-S", "-c", code])))
        return begun[-1][1]

    monkeypatch.setattr(merge_jax.study.grid_runner, "_start", start)
    monkeypatch.setattr(merge_jax.study.grid_runner, "write_report", lambda *arguments: "")
    rows = "[rows.{}]\nmethod = 'share'\noptions = {{ source_steps = {} }}\n"
    path = write(tmp_path, LITTLE + rows.format("longer", 6) + rows.format("longest", 8))
    words = [str(path), "--run-dir", str(tmp_path / "study"), "--jobs", "2"]
    if failing is None:
        ablation.main("experiments.ablation", None, words)
    else:
        with pytest.raises(SystemExit) as stopped:
            ablation.main("experiments.ablation", None, words)
        assert stopped.value.code == 1
        printed = capsys.readouterr().out
        assert "vanilla.log: the last line" in printed
        assert printed.count("the run that trains its source, digits/vanilla, failed") == 2
    assert [name for name, _ in begun] == expected
    assert max(at_once) == 2


@two_cores
@pytest.mark.parametrize("heard", [True, False])
def test_processes_end_with_a_study_that_is_interrupted(heard, tmp_path, untraced, monkeypatch):
    begun = []
    disposition = "default_int_handler" if heard else "SIG_IGN"
    code = f"import signal, time; signal.signal(signal.SIGINT, signal.{disposition}); print(flush=True); time.sleep(60)"

    def start(one, cores):
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()  # Now it hears, or not.
        process.stdout.close()
        begun.append(process)
        return process

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_jax.study.grid_runner, "_start", start)
    monkeypatch.setattr(merge_jax.study.grid_runner, "_PATIENCE", 10 if heard else 0.2)
    monkeypatch.setattr(
        merge_jax.study.grid_runner, "time", SimpleNamespace(sleep=interrupt, perf_counter=time.perf_counter)
    )
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE), tmp_path / "study", "--jobs", "2")
    assert stopped.value.code == 130
    assert [process.poll() for process in begun] == [-signal.SIGINT if heard else -signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_process_is_held_to_its_cores_from_the_start(tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("processes cannot be held to cores here")
    before = os.sched_getaffinity(0)
    core = max(before)
    one = SimpleNamespace(
        config=SimpleNamespace(compilation_cache="default"),
        log=tmp_path / "run.log",
        command=["python", "-c", "import os; print(os.sched_getaffinity(0))"],
        begun=False,
    )
    assert merge_jax.study.grid_runner._start(one, {core}).wait() == 0
    assert one.log.read_text().strip() == f"{{{core}}}"
    assert os.sched_getaffinity(0) == before


def test_cores_are_shared_among_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    assert merge_jax.study.grid_runner._shares(2) == [{0, 1}, {2, 5, 7}]
    with pytest.raises(ValueError, match="jobs must be at most 5, the number of cores, got 6"):
        merge_jax.study.grid_runner._shares(6)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        merge_jax.study.grid_runner._shares(0)


def test_a_run_that_fails_is_told_and_those_that_need_it_are_not_run(tmp_path, untraced, monkeypatch, capsys):
    begun = []

    def prepare(scenario, config):
        begun.append(config.run_dir.name)
        raise RuntimeError("no memory")

    monkeypatch.setattr(merge_jax.study.grid_runner, "prepare_run", prepare)
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE), tmp_path / "study")
    assert stopped.value.code == 1
    assert begun == ["vanilla"]
    printed = capsys.readouterr()
    assert "digits: vanilla, share: failed, see" in printed.out
    assert "no memory; 2 to do" in printed.out
    assert "the run that trains its source, digits/vanilla, failed; 0 to do" in printed.out
    assert "error: 3 of 3 runs failed: digits/vanilla, digits/shuffled, digits/seldom" in printed.err
    assert "Traceback" in (tmp_path / "study" / "digits" / "vanilla.log").read_text()


def test_an_interrupted_study_says_how_it_goes_on(tmp_path, untraced, monkeypatch, capsys):
    def prepare(scenario, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_jax.study.grid_runner, "prepare_run", prepare)
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE), tmp_path / "study")
    assert stopped.value.code == 130
    assert f"the same command with --resume --run-dir {tmp_path / 'study'} goes on" in capsys.readouterr().err


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


def test_rows_apart_have_the_results_of_rows_together(tmp_path, untraced):
    path = write(tmp_path, LITTLE)
    together, apart = tmp_path / "together", tmp_path / "apart"
    of_one_run = scores(study(path, together, "--only", "vanilla", "share"))
    assert scores(study(path, apart, "--apart", "--only", "vanilla", "share")) == of_one_run
    assert len(of_one_run) == 2
    assert (apart / "digits" / "share").is_dir()
    assert not (together / "digits" / "share").exists()


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


def grid_of(tmp_path, text):
    return read_grid(write(tmp_path, text))


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/grids/*.toml")), ids=lambda path: path.stem)
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
            "tests.helpers is no experiment: it has no PRESETS and no build",
        ),
        ('"tests.tiny"', '"tests.tiny"\npreset = "defalt"', "unknown preset 'defalt'; did you mean 'default'"),
        ('method = "vanilla"', 'method = "vanila"', "unknown method 'vanila'; did you mean 'vanilla'"),
        ("cycle = 2", "cycl = 2", "'seldom' of the setting 'digits': unknown option 'cycl'; did you mean 'cycle'"),
        ("cycle = 2", "seeds = 2", "seeds is no option of a row: seeds stand at the top of the grid, or in a setting"),
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
        ('"vanilla", "share"]', '"share", "share"]', "a row stands twice in against: 'share'"),
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


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        ablation.main("experiments.ablation", None, list(map(str, words)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(little, untraced, capsys, tmp_path):
    folder, path, _ = little
    assert "already holds this run: add --resume" in refused(capsys, path, "--run-dir", folder)
    assert "seeds was 1, is 2" in refused(capsys, path, "--run-dir", folder, "--resume", "--seeds", "2")
    changed = write(tmp_path, LITTLE.replace("cycle = 2", "cycle = 3"))
    assert "cycle was 2, is 3" in refused(capsys, changed, "--run-dir", folder, "--resume")
    assert "there is no run to resume" in refused(capsys, path, "--run-dir", tmp_path / "none", "--resume")
    assert "unknown grid 'smok'; did you mean 'smoke'" in refused(capsys, "smok")
    assert "there is no grid smok.toml" in refused(capsys, "smok.toml")


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
