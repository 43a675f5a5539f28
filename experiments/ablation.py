"""A study: many settings by many rows, with controls and statistics, from one TOML file.

    python -m experiments.ablation smoke             # one tiny setting; a minute or two, checks that all works
    python -m experiments.ablation digits            # across structures on digits, with controls of the source
    python -m experiments.ablation digits --jobs 2   # two runs at a time, each on its share of the cores
    python -m experiments.ablation digits --executor dask:10.0.0.1:8786   # on the workers of a Dask scheduler
    python -m experiments.ablation my_grid.toml      # your own grid
    python -m experiments.ablation digits --resume   # continue the last one
    python -m experiments.ablation --help

Grids are in experiments/grids/. Each row of each setting is one command of an experiment; --dry-run prints these
commands. Everything is checked before any training. The first run of a setting trains its source. Other runs read it if
their options cannot change it; results are identical.
"""

from merge_jax.study.grids.ablation import main

if __name__ == "__main__":
    main(__spec__.name, __doc__)
