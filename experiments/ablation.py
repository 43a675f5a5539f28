"""A study: many settings by many rows, with controls and statistics, from one TOML file.

    python -m experiments.ablation smoke             # one tiny setting; a minute or two, shows that it works
    python -m experiments.ablation digits            # across structures on digits, with controls of the source
    python -m experiments.ablation digits --jobs 2   # two runs at a time, each on its share of the cores
    python -m experiments.ablation digits --executor dask:10.0.0.1:8786   # by the workers of a Dask scheduler
    python -m experiments.ablation my_grid.toml      # your own grid
    python -m experiments.ablation digits --resume   # go on with the last one
    python -m experiments.ablation --help

Grids stand in experiments/grids/. Each row in each setting is a command of an experiment; --dry-run prints them.
Everything is checked before anything trains. A setting's source is trained once, by its first run, and read by the
others where their options cannot touch it; results are the same to the digit.
"""

from merge_jax.study.ablation import main

if __name__ == "__main__":
    main(__spec__.name, __doc__)
