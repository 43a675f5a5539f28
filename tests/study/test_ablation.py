"""Studies: a grid that is run, here or in processes, and resumed."""

import json
import os
import shlex
import shutil

import jax
import pytest

import merge_jax.study.grids.runner
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.runs import compare
from merge_jax.study.cli import main
from merge_jax.study.grids import ablation
from merge_jax.study.sources import control_source
from merge_jax.training.joint import TrainState
from tests import tiny
from tests.study.grids import LITTLE, study, write
from tests.study.test_controls import assert_equal_trees


def scores(results):
    return {(one["row"], one["seed"]): (one["test_metrics"], one["validation"]) for one in results}


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    folder = tmp_path_factory.mktemp("little")
    return folder / "study", write(folder, LITTLE), study(write(folder, LITTLE), folder / "study")


@pytest.mark.slow
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


def test_a_study_is_compared_while_it_runs(little, tmp_path):
    """By the folders of its runs that have results so far."""
    folder = tmp_path / "study"
    shutil.copytree(little[0], folder)
    (folder / "digits" / "seldom" / "results.json").unlink()
    text = compare([folder]).text
    rows = [line.split()[:2] for line in text.splitlines() if line.lstrip().startswith(("vanilla ", "shuffled "))]
    assert rows[0] == ["vanilla", "vanilla"]
    assert ["shuffled", "share"] in rows
    assert "seldom" not in text
    for file in folder.glob("digits/*/results.json"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no run of the study .* has results yet"):
        compare([folder])


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


@pytest.mark.slow
@two_cores
def test_a_run_in_a_process_of_its_own_gives_what_one_in_this_does(little, tmp_path, untraced):
    _, path, results = little
    found = study(path, tmp_path / "study", "--jobs", "2", "--only", "vanilla")
    assert scores(found) == {key: value for key, value in scores(results).items() if key[0] in ("vanilla", "share")}


def test_cores_are_shared_among_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    assert merge_jax.study.grids.runner._shares(2) == [{0, 1}, {2, 5, 7}]
    with pytest.raises(ValueError, match="jobs must be at most 5, the number of cores, got 6"):
        merge_jax.study.grids.runner._shares(6)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        merge_jax.study.grids.runner._shares(0)


def test_a_run_that_fails_is_told_and_those_that_need_it_are_not_run(tmp_path, untraced, monkeypatch, capsys):
    begun = []

    def prepare(scenario, config):
        begun.append(config.run_dir.name)
        raise RuntimeError("no memory")

    monkeypatch.setattr(merge_jax.study.grids.runner, "prepare_run", prepare)
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

    monkeypatch.setattr(merge_jax.study.grids.runner, "prepare_run", prepare)
    with pytest.raises(SystemExit) as stopped:
        study(write(tmp_path, LITTLE), tmp_path / "study")
    assert stopped.value.code == 130
    assert f"the same command with --resume --run-dir {tmp_path / 'study'} goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_apart_have_the_results_of_rows_together(tmp_path, untraced):
    path = write(tmp_path, LITTLE)
    together, apart = tmp_path / "together", tmp_path / "apart"
    of_one_run = scores(study(path, together, "--only", "vanilla", "share"))
    assert scores(study(path, apart, "--apart", "--only", "vanilla", "share")) == of_one_run
    assert len(of_one_run) == 2
    assert (apart / "digits" / "share").is_dir()
    assert not (together / "digits" / "share").exists()


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        ablation.main("experiments.ablation", None, list(map(str, words)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(little, untraced, capsys, tmp_path):
    folder, path, _ = little
    assert "already holds this run: add --resume" in refused(capsys, path, "--run-dir", folder)
    changed = write(tmp_path, LITTLE.replace("cycle = 2", "cycle = 3"))
    assert "cycle was 2, is 3" in refused(capsys, changed, "--run-dir", folder, "--resume")
    assert "there is no run to resume" in refused(capsys, path, "--run-dir", tmp_path / "none", "--resume")
    assert "unknown grid 'smok'; did you mean 'smoke'" in refused(capsys, "smok")
    assert "there is no grid smok.toml" in refused(capsys, "smok.toml")
