"""Experiments run in this process, with little of everything."""

import json

from experiments import cross_modal, cross_structure, cross_task, self_transfer
from merge_jax.study.cli import main
from tests import tiny

# The tiny one is for what all experiments have in common.
EXPERIMENTS = {
    "cross_modal": cross_modal,
    "cross_structure": cross_structure,
    "cross_task": cross_task,
    "self_transfer": self_transfer,
    "tiny": tiny,
}


def run(experiment, folder, *options):
    """Runs an experiment and returns its results and the records of its metrics."""
    module = EXPERIMENTS[experiment]
    words = [*map(str, options), "--run-dir", str(folder)]
    main(module.PRESETS, f"experiments.{experiment}", "", module.build, words)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "results.json").read_text()), records
