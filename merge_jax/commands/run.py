"""`merge-jax run`: runs an experiment by name, or by the path of its module."""

import os
import runpy
import sys
from collections.abc import Sequence

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
    """Runs an experiment like `python -m`, from any folder; without arguments, or with --help, lists built-in ones.

    Your own experiment is named by its module: `my_experiment` for my_experiment.py, or `package.module`.

    Raises:
      ValueError: there is no such experiment; near misses are listed.
    """
    if not words or words[0] in ("-h", "--help"):
        print("merge-jax run EXPERIMENT [PRESET] [OPTIONS]; --help after EXPERIMENT lists both\n")
        print("\n".join(f"  {name:16} {text}" for name, text in EXPERIMENTS.items()))
        print("\nan experiment of your own is named by its module: merge-jax run my_experiment")
        return
    from merge_jax.study.experiment import find_experiment

    name, *arguments = words
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = find_experiment(name)
    sys.argv = [f"merge-jax run {name}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
