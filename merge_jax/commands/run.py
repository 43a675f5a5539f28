"""`merge-jax run`: an experiment of the repository, by its name."""

import importlib.util
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from merge_jax.checks import check_choice

__all__ = ["EXPERIMENTS", "run"]

EXPERIMENTS = {
    "cross_structure": "between networks of different structure, on images",
    "cross_task": "between tasks: questions, sentiment, topics; or digits",
    "cross_modal": "between what sees and what reads",
    "self_transfer": "between the layers of one network",
    "ablation": "a grid of settings and methods, with paired tests",
    "anatomy": "what a transfer did to a target, from a run's checkpoints",
}


def run(words: Sequence[str]) -> None:
    """Runs an experiment as `python -m experiments.<name>` does; without words, or with --help, lists them.

    Raises:
      ValueError: no experiment has that name, or the experiments are not there: they are in the repository.
    """
    if not words or words[0] in ("-h", "--help"):
        print("merge-jax run EXPERIMENT [PRESET] [OPTIONS]; --help after EXPERIMENT lists both\n")
        print("\n".join(f"  {name:16} {text}" for name, text in EXPERIMENTS.items()))
        return
    name, *arguments = words
    check_choice("experiment", name, EXPERIMENTS)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    _check_there(name)
    sys.argv = [f"merge-jax run {name}", *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def _check_there(name: str) -> None:
    spec = importlib.util.find_spec("experiments")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if name not in {module.name for module in pkgutil.iter_modules(folders)}:
        raise ValueError(
            f"there is no experiments/{name}.py in {Path.cwd()}: experiments are in the repository of merge_jax, not "
            "in the package; give the command from the repository's root"
        )
