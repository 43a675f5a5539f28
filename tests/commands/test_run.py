"""The command that runs an experiment: by a name or a module, from any folder."""

import subprocess
import sys

from merge_jax.commands.run import EXPERIMENTS
from tests import ROOT
from tests.commands.helpers import refused, said


def test_experiments_are_listed_and_near_misses_named(capsys):
    printed = said(capsys, "run")
    assert all(name in printed for name in EXPERIMENTS)
    assert refused(capsys, "run", "cross_structur").startswith(
        "unknown experiment 'cross_structur'; did you mean 'cross_s"
    )


def test_an_experiment_runs_by_its_name(tmp_path):
    words = [sys.executable, "-m", "merge_jax", "run", "cross_structure", "smoke"]
    help_text = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_text.returncode == 0
    assert "PRESET is one of default" in help_text.stdout
    wrong = subprocess.run([*words, "--batch-size", "0"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: batch_size must be at least 1, got 0"


def test_experiments_run_from_any_folder(tmp_path):
    """As the installed package brings them, where no repository is at hand."""
    words = [sys.executable, "-m", "merge_jax", "run", "cross_task", "--help"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "python -m merge_jax.experiments.cross_task" in " ".join(shown.stdout.split())


def test_an_experiment_of_ones_own_is_named_by_its_module(tmp_path):
    words = [sys.executable, "-m", "merge_jax", "run", "tests.tiny", "--steps", "0"]
    wrong = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert wrong.stderr.strip() == "error: steps must be at least 1, got 0"
