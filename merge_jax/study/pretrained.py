"""Image networks with weights of another library: what they lack for the labels at hand is fitted to examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import merge_jax as mj
from merge_jax.data import Arrays
from merge_jax.study.features import read_features
from merge_jax.types import ModelApply

__all__ = ["PENALTY", "with_fitted_head"]

_LAST = ("params/fc/kernel", "params/fc/bias")
PENALTY = 100.0
"""Of the logistic regression on features of unit variance; our choice: of 10 to 10,000 the best for 2,000 images of
CIFAR-100 on validation, from 64 pixels on (`docs/weights.md`), and of 1 to 1,000 within a point for 500 texts of AG
News."""


def with_fitted_head(
    apply: ModelApply, examples: Callable[[int], Arrays], num_classes: int
) -> Callable[[Path, dict[str, Any], int | None], dict[str, Any]]:
    """Returns `StudyModel.load_pretrained` of a network that `merge_jax.models.from_pytorch` reads.

    Where the file has as many classes as the model, its last layer is taken; otherwise one is fitted to the features of
    the seed's training examples. These are all that the source sees of the labels.

    Args:
      apply: the model's apply function, of images as the examples have them.
      examples: `seed -> labelled examples`.
      num_classes: of the model.
    """
    heads: dict[tuple[Path, int], mj.training.Head] = {}

    def load(path: Path, variables: dict[str, Any], seed: int | None) -> dict[str, Any]:
        loaded = mj.models.from_pytorch(path, variables)
        if not loaded.kept or seed is None:
            return loaded.variables
        if (path, seed) not in heads:  # A run asks once to check, and once to train.
            train = examples(seed)
            features = read_features(apply, loaded.variables, np.asarray(train["image"]))
            heads[path, seed] = mj.fit_head(features, train["label"], num_classes=num_classes, penalty=PENALTY)
        return mj.replace(loaded.variables, dict(zip(_LAST, heads[path, seed], strict=True)))

    return load
