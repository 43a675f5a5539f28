"""Unlabelled inputs: a pool of them beside the labelled examples, for all methods that can use it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from merge_jax.checks import check_entries
from merge_jax.data import Arrays, class_balanced, num_examples, take
from merge_jax.study.scenario import POOL, StudyModel

__all__ = ["check_pool", "draw_pool", "inputs_of", "pool_inputs"]


def check_pool(train: Arrays, labels: int | None, unlabelled: int) -> None:
    """Raises ValueError unless there are so many training examples beside the labelled ones."""
    total = num_examples(train)
    left = 0 if labels is None else total - labels
    if unlabelled > left:
        has = "all are labelled" if labels is None else f"{labels} are labelled"
        raise ValueError(
            f"unlabelled is {unlabelled}, but of {total} training examples {has}, which leaves {left}: give fewer"
        )


def draw_pool(train: Arrays, labels: int, unlabelled: int, seed: int, inputs: tuple[str, ...]) -> dict[str, Any]:
    """Returns the inputs of the labelled examples, those that `class_balanced` draws, and then of so many others.

    What is drawn first of the others is the same however many there are.
    """
    total = num_examples(train)
    labelled = class_balanced({"row": np.arange(total), "label": train["label"]}, labels, seed)["row"]
    others = np.random.default_rng([seed, labels]).permutation(np.setdiff1d(np.arange(total), labelled))
    rows = np.concatenate([labelled, others[:unlabelled]])
    return take({name: train[name] for name in inputs}, rows)


def pool_inputs(model: StudyModel) -> tuple[str, ...]:
    """Returns the entries of a batch on which a target is compared with its source, of the target's inputs."""
    return model.inputs if model.pool is None else tuple(POOL + name for name in model.inputs)


def inputs_of(examples: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """Returns inputs without labels: those of the pool, or of the labelled examples where there is no pool.

    Raises:
      ValueError: the examples lack an input.
    """
    check_entries(examples, *names)
    return [examples.get(POOL + name, examples[name]) for name in names]
