"""A little grid for tests, and what writes, reads and runs one."""

import json

from merge_jax.study.grids import ablation
from merge_jax.study.grids.grid import read_grid

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


def grid_of(tmp_path, text):
    return read_grid(write(tmp_path, text))
