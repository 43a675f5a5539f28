"""Image networks with weights of another library: what they lack for the labels at hand is fitted to examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import merge_jax as mj
from merge_jax.data import Arrays
from merge_jax.study.features import fitted_head
from merge_jax.types import ModelApply

__all__ = ["with_fitted_head"]

_LAST = ("params/fc/kernel", "params/fc/bias")


def with_fitted_head(
    apply: ModelApply, examples: Callable[[int], Arrays], num_classes: int
) -> Callable[[Path, dict[str, Any], int | None], dict[str, Any]]:
    """Returns `StudyModel.load_pretrained` of a network that `merge_jax.models.from_pytorch` reads.

    Where the file has as many classes as the model, its last layer is taken; otherwise one is fitted to the features of
    the seed's training examples. These are all that the source sees of the labels.

    Args:
      apply: the model's apply function, of images as in the examples.
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
            images = np.asarray(train["image"])
            heads[path, seed] = fitted_head(apply, loaded.variables, images, train["label"], num_classes)
        return mj.replace(loaded.variables, dict(zip(_LAST, heads[path, seed], strict=True)))

    return load
