"""A scenario of a user's own, as the documents show it."""

import json
import re
import sys

import pytest

import merge_jax as mj
from merge_jax import study
from merge_jax.commands import main
from merge_jax.study.methods import make_methods
from tests import ROOT

(CODE,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "your_own_scenario.md").read_text(), re.M | re.S)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    (tmp_path / "my_scenario.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [])


@pytest.mark.slow
def test_it_runs_by_its_name(tmp_path):
    main(["run", "my_scenario", "smoke", "--methods", "vanilla", "share", "kd", "agree", "--run-dir", "run"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [result["method"] for result in results] == ["vanilla", "share", "kd", "agree"]
    assert all(0 <= result["target_test"] <= 1 for result in results)
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_its_help_has_its_options_and_those_of_every_run(capsys):
    with pytest.raises(SystemExit):
        main(["run", "my_scenario", "--help"])
    shown = capsys.readouterr().out
    for text in ("Examples that the target learns from", "--agree", "--resume", "PRESET is one of default, smoke"):
        assert text in shown


def own(**options):
    model = {"name": "m", "init": None, "loss": None, "optimizer": lambda steps: None, "splits": None, "evaluate": None}
    target = study.StudyModel(**model, apply=lambda *unused, **options: None, inputs=("x",))
    return make_methods(study.TransferOptions(), target, target, [], 10, **options)


@pytest.mark.parametrize("name", ["", "vanilla", "agree", "share", "share_kd", "aligned", "mergenet"])
@pytest.mark.parametrize("kind", ["transfers", "objectives"])
def test_a_name_that_means_another_method_is_refused(kind, name):
    value = mj.share_transfer if kind == "transfers" else study.Objective(loss=None)
    with pytest.raises(ValueError, match=f"the {kind[:-1]} '{name}' has the name of an existing method"):
        own(**{kind: {name: value}})


def test_names_of_ones_own_are_there_beside_the_others():
    found = own(transfers={"mine": mj.share_transfer}, objectives={"kd": study.Objective(loss=None)})
    assert {"mine", "mine_kd", "mine_kd_agree", "share_kd", "vanilla"} <= found.keys()
    with pytest.raises(ValueError, match=r"the objective 'kd' must be an Objective\(loss, teacher\)"):
        own(objectives={"kd": len})


def test_a_model_that_can_be_looked_into_names_its_inputs():
    with pytest.raises(ValueError, match="the model 'm' has an apply function and no inputs"):
        study.StudyModel(
            name="m", init=None, loss=None, optimizer=None, splits=None, evaluate=None, apply=lambda *unused: None
        )
