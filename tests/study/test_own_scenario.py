"""A scenario of a user's own, as the documents show it."""

import json
import re
import sys

import pytest

from merge_jax.commands import main
from tests import ROOT

(CODE,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "your_own_scenario.md").read_text(), re.M | re.S)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    (tmp_path / "my_scenario.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [])


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
